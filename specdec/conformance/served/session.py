"""From the options of the command to a certificate: connects to the servers, loads the reference, audits."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.reference import Reference
from specdec.conformance.served.audit import audit_served
from specdec.conformance.served.dialects import DIALECTS, dialect_of
from specdec.conformance.served.engine import Place, ServedArm, ServedEngine
from specdec.conformance.served.prompt_logprobs import WEAKER, PromptLogprobs
from specdec.conformance.served.tokens import TokenRecovery
from specdec.conformance.verdicts import AuditLimits
from specdec.models.loading import Vocabulary, read_vocabulary
from specdec.prompts import encode_raw
from specdec.sampling_params import SamplingParams
from specdec.servers.client import Client, api_key
from specdec.servers.errors import EngineError

MAX_LEFT_OUT = 0.25  # largest share of outputs left out, in units of max_tv: what they hide must be small beside it


def certify(options: Namespace, texts: Sequence[str], sampling: SamplingParams, command: str) -> Certificate:
    """The certificate of a served model. texts: prompts, continued as they are. command: reproduces the audit.

    Raises EngineError if a server cannot be reached before the audit, ValueError and OSError as `Reference.load`.
    """
    limits = AuditLimits(max_tv=options.max_tv)
    places = _places(options)
    target = options.target or places[0].client.model()["root"]
    vocabulary = read_vocabulary(target)
    tokenizer: Any = vocabulary.tokenizer
    prompts = {encode_raw(text, tokenizer): text for text in texts}
    reference = _reference(options, target, sampling, places[1], vocabulary)
    recovery = TokenRecovery(tokenizer, reference.vocab_size, reference.stop_token_ids)
    arms = [
        ServedArm(
            place,
            recovery,
            sampling,
            prompts,
            concurrency=options.concurrency,
            max_left_out=MAX_LEFT_OUT * limits.max_tv,
        )
        for place in places
    ]
    engine = ServedEngine(*arms)
    findings = audit_served(
        engine,
        reference,
        list(prompts),
        num_draws=options.num_draws,
        batch_size=options.concurrency,
        seed=options.seed,
        limits=limits,
    )
    if options.reference == "server":
        findings = replace(findings, reasons=(*findings.reasons, WEAKER))
    subject = Subject(
        engine=places[0].dialect.name,
        engine_version=_version(places[0].client),
        pair=target,
        method=options.method,
        gamma=options.gamma,
        command=command,
        options=json.dumps(_conditions(options, arms)),
    )
    return Certificate.of(subject, findings)


def _reference(
    options: Namespace, target: str, sampling: SamplingParams, control: Place, vocabulary: Vocabulary
) -> Reference:
    """The target in float32, or what the server without speculation reports of prompts."""
    if options.reference == "target":
        return Reference.load(target, sampling, device=options.device)
    tokenizer: Any = vocabulary.tokenizer
    return PromptLogprobs(
        control,
        sampling,
        vocab_size=vocabulary.vocab_size,
        eos_token_ids=frozenset({tokenizer.eos_token_id} - {None}),
        concurrency=options.concurrency,
    )


def _places(options: Namespace) -> tuple[Place, Place]:
    """The places of the speculative arm and of the control arm."""
    speculative = _place(options, options.url, options.speculative_fields)
    return speculative, _place(options, options.control_url or options.url, options.control_fields or {})


def _place(options: Namespace, url: str, fields: Mapping[str, Any]) -> Place:
    """A server asked for what the options leave open: its kind and the name of its model."""
    client = Client(url, api_key(), options.timeout, options.timeout)
    served = {} if options.model and options.server != "auto" else client.model()
    dialect = DIALECTS[options.server] if options.server != "auto" else dialect_of(served["owned_by"])
    return Place(client, dialect, options.model or served["id"], fields)


def _version(client: Client) -> str | None:
    """The server's version, or llama-server's build; None if it does not report one."""
    for report in (client.version, client.build):
        try:
            return report()
        except EngineError:
            continue
    return None


def _conditions(options: Namespace, arms: Sequence[ServedArm]) -> dict[str, Any]:
    """What the certificate says of how the tokens were obtained."""
    return {
        "reference": "the target in float32" if options.reference == "target" else "the server's log-probabilities",
        "control": "another server" if options.control_url else "the same server, switched per request",
        "tokens": "token ids" if all(arm.had_token_ids for arm in arms) else "text, encoded again",
        "concurrency": options.concurrency,
        "left_out": [f"{arm.num_left_out} of {arm.num_outputs + arm.num_left_out} outputs" for arm in arms],
    }
