"""Whether an engine's speculation is lossless: audits of `specdec.conformance` over the engines of the benchmarks.

`python -m bench.equivalence FOLDER` prints the certificates of a folder as a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cells import Cell
from bench.engines import BenchEngine, Gamma, PromptResult
from bench.options import BenchConfig
from bench.pairs import Pair, folder
from bench.texts import verdict
from specdec import AcceptanceCounts, SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import Limits

Record = dict[str, Any]
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # what goes without saying in the name of a certificate


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


def lines(records: Sequence[Record]) -> list[str]:
    """A line for each certificate."""
    return [_line(record) for record in records]


def _line(record: Record) -> str:
    return (
        f"{verdict(record):<20} {record['engine']} {record['method']} {record['gamma']}, {record['verification']}: "
        f"p = {record['p_value']:.2g} (plain decoding {record['control_p_value']:.2g}), {record['num_draws']} tokens, "
        f"would have shown a distance of {record['min_detectable_tv']:.3f}"
    )


HEAD = (
    "| engine | method | verification | sampling | verdict | p with speculation | p without | tokens | "
    "would have been found | differs by at most |\n|---|---|---|---|---|---|---|---|---|---|"
)


def row(path: Path) -> str:
    """A certificate in a table, with a link to its page. Distances are in hundredths of probability."""
    record = Certificate.load(path).record()
    draft = " ".join(json.loads(record["options"] or "{}").get("speculative_config", {}).values())
    method = " ".join(filter(None, (record["method"], str(record["gamma"]), draft)))
    cells = (
        f"{record['engine']} {record['engine_version']}",
        method,
        record["verification"],
        _sampling(record["sampling"]),
        f"[{verdict(record)}]({path.name.removesuffix('.json')}.md)",
        f"{record['p_value']:.2g}",
        f"{record['control_p_value']:.2g}",
        record["num_draws"],
        f"{100 * record['min_detectable_tv']:.3g}",
        f"{100 * record['tv_upper_bound']:.3g}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _sampling(sampling: Record) -> str:
    if sampling["temperature"] == 0:
        return "greedy"
    others = [f"{name} {sampling[name]:g}" for name in ("top_k", "top_p") if sampling[name] != PLAIN[name]]
    return ", ".join([f"T = {sampling['temperature']:g}", *others])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.equivalence", description=__doc__)
    parser.add_argument("folder", type=Path, help="where certificates are, as JSON")
    print(HEAD)
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        print(row(path))


if __name__ == "__main__":
    main()
