"""Whether an engine's speculation is lossless: audits of `specdec.conformance` over the engines of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.cells import Cell
from bench.engines import BenchEngine, Gamma
from bench.options import BenchConfig
from bench.pairs import Pair, folder
from specdec import SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import Limits

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Audited:
    """A cell's engine as an audit asks it: the two arms are its method and its own plain decoding.

    on_tokens: is told how many tokens the speculative arm has emitted since it was told last.
    """

    engine: BenchEngine
    cell: Cell
    sampling: SamplingParams
    on_tokens: Callable[[int], object] = int

    def speculative(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        outputs = self._outputs(self.cell.method, self.cell.gamma, prompts, seeds, max_tokens)
        self.on_tokens(sum(map(len, outputs)))
        return outputs

    def plain(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        return self._outputs("autoregressive", 0, prompts, seeds, max_tokens)

    def _outputs(
        self, method: str, gamma: Gamma, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        sampling = [replace(self.sampling, seed=seed, max_tokens=max_tokens) for seed in seeds]
        return [list(result.token_ids) for result in self.engine.generate(prompts, method, gamma, sampling).results]


def certify(
    engine: BenchEngine,
    cell: Cell,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    config: BenchConfig,
    device: str,
    *,
    on_tokens: Callable[[int], object] = int,
) -> Certificate:
    """Audit a cell's engine against the pair's target in float32; on_tokens: as for `Audited`.

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
        Audited(engine, cell, sampling, on_tokens),
        reference,
        prompts,
        draft=draft,
        num_draws=config.num_draws,
        batch_size=cell.batch_size,
        seed=config.seed,
        limits=Limits(max_tv=config.max_tv),
    )
    subject = Subject(
        cell.engine, engine.version, cell.pair, cell.method, cell.gamma, config.verification, config.command
    )
    return Certificate.of(subject, findings)


def _references(pair: Pair, cell: Cell, sampling: SamplingParams, device: str) -> tuple[Reference, Reference | None]:
    """The target's laws, and those of a draft model with the same tokens: a head's need the target's features."""
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


def lines(records: Sequence[Record]) -> list[str]:
    """A line for each certificate."""
    return [_line(record) for record in records]


def _line(record: Record) -> str:
    return (
        f"{record['verdict']:<10} {record['engine']} {record['method']} {record['gamma']}, {record['verification']}: "
        f"p = {record['p_value']:.2g} (plain decoding {record['control_p_value']:.2g}), {record['num_draws']} tokens, "
        f"would have shown a distance of {record['min_detectable_tv']:.3f}"
    )
