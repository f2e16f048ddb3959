"""Audit cells: whether an engine's speculation is lossless, by `specdec.conformance`.

`python -m bench.tools.gallery` prints all committed certificates as a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import BenchEngine, PromptResult
from bench.measure.context import Context
from bench.measure.journal import Entry
from bench.measure.models import failing_cell, quantization_of
from bench.measure.progress import cell_bar
from bench.records.schema import PLAIN, Cell, Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.conformance.audit import audit, expectation
from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import AuditLimits
from specdec.drafts import kind_in, load_with_drafts, share_vocabulary

PlainOutputs = dict[Any, list[list[int]]]


class Audits:
    """Measures audit cells, and writes their certificates into the folder of the options."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._plain_outputs: PlainOutputs = {}

    def measure(self, cell: Cell, benchmark: Any) -> Entry:
        """The certificate of a cell as its record; the audit is the only round."""
        context, pair = self._context, self._context.config.pair_of(cell)
        context.models.prepare([cell, replace(cell, method="autoregressive", gamma=0)], pair)
        engine = context.models.engine(cell.engine, pair)
        prompts = [tokens for _, tokens in context.chosen(cell, pair)]
        run = partial(certify, engine, cell, pair, prompts, context.config, context.device, self._plain_outputs)
        bar = cell_bar(cell, context.config.num_draws, "token", context.progress)
        try:
            with failing_cell(context.device), bar as done:
                announce = done.set_postfix_str if context.progress.isatty() else None
                certificate = benchmark.pedantic(partial(run, on_tokens=done.update, announce=announce), rounds=1)
        except ValueError as error:
            pytest.fail(str(error), pytrace=False)
        self._save(certificate)
        return Entry(certificate.record(), list(benchmark.stats.stats.data))

    def _save(self, certificate: Certificate) -> None:
        path = self._context.config.certificates / file_name(certificate)
        path.parent.mkdir(parents=True, exist_ok=True)
        certificate.save(path.with_name(f"{path.name}.json"))  # the name has dots of its own
        path.with_name(f"{path.name}.md").write_text(certificate.markdown())


@dataclass(frozen=True, slots=True)
class Audited:
    """Adapts a cell's engine for an audit: the arms are the cell's method and the same engine's plain decoding.

    counts: of each output of the speculative arm, None where its engine does not report them.
    on_tokens: called with the number of tokens that the speculative arm has emitted since the last call.
    plain_outputs: of plain decoding, by its arguments; it is run once for all methods.
    """

    engine: BenchEngine
    cell: Cell
    sampling: SamplingParams
    on_tokens: Callable[[int], object] = int
    plain_outputs: PlainOutputs = field(default_factory=dict)
    counts: list[AcceptanceCounts | None] = field(default_factory=list)

    @property
    def num_drafted(self) -> int | None:
        """Draft tokens of the speculative arm so far; None if its engine does not report them."""
        return None if None in self.counts else sum(each.num_drafted for each in self.counts if each)

    @property
    def num_accepted(self) -> int | None:
        """Accepted draft tokens of the speculative arm so far; None if its engine does not report them."""
        return None if None in self.counts else sum(each.num_accepted for each in self.counts if each)

    def speculative(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        results = self._results(self.cell.method, self.cell.gamma, prompts, seeds, max_tokens)
        self.counts.extend(result.counts for result in results)
        self.on_tokens(sum(len(result.token_ids) for result in results))
        return [list(result.token_ids) for result in results]

    def plain(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        target = (self.cell.engine, self.cell.pair, self.cell.placement, self.sampling)
        key = (repr(target), tuple(map(tuple, prompts)), tuple(seeds), max_tokens)
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
    announce: Callable[[str], object] | None = None,
) -> Certificate:
    """Audit a cell's engine against the pair's target in float32. plain_outputs, on_tokens: as for `Audited`.

    announce: called before the audit with how long it takes, which is measured first; None: it is not.
    Raises ValueError if acceptance is prescribed: such an engine does not verify anything.
    """
    if config.prescribes_acceptance:
        raise ValueError(
            "synthetic acceptance must be left out: with prescribed acceptance the output is not the target's"
        )
    sampling = SamplingParams(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens
    )
    reference, draft = _references(pair, cell, sampling, config, device)
    if announce:
        sizes = {"num_draws": config.num_draws, "batch_size": cell.batch_size}
        announce(expectation(Audited(engine, cell, sampling), reference, prompts, draft=draft, **sizes))
    findings = audit(
        Audited(engine, cell, sampling, on_tokens, {} if plain_outputs is None else plain_outputs),
        reference,
        prompts,
        draft=draft,
        num_draws=config.num_draws,
        batch_size=cell.batch_size,
        seed=config.seed,
        limits=AuditLimits(max_tv=config.max_tv),
        progress=False,  # the session draws its own
    )
    return Certificate.of(subject(cell, engine.version, config), findings)


def _references(
    pair: Pair, cell: Cell, sampling: SamplingParams, config: BenchConfig, device: str
) -> tuple[Reference, Reference | None]:
    """References for the target and for a draft model with the same vocabulary; None for other drafts.

    In float32, with the values of quantized weights if this library's engine quantizes them.
    """
    source = pair.draft_for(cell.method)
    sources = [folder(source)] if source and kind_in(folder(source)) == "model" else []
    target, drafts = load_with_drafts(
        folder(pair.target),
        sources,
        **_exact(pair, cell, config),
        device=device,
        attention=pair.attention,
        load_format=pair.load_format,
    )
    draft: Any = drafts[sources[0]] if sources else None
    draft = draft if draft and share_vocabulary(target, draft) is None else None
    return Reference(target, sampling), Reference(draft, sampling) if draft else None


def _exact(pair: Pair, cell: Cell, config: BenchConfig) -> dict[str, Any]:
    """Options of `load_pretrained` for the weights of a reference."""
    if quantization_of(cell, config) is None:
        return {"dtype": torch.float32}
    dtype = getattr(torch, config.dtype_of(pair))
    return {"dtype": dtype, "quantization": config.quantization, "dequantize": True}


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
    """The engine's options as JSON, and its quantization by this library; None if there are none."""
    if quantization := quantization_of(cell, config):
        return json.dumps({"quantization": quantization})
    return config.vllm_options if cell.engine == "vllm" and json.loads(config.vllm_options) else None


def file_name(certificate: Certificate) -> str:
    """The file name of a certificate without suffix, from everything that distinguishes it."""
    subject, sampling = certificate.subject, certificate.findings.sampling
    truncation = {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    options = json.loads(subject.options or "{}")
    given = [*options.get("speculative_config", {}).values()]
    given += [options["quantization"]] if subject.engine == "specdec" and "quantization" in options else []
    cell = (subject.engine, subject.pair, subject.method, subject.gamma, subject.verification, *given)
    changed = (f"{name}={value:g}" for name, value in truncation.items() if value != PLAIN[name])
    return "-".join(map(str, (*cell, *changed)))
