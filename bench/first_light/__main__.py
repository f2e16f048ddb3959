"""`python -m bench.first_light FOLDER`: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.first_light.report import FACTS_FILE, Report, num_failed, read, table
from bench.first_light.running import Interrupts, part, run_parts
from specdec.runtime.checks import nearest
from specdec.runtime.command_line import Parser

LIMITS_S = {
    "facts": 25,
    "correctness": 100,
    "shapes-8b": 62,
    "shapes-135m": 60,
    "kernels": 50,
    "transformers": 40,
    "real": 60,
}
CPU_LIMIT_S = 600.0  # per part without a GPU: on a busy machine, importing torch alone may take a minute
TABLE_FILE = "first_light.txt"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print the table; 1 if a check failed."""
    options = _parse(arguments)
    if options.pack:
        from bench.first_light.pieces import pack

        print("\n".join(f"{path} has {path.stat().st_size / 2**20:.1f} MiB" for path in pack(options.pack)))
        return 0
    with Interrupts() as interrupts:
        return _visit(options, interrupts)


def _visit(options: argparse.Namespace, interrupts: Interrupts) -> int:
    options.folder.mkdir(parents=True, exist_ok=True)
    facts, start_s = options.folder / FACTS_FILE, time.monotonic()
    facts.unlink(missing_ok=True)
    device, reason = _device(options.device)
    if reason:
        print(f"no GPU: everything is scaled down ({reason})", flush=True)
        Report("visit", facts).skip("GPU", reason)
    limits_s = LIMITS_S if device == "cuda" else dict.fromkeys(LIMITS_S, CPU_LIMIT_S)
    parts = [part(name, limits_s[name], device) for name in options.parts]
    run_parts(parts, options.folder, options.budget - (time.monotonic() - start_s), interrupts)
    if interrupts.came:
        print("interrupted", flush=True)
    text = f"{table(read(facts))}\n== {time.monotonic() - start_s:.0f} s on {device}"
    (options.folder / TABLE_FILE).write_text(text + "\n")
    print(text, flush=True)
    return int(num_failed(read(facts)) > 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bench.first_light", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("first-light"), help="where results go")
    parser.add_argument("--parts", type=_names, default=tuple(LIMITS_S), help=f"of {','.join(LIMITS_S)}, comma between")
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write the default model in pieces instead")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in LIMITS_S]:
        rule = f"must be of {','.join(LIMITS_S)}{nearest(unknown[0], LIMITS_S)}"
        raise argparse.ArgumentTypeError(f"parts={','.join(unknown)} {rule}")
    return names


def _device(requested: str) -> tuple[str, str]:
    """(device, reason if it is not a GPU). For a requested GPU, each part checks that it is usable."""
    if requested != "auto":
        return requested, "--device cpu" if requested == "cpu" else ""
    from bench.measure.machine import why_no_gpu

    reason = why_no_gpu()
    return ("cpu", reason) if reason else ("cuda", "")


if __name__ == "__main__":
    sys.exit(main())
