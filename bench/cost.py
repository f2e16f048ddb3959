"""What a step costs against its size: how many tokens are free, what a long context adds, what the memory allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch

from bench import phases, roofline
from bench.engines.specdec import SpecdecEngine
from bench.journal import SCHEMA_VERSION
from specdec import Engine
from specdec.models import score
from specdec.models.causal import CausalLM
from specdec.models.eagle import EagleHead
from specdec.optimal_trees import USUAL_RATES, expected_accepted, optimal_tree
from specdec.proposers.ngram import LookupIndex
from specdec.proposers.suffix import SAMPLED_DOUBT, OwnText
from specdec.proposers.tree import levels_of
from specdec.recording import Recorder
from specdec.sampling import SamplingState
from specdec.sampling_params import SamplingParams
from specdec.timing import synchronise
from specdec.trees import Branches

CONTEXT = 256  # tokens that a sequence has where the sweep is not over contexts
WIDTH = 5  # tokens of a step that verifies four
SWEEPS = {
    "width": (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 64),
    "context": (128, 256, 512, 1024, 2048, 4096, 8192),
    "context-of-5": (128, 256, 512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16, 32),
    "batch-of-5": (1, 2, 4, 8, 16, 32),
    "head": (1, 2, 4, 8, 16, 32),
    "tree": (1, 2, 3, 4, 6, 8, 11, 12, 16, 24, 32, 48, 64),
    "vocabulary": (8192, 16384, 32768, 49152, 131072, 262144),
    "ngram": (1000, 3000, 10_000, 30_000, 100_000),
    "suffix": (1000, 3000, 10_000, 30_000, 100_000),
    "slots": (1, 2, 4, 8, 16),
    **phases.SWEEPS,
}
NUM_REQUESTS, REQUEST_TOKENS = 32, 128  # that go through slots, and tokens that each of them is to emit
SMOKE_SWEEPS = dict.fromkeys(SWEEPS, (16,))


@dataclass(frozen=True, slots=True)
class Sized:
    """Work of one size. run: does it once. bytes_read: from memory, at the least; None if that is not what it costs.

    tokens: that it handles, so that costs can be compared. facts: what else its record tells, once it has run.
    """

    run: Callable[[], object]
    bytes_read: int | None
    tokens: int
    facts: Callable[[], dict[str, Any]] = dict


def measure(
    benchmark: Any,
    engine: SpecdecEngine,
    axis: str,
    size: int,
    ceiling: dict[str, Any],
    identity: dict[str, Any],
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[float]]:
    """The record of a cell and the times of its rounds in seconds. ceiling: the record of `bench.roofline`.

    prompts: token ids, for what is measured with real ones.
    roofline_s: what reading takes at the least. roofline_share: of the median.
    """
    work = sized(engine, axis, size, prompts)
    rounds, warm_up = _rounds(axis)
    benchmark.pedantic(work.run, rounds=rounds, warmup_rounds=warm_up)
    seconds = list(benchmark.stats.stats.data)
    median_s = statistics.median(seconds)
    roofline_s = roofline.read_s(ceiling, work.bytes_read) if work.bytes_read else None
    record = {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "axis": axis,
        "size": size,
        "tokens": work.tokens,
        "median_s": median_s,
        "bytes_read": work.bytes_read,
        "read_bandwidth": ceiling["bandwidths"][-1],
        "roofline_s": roofline_s,
        "roofline_share": roofline_s / median_s if roofline_s else None,
        **work.facts(),
    }
    return record, seconds


def _rounds(axis: str) -> tuple[int, int]:
    """How many rounds are measured, after how many that are not."""
    if axis in phases.SWEEPS:
        return 3, 1
    return {"slots": (1, 0), **dict.fromkeys(COPIES, (5, 2))}.get(axis, (15, 2))


def needs(axis: str) -> str:
    """The method whose draft an axis measures; "autoregressive" for one that measures none."""
    if axis in ("head", "tree"):
        return "eagle" if axis == "head" else axis
    return phases.parse(axis)[0] if axis in phases.SWEEPS else "autoregressive"


def sized(engine: SpecdecEngine, axis: str, size: int, prompts: Sequence[Sequence[int]] = ()) -> Sized:
    """The work of a cell; `prompts` as for `measure`."""
    if axis == "slots":
        return _requests(engine.target, size, prompts)
    if axis in phases.SWEEPS:
        return _phases(engine, axis, size)
    if axis == "head":
        return _head_step(engine.drafts["eagle"], engine.target, size)
    if axis == "tree":
        return _tree_step(engine.drafts["tree"], engine.target, size)
    if axis == "vocabulary":
        return _sampling(engine.target, size)
    if axis in COPIES:
        return _copying(COPIES[axis], size)
    width = size if axis == "width" else WIDTH if axis.endswith(f"-of-{WIDTH}") else 1
    rows, context = (size if axis.startswith("batch") else 1), (size if axis.startswith("context") else CONTEXT)
    return _step(engine.target, rows, width, context)


def _phases(engine: SpecdecEngine, axis: str, rows: int) -> Sized:
    """Decoding a prompt, in each of so many rows. Times of the rounds count, not of the warm-up before."""
    run, runs = phases.runner(engine, axis, rows)
    return Sized(run, None, rows * phases.NUM_TOKENS, lambda: phases.shares(axis, runs[-_rounds(axis)[0] :]))


def _requests(target: CausalLM, slots: int, prompts: Sequence[Sequence[int]]) -> Sized:
    """Plain decoding of requests through so many slots, each refilled as its row ends; prompts are read, too."""
    engine = Engine(target, max_batch_size=slots)
    requests = list(islice(cycle(prompts), NUM_REQUESTS))
    longest = target.context_length - max(map(len, requests))
    sampling = SamplingParams(temperature=0, max_tokens=min(REQUEST_TOKENS, longest), ignore_eos=True)
    engine.generate(requests[:1], replace(sampling, max_tokens=1))  # warms up
    facts = {"prompt_tokens": sum(map(len, requests))}
    return Sized(lambda: engine.generate(requests, sampling), None, NUM_REQUESTS * sampling.max_tokens, lambda: facts)


def _step(target: CausalLM, rows: int, width: int, context: int) -> Sized:
    """A decode step of `width` tokens in each row, behind `context` tokens."""
    context = min(context, target.context_length - width)  # prompt and step together must fit
    tokens = torch.ones(rows, width, dtype=torch.int64, device=target.device)
    recorder = Recorder(target.device)
    cache = target.allocate(rows, recorder.capacity(context + width))

    def run() -> None:
        cache.lengths[:] = [context] * rows
        score(target, tokens, cache, recorder)
        synchronise(target.device)

    return Sized(run, target.step_bytes + rows * (context + width) * target.token_bytes, rows * width)


def _head_step(head: EagleHead, target: CausalLM, rows: int) -> Sized:
    """One more token drafted in each row: the head's layer over as many tokens of context, and its logits."""
    cache = head.allocate(rows, CONTEXT + 1)
    features = torch.zeros(rows, 1, target.config.hidden_size, dtype=target.dtype, device=target.device)
    tokens = torch.ones(rows, 1, dtype=torch.int64, device=target.device)

    @torch.inference_mode()
    def run() -> None:
        cache.lengths[:] = [CONTEXT] * rows
        head.logits(head(features, tokens, cache))
        synchronise(target.device)

    token_bytes = target.token_bytes // target.num_layers  # a head's layer has its target's dimensions
    return Sized(run, head.step_bytes + rows * (CONTEXT + 1) * token_bytes, rows)


def _tree_step(head: EagleHead, target: CausalLM, num_nodes: int) -> Sized:
    """The best tree of so many nodes, drawn by the head level by level and scored in one call, without verifying it.

    expected_tokens: that a step emits, by what was measured of the draft. depth: the tree's levels.
    """
    rates = head.rates or USUAL_RATES
    tree = optimal_tree(rates.acceptance, num_nodes, rates.level_cost)
    own, cache = (model.allocate(1, CONTEXT + len(tree) + 1) for model in (head, target))
    features = torch.zeros(1, 1, target.config.hidden_size, dtype=target.dtype, device=target.device)
    tokens = torch.ones(1, len(tree) + 1, dtype=torch.int64, device=target.device)

    @torch.inference_mode()
    def run() -> None:
        own.lengths[0] = cache.lengths[0] = CONTEXT
        guessed = head(features, tokens[:, :1], own)
        own.lengths[0] += 1
        for level in levels_of(tree):
            if level.number:
                fed = tokens[:, : len(level.parents)]
                guessed = head(guessed[:, level.above], fed, own, branches=level.branches)
            head.logits(guessed)
        target.forward(tokens, cache, branches=Branches.behind_root(tree.parents))
        synchronise(target.device)

    num_bytes = target.step_bytes + tree.depth * head.step_bytes + CONTEXT * target.token_bytes
    expected = 1 + expected_accepted(tree, rates.acceptance)
    return Sized(run, num_bytes, len(tree) + 1, lambda: {"depth": tree.depth, "expected_tokens": expected})


def _sampling(target: CausalLM, vocab_size: int) -> Sized:
    """The law of five positions at temperature 1, of logits as the target gives them, and a draw from each."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, WIDTH, vocab_size, generator=generator).to(target.device, target.dtype)
    uniforms = torch.rand(1, WIDTH, dtype=torch.float64, generator=generator).to(target.device)
    state = SamplingState([SamplingParams()], [()], [()], vocab_size, target.device)

    def run() -> None:
        state.law(logits).draw(uniforms)
        synchronise(target.device)

    return Sized(run, None, WIDTH)


def _copying(make: Callable[[], Callable[[list[int]], object]], num_tokens: int) -> Sized:
    """Copies of a few tokens from a text that grows as in decoding. make: -> what copies, from the text so far."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 5000, (num_tokens,), generator=generator).tolist()
    step = 8

    def run() -> None:
        copy, known = make(), []
        for start in range(0, num_tokens, step):
            known += text[start : start + step]
            copy(known)

    return Sized(run, None, num_tokens)


def _lookup() -> Callable[[list[int]], object]:
    index = LookupIndex()
    return lambda known: index.continuation(known, WIDTH)


def _suffixes() -> Callable[[list[int]], object]:
    own = OwnText()
    return lambda known: own.copy(known, WIDTH, SAMPLED_DOUBT)


COPIES = {"ngram": _lookup, "suffix": _suffixes}


def lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables of the cost cells: times by size, with what is reached of the roofline, and shares of a step."""
    steps = [record for record in records if record["axis"] in phases.SWEEPS]
    sizes = [record for record in records if record["axis"] not in phases.SWEEPS]
    if sizes:
        yield (
            f"memory is read at {sizes[0]['read_bandwidth'] / 1e9:.1f} GB/s; of roofline: time to read a block as "
            "large as weights and cache, over the time measured"
        )
        yield f"{'axis':14}{'size':>8}{'ms':>10}{'us/token':>10}{'of roofline':>13}"
        yield from map(_line, sizes)
        yield from _worth_of_trees(sizes)
    if steps:
        yield f"{'a decode step':16}{'':10}{'rows':>5}{'ms':>9}" + "".join(f"{phase:>14}" for phase in phases.PHASES)
        yield from map(_line_of_shares, steps)


def _worth_of_trees(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where trees pay, by their costs and by how often the draft's nodes were accepted where that was measured."""
    trees = [record for record in records if record["axis"] == "tree"]
    plain = next((record for record in records if (record["axis"], record["size"]) == ("width", 1)), None)
    if not trees or not plain:
        return
    speedups = [each["expected_tokens"] * plain["median_s"] / each["median_s"] for each in trees]
    best = max(zip(speedups, trees, strict=True), key=lambda pair: pair[0])
    paying = [each["size"] for speedup, each in zip(speedups, trees, strict=True) if speedup > 1]
    yield (
        f"trees expect {best[0]:.2f} times the tokens per second of plain decoding with {best[1]['size']} nodes in "
        f"{best[1]['depth']} levels; "
        + (f"the largest measured that pays has {max(paying)}" if paying else "none measured pays")
    )


def _line(record: dict[str, Any]) -> str:
    share = record["roofline_share"]
    return (
        f"{record['axis']:14}{record['size']:>8}{1e3 * record['median_s']:>10.3f}"
        f"{1e6 * record['median_s'] / record['tokens']:>10.1f}{'-' if share is None else f'{share:.0%}':>13}"
    )


def _line_of_shares(record: dict[str, Any]) -> str:
    law = "greedy" if record["temperature"] == 0 else f"at {record['temperature']:g}"
    shares = "".join(f"{record[f'{phase}_share']:>14.1%}" for phase in phases.PHASES)
    return f"{record['method']:16}{law:10}{record['size']:>5}{1e3 * record['step_s']:>9.2f}{shares}"
