"""Audit a served model over HTTP: lossless, lossy or inconclusive, with a certificate."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

from specdec.conformance.served.dialects import DIALECTS
from specdec.conformance.served.prompts import read_prompts
from specdec.runtime.progress import announce, doing
from specdec.sampling_params import SamplingParams
from specdec.servers.client import KEY_VARIABLE
from specdec.servers.errors import EngineError

MAX_SEED = 127  # with the seeds of requests derived from it below 2**31, which every server takes
ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./-]*)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _server_options(parser.add_argument_group("servers"))
    _sampling_options(parser.add_argument_group("sampling"))
    _audit_options(parser.add_argument_group("audit"))
    _output_options(parser.add_argument_group("certificate"))


def _server_options(group: Any) -> None:
    group.add_argument("--url", required=True, type=_address, help="server with speculation, as http://HOST:PORT")
    group.add_argument("--model", help="name of the model on the server (default: its first)")
    group.add_argument("--control-url", type=_address, help="the same server without speculation: the control arm")
    group.add_argument(
        "--control-fields",
        type=_fields,
        metavar="JSON",
        help="fields of each request that switch speculation off, if one server does both",
    )
    group.add_argument(
        "--speculative-fields",
        type=_fields,
        default={},
        metavar="JSON",
        help="fields of each request that switch speculation on",
    )
    group.add_argument(
        "--server", default="auto", choices=("auto", *DIALECTS), help="kind of server (default: as it reports)"
    )
    group.add_argument("--concurrency", type=_positive, default=8, help="requests at once (default: %(default)s)")
    group.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that a request may take (default: %(default)g)"
    )


def _sampling_options(group: Any) -> None:
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: %(default)s)")
    group.add_argument(
        "--logprobs",
        action="store_true",
        help="check the log-probabilities that the server reports, too: of temperature 0 or 1 and all tokens, and with "
        "--reference target",
    )
    group.add_argument("--max-tokens", type=_positive, default=32, help="tokens per output (default: %(default)s)")
    group.add_argument("--prompts", type=Path, help="JSON lines file with the field prompt (default: built-in prompts)")
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=[], help="further tokens at which the server stops"
    )


def _audit_options(group: Any) -> None:
    group.add_argument("--target", help="the target, as name, hub id or folder (default: as the server reports)")
    group.add_argument(
        "--reference",
        default="target",
        choices=("target", "server"),
        help="target: loaded here in float32; server: the control server's prompt log-probabilities, which is weaker "
        "and needs vLLM and a --top-k of at most 20 (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help="of the reference: auto, cpu or cuda (default: %(default)s)")
    group.add_argument("--num-draws", type=_positive, default=20_000, help="tokens per arm (default: %(default)s)")
    group.add_argument(
        "--max-tv", type=_share, default=0.05, help="total variation distance to detect (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="audit seed, below 128 (default: %(default)s)")


def _output_options(group: Any) -> None:
    group.add_argument("--out", type=Path, default=Path("certificates"), help="folder (default: %(default)s)")
    group.add_argument("--name", default="audit", help="name of its files (default: %(default)s)")
    group.add_argument("--method", help="how the server drafts, for the certificate")
    group.add_argument("--gamma", help="how many tokens it drafts, for the certificate")


def run(arguments: argparse.Namespace) -> int:
    """Audit, print the findings, write the certificate, and return 0 (lossless), 1 (lossy) or 3 (inconclusive)."""
    if arguments.control_url is None and arguments.control_fields is None:
        raise ValueError(
            "the control arm is missing; give --control-url, a server without speculation, or --control-fields, which "
            "switch it off per request"
        )
    if not 0 <= arguments.seed <= MAX_SEED:
        raise ValueError(f"seed={arguments.seed} must lie between 0 and {MAX_SEED}; servers take seeds of 32 bits")
    plain = arguments.temperature in (0, 1) and not arguments.top_k and arguments.top_p == 1
    if arguments.logprobs and not (plain and arguments.reference == "target"):
        raise ValueError(
            "--logprobs must be used with temperature 0 or 1, without --top-k and --top-p, and with --reference "
            "target; servers differ in what else they report"
        )
    texts = read_prompts(arguments.prompts)
    sampling = SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        stop_token_ids=tuple(arguments.stop_token_ids),
        logprobs=arguments.logprobs,
    )
    with doing("importing torch"):
        from specdec.conformance.served import results
        from specdec.conformance.served.session import certify

    try:
        certificate = certify(arguments, texts, sampling, reproduction(arguments))
    except EngineError as error:  # before the audit; later ones make it inconclusive
        raise OSError(str(error)) from None
    results.write(certificate, arguments.out, arguments.name)
    print(certificate.findings)
    announce(f"certificate: {arguments.out / arguments.name}.json, .md and .xml")
    return results.EXIT_STATUS[certificate.findings.verdict]


def reproduction(arguments: argparse.Namespace) -> str:
    """The command line of these arguments, for the certificate."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["python", "-m", "specdec.conformance", "audit"]
    for name, value in vars(arguments).items():
        if name not in ("command", "out", "name") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name.replace('_', '-')}", *(() if value is True else map(str, values))]
    return shlex.join(words)


def _address(text: str) -> str:
    if not ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "the address must be http://HOST:PORT or https://HOST:PORT, without a user, a password or a query; an API "
            f"key goes into {KEY_VARIABLE}"
        )
    return text


def _fields(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text[:80]!r} must be a JSON object, as {{"speculate": false}}')
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)
