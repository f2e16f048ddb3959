"""Whether an engine's speculation is lossless: audits of `specdec.conformance` over the engines of the benchmarks.

`python -m bench.tools.certificates FOLDER` prints the certificates of a folder as a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.campaign.options import BenchConfig
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import BenchEngine, PromptResult
from bench.records.schema import PLAIN, Cell, Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import Limits

Record = dict[str, Any]


PlainOutputs = dict[Any, list[list[int]]]


@dataclass(frozen=True, slots=True)
class Audited:
    """A cell's engine as an audit asks it: the two arms are its method and its own plain decoding.

    counts: of each output of the speculative arm, None where its engine does not tell.
    on_tokens: is told how many tokens the speculative arm has emitted since it was told last.
    plain_outputs: of plain decoding, by what was asked: all methods of a run have the same, and are given them once.
    """

    engine: BenchEngine
    cell: Cell
    sampling: SamplingParams
    on_tokens: Callable[[int], object] = int
    plain_outputs: PlainOutputs = field(default_factory=dict)
    counts: list[AcceptanceCounts | None] = field(default_factory=list)

    @property
    def num_drafted(self) -> int | None:
        """Tokens drafted by the speculative arm so far, None if its engine does not tell."""
        return None if None in self.counts else sum(each.num_drafted for each in self.counts if each)

    @property
    def num_accepted(self) -> int | None:
        """As `num_drafted`, of those that were accepted."""
        return None if None in self.counts else sum(each.num_accepted for each in self.counts if each)

    def speculative(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        results = self._results(self.cell.method, self.cell.gamma, prompts, seeds, max_tokens)
        self.counts.extend(result.counts for result in results)
        self.on_tokens(sum(len(result.token_ids) for result in results))
        return [list(result.token_ids) for result in results]

    def plain(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        whose = (self.cell.engine, self.cell.pair, self.cell.placement, self.sampling)
        key = (repr(whose), tuple(map(tuple, prompts)), tuple(seeds), max_tokens)
        if key not in self.plain_outputs:
            results = self._results("autoregressive", 0, prompts, seeds, max_tokens)
            self.plain_outputs[key] = [list(result.token_ids) for result in results]
        return self.plain_outputs[key]

    def _results(
        self, method: str, gamma: Gamma, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int
    ) -> tuple[PromptResult, ...]:
        sampling = [replace(self.sampling, seed=seed, max_tokens=max_tokens) for seed in seeds]
        return self.engine.generate(prompts, method, gamma, sampling).results


def certify(
    engine: BenchEngine,
    cell: Cell,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    config: BenchConfig,
    device: str,
    plain_outputs: PlainOutputs | None = None,
    *,
    on_tokens: Callable[[int], object] = int,
) -> Certificate:
    """Audit a cell's engine against the pair's target in float32; plain_outputs, those of this run, and on_tokens: as
    for `Audited`.

    Raises ValueError where acceptance is prescribed: such an engine does not even try.
    """
    if config.synthetic_acceptance_rates:
        raise ValueError(
            "synthetic_acceptance_rates must be left out: with prescribed acceptance the output is not the target's"
        )
    sampling = SamplingParams(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens
    )
    reference, draft = _references(pair, cell, sampling, device)
    findings = audit(
        Audited(engine, cell, sampling, on_tokens, {} if plain_outputs is None else plain_outputs),
        reference,
        prompts,
        draft=draft,
        num_draws=config.num_draws,
        batch_size=cell.batch_size,
        seed=config.seed,
        limits=Limits(max_tv=config.max_tv),
        progress=False,  # the session draws its own
    )
    return Certificate.of(subject(cell, engine.version, config), findings)


def _references(pair: Pair, cell: Cell, sampling: SamplingParams, device: str) -> tuple[Reference, Reference | None]:
    """References for the target and, if it has the same tokens, the draft model; a head needs the target's features."""
    import torch

    from specdec.drafts import kind_in, load_with_drafts, share_vocabulary

    source = pair.draft_for(cell.method)
    sources = [folder(source)] if source and kind_in(folder(source)) == "model" else []
    target, drafts = load_with_drafts(
        folder(pair.target),
        sources,
        dtype=torch.float32,
        device=device,
        attention=pair.attention,
        load_format=pair.load_format,
    )
    draft: Any = drafts[sources[0]] if sources else None
    draft = draft if draft and share_vocabulary(target, draft) is None else None
    return Reference(target, sampling), Reference(draft, sampling) if draft else None


def subject(cell: Cell, version: str, config: BenchConfig) -> Subject:
    return Subject(
        cell.engine,
        version,
        cell.pair,
        cell.method,
        cell.gamma,
        config.verification,
        config.command,
        _options(cell, config),
    )


def _options(cell: Cell, config: BenchConfig) -> str | None:
    """What the engine was told beside that which all engines are told."""
    return config.vllm_options if cell.engine == "vllm" and json.loads(config.vllm_options) else None


def file_name(certificate: Certificate) -> str:
    """Of a certificate, without its suffix: what tells it from the others of its engine."""
    subject, sampling = certificate.subject, certificate.findings.sampling
    told = {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    given = json.loads(subject.options or "{}").get("speculative_config", {})
    whose = (subject.engine, subject.pair, subject.method, subject.gamma, subject.verification, *given.values())
    return "-".join(map(str, (*whose, *(f"{name}={value:g}" for name, value in told.items() if value != PLAIN[name]))))
