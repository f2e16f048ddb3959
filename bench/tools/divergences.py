"""Why greedy outputs of a run differ, rounding or a bug: `python -m bench.tools.divergences RUN.json`.

Prompts with different outputs are decoded again, by plain decoding of the run's reference engine and by the cell's
engine and method. `specdec.conformance.divergence` then explains the first difference: the target's margin there in
float32, and how much step widths change its logits in the run's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import Pair, catalogue, folder
from bench.engines.base import BenchEngine, LoadOptions, Peers, Setup, VllmOptions
from bench.engines.registry import load
from bench.records.schema import Gamma
from bench.records.untrusted import loads
from bench.workloads import registry
from specdec import SamplingParams
from specdec.conformance.divergence import Divergence, explain
from specdec.drafts import load_with_drafts
from specdec.prompts import encode
from specdec.runtime.command_line import Parser

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parting:
    """Two outputs of a prompt. prompt: its number in the run. position: the first difference that the run found.

    divergence: where they do now, and why; None if they are equal now.
    """

    engine: str
    method: str
    gamma: Gamma
    prompt: int
    position: int
    divergence: Divergence | None


class Engines:
    """The engines of a run over one pair, loaded when they are first asked."""

    def __init__(self, pair: Pair, dtype: str, vllm: VllmOptions) -> None:
        options = LoadOptions(dtype=dtype, device="cpu", peers=Peers(vllm=vllm))
        self.dtype = getattr(torch, dtype)
        self._engine: Callable[[str], BenchEngine] = cache(lambda name: load(name, pair, options))
        self.model: Callable[[torch.dtype], Any] = cache(lambda dtype: _target(pair, dtype))

    def output(self, name: str, method: str, gamma: Gamma, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """One prompt's greedy output."""
        engine = self._engine(name)
        engine.prepare([Setup(method, gamma, 1)])
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return list(engine.generate([prompt], method, gamma, [sampling]).results[0].token_ids)


def partings(records: Sequence[Record], prompts: Sequence[Sequence[int]], engines: Engines) -> Iterator[Parting]:
    """Of cells of one run, whose prompts these are."""
    for record in records:
        for number, position in enumerate(record["first_difference_at"] or ()):
            if position is None:
                continue
            method, gamma, prompt, tokens = record["method"], record["gamma"], prompts[number], record["max_tokens"]
            expected = engines.output(record["reference_engine"], "autoregressive", 0, prompt, tokens)
            output = engines.output(record["engine"], method, gamma, prompt, tokens)
            exact, own = engines.model(torch.float32), engines.model(engines.dtype)
            why = explain(prompt, output, expected, exact, own)
            yield Parting(record["engine"], method, gamma, number, position, why)


def _target(pair: Pair, dtype: torch.dtype) -> Any:
    return load_with_drafts(
        folder(pair.target), [], dtype=dtype, device="cpu", attention=pair.attention, load_format=pair.load_format
    )[0]


def line(parting: Parting) -> str:
    """A row of the table, in Markdown."""
    why = parting.divergence
    cells = [parting.engine, f"{parting.method} {parting.gamma}", parting.prompt, parting.position]
    found = ["-"] * 5 + ["equal this time"]
    if why:
        numbers = (f"{value:.3g}" for value in (why.margin, why.gap, why.noise))
        found = [str(why.position), f"{why.tokens[0]} / {why.tokens[1]}", *numbers, why.verdict]
    return f"| {' | '.join(map(str, [*cells, *found]))} |"


HEAD = (
    "| engine | method | prompt | parted at | parts at | tokens | margin | gap | noise | verdict |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = Parser(prog="python -m bench.tools.divergences", description=__doc__)
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--engines", default="transformers,vllm", help="those whose cells are explained")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter that runs vLLM")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, too")
    given = parser.parse_args()
    run = [each["extra_info"] for each in loads(given.run.read_text())["benchmarks"]]
    records = [record for record in run if record["engine"] in given.engines.split(",")]
    first = records[0]
    engines = Engines(catalogue()[first["pair"]], first["dtype"], VllmOptions(given.vllm_python))
    texts = registry.sample(registry.read(first["workload"], None), first["num_prompts"], first["seed"])
    prompts = [encode(text.text, engines.model(torch.float32).tokenizer) for text in texts]
    print(HEAD, flush=True)
    found = []
    for each in partings(records, prompts, engines):
        found.append(asdict(each))
        print(line(each), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
