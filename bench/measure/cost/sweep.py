"""Cost cells: the time of a step against its size, compared with the time that its memory traffic must take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import pytest
import torch

from bench.engines.specdec import SpecdecEngine
from bench.measure.context import Context
from bench.measure.cost import phase_shares, roofline
from bench.measure.journal import Entry
from bench.measure.prompts import encoded_prompt
from bench.records import phases
from bench.records.schema import SCHEMA_VERSION, Record
from bench.records.sweeps import CONTEXT, NUM_REQUESTS, REQUEST_TOKENS, WIDTH
from specdec import Engine
from specdec.heads.eagle import EagleHead
from specdec.models.base import score
from specdec.models.causal import CausalLM
from specdec.models.costs import sample_tokens
from specdec.models.experts import count_reads
from specdec.proposers.ngram import LookupIndex
from specdec.proposers.suffix import SAMPLED_DOUBT, OwnText
from specdec.proposers.tree import levels_of
from specdec.runtime.recording import Recorder
from specdec.runtime.timing import synchronize
from specdec.sampling.state import SamplingState
from specdec.sampling_params import SamplingParams
from specdec.trees.columns import Branches
from specdec.trees.optimal import USUAL_RATES, expected_accepted, optimal_tree


@dataclass(frozen=True, slots=True)
class CostCell:
    """A point of the sweep: the varied axis, and its size."""

    axis: str
    size: int

    @property
    def id(self) -> str:
        return f"{self.axis}-{self.size}"


class CostSweep:
    """Measures cost cells with specdec's engine and the first pair. ceiling: returns the roofline's record."""

    def __init__(self, context: Context, ceiling: Callable[[], Record]) -> None:
        self._context, self._ceiling = context, ceiling

    def measure(self, cell: CostCell, benchmark: Any) -> Entry:
        """The record of a cell, each of whose rounds is one step; skips it if the pair lacks its draft."""
        context, config = self._context, self._context.config
        pair, method = config.pairs[0], needs(cell.axis)
        if pair.lacks_draft(method):
            pytest.skip(f"pair={pair.name} has no draft for method={method}; name a pair that has with --pairs")
        context.models.check_draft("specdec", method, pair)
        engine = context.models.engine("specdec", pair)
        assert isinstance(engine, SpecdecEngine)
        if not isinstance(engine.target, CausalLM):
            pytest.skip(f"pair={pair.name} must be decoder-only to be swept; name such a pair with --pairs")
        texts = next(context.prompts.available(), [])
        prompts = [encoded_prompt(prompt, engine.tokenizer, config, pair) for prompt in texts]
        work = sized(engine, cell.axis, cell.size, prompts)
        rounds, warm_up = _rounds(cell.axis)
        benchmark.pedantic(work.run, rounds=rounds, warmup_rounds=warm_up)
        rounds_s = list(benchmark.stats.stats.data)
        identity = {"pair": pair.name, "dtype": config.dtype_of(pair), "device": context.device}
        return Entry({**identity, **self._record(cell, work, statistics.median(rounds_s))}, rounds_s)

    def _record(self, cell: CostCell, work: Sized, median_s: float) -> Record:
        """roofline_s: time to read `bytes_read` at the roofline's bandwidth. roofline_share: that over the median."""
        ceiling = self._ceiling()
        roofline_s = roofline.read_s(ceiling, work.bytes_read) if work.bytes_read else None
        return {
            "schema_version": SCHEMA_VERSION,
            "axis": cell.axis,
            "size": cell.size,
            "tokens": work.tokens,
            "median_s": median_s,
            "bytes_read": work.bytes_read,
            "read_bandwidth": ceiling["bandwidths"][-1],
            "roofline_s": roofline_s,
            "roofline_share": roofline_s / median_s if roofline_s else None,
            **work.facts(),
        }


@dataclass(frozen=True, slots=True)
class Sized:
    """Work of one size. run: does it once. bytes_read: lower bound on memory reads; None if they do not limit it.

    tokens: number of tokens processed, to compare costs. facts: further fields of its record, available after a run.
    """

    run: Callable[[], object]
    bytes_read: int | None
    tokens: int
    facts: Callable[[], dict[str, Any]] = dict


def _rounds(axis: str) -> tuple[int, int]:
    """The number of measured rounds, and of warm-up rounds before them."""
    if axis in phases.SWEEPS:
        return 3, 1
    return {"slots": (1, 0), **dict.fromkeys(COPIES, (5, 2))}.get(axis, (15, 2))


def needs(axis: str) -> str:
    """The method whose draft an axis measures; "autoregressive" for one that measures none."""
    if axis in ("head", "tree"):
        return "eagle" if axis == "head" else axis
    return phases.parse(axis)[0] if axis in phases.SWEEPS else "autoregressive"


def sized(engine: SpecdecEngine, axis: str, size: int, prompts: Sequence[Sequence[int]] = ()) -> Sized:
    """The work of a cell. prompts: token ids, for the axes that decode real ones."""
    target = engine.target
    assert isinstance(target, CausalLM), "pairs of other kinds are skipped"
    if axis == "slots":
        return _requests(target, size, prompts)
    if axis in phases.SWEEPS:
        return _phases(engine, axis, size)
    if axis == "head":
        return _head_step(engine.draft_for("eagle"), target, size)
    if axis == "tree":
        return _tree_step(engine.draft_for("tree"), target, size)
    if axis == "vocabulary":
        return _sampling(target, size)
    if axis in COPIES:
        return _copying(COPIES[axis], size)
    width = size if axis == "width" else WIDTH if axis.endswith(f"-of-{WIDTH}") else 1
    rows, context = (size if axis.startswith("batch") else 1), (size if axis.startswith("context") else CONTEXT)
    return _step(target, rows, width, context)


def _phases(engine: SpecdecEngine, axis: str, rows: int) -> Sized:
    """Decode a prompt in each of `rows` rows. Only the rounds are timed, not the warm-up."""
    run, runs = phase_shares.runner(engine, axis, rows)
    return Sized(
        run, None, rows * phase_shares.NUM_TOKENS, lambda: phase_shares.shares(axis, runs[-_rounds(axis)[0] :])
    )


def _requests(target: CausalLM, slots: int, prompts: Sequence[Sequence[int]]) -> Sized:
    """Plain decoding of requests with `slots` slots, each reused as soon as its row ends, including prefills."""
    engine = Engine(target, max_batch_size=slots)
    requests = list(islice(cycle(prompts), NUM_REQUESTS))
    longest = target.context_length - max(map(len, requests))
    sampling = SamplingParams(temperature=0, max_tokens=min(REQUEST_TOKENS, longest), ignore_eos=True)
    engine.generate(requests[:1], replace(sampling, max_tokens=1))  # warms up
    facts = {"prompt_tokens": sum(map(len, requests))}
    return Sized(lambda: engine.generate(requests, sampling), None, NUM_REQUESTS * sampling.max_tokens, lambda: facts)


def _step(target: CausalLM, rows: int, width: int, context: int) -> Sized:
    """A decode step of `width` tokens in each row, after `context` tokens."""
    context = min(context, target.context_length - width)  # prompt and step together must fit
    tokens = torch.tensor(sample_tokens(target, rows, width), device=target.device)
    recorder = Recorder(target.device)
    cache = target.allocate(rows, recorder.capacity(context + width))

    def run() -> None:
        cache.num_cached[:] = [context] * rows
        score(target, tokens, cache, recorder)
        synchronize(target.device)

    def once() -> None:
        cache.num_cached[:] = [context] * rows
        target.forward(tokens, cache)

    num_bytes, facts = _weights_read(target, once)
    return Sized(run, num_bytes + rows * (context + width) * target.token_bytes, rows * width, lambda: facts)


def _weights_read(target: CausalLM, step: Callable[[], None]) -> tuple[int, dict[str, Any]]:
    """Bytes of weights that a step reads, and for a mixture of experts how many of them the step's tokens read."""
    reads = count_reads(target.model, step)
    if reads is None:
        return target.step_bytes, {"experts_read": None, "num_experts": None}
    facts = {"experts_read": reads.num_read, "num_experts": reads.num_experts}
    return target.step_bytes - reads.bytes_stored + reads.bytes_read, facts


def _head_step(head: EagleHead, target: CausalLM, rows: int) -> Sized:
    """Draft one token in each row: the head's layer over the context, and its logits."""
    cache = head.allocate(rows, CONTEXT + 1)
    features = torch.zeros(rows, 1, target.config.hidden_size, dtype=target.dtype, device=target.device)
    tokens = torch.ones(rows, 1, dtype=torch.int64, device=target.device)

    @torch.inference_mode()
    def run() -> None:
        cache.num_cached[:] = [CONTEXT] * rows
        head.logits(head(features, tokens, cache))
        synchronize(target.device)

    token_bytes = target.token_bytes // target.num_layers  # a head's layer has its target's dimensions
    return Sized(run, head.step_bytes + rows * (CONTEXT + 1) * token_bytes, rows)


def _tree_step(head: EagleHead, target: CausalLM, num_nodes: int) -> Sized:
    """Draft the best tree with num_nodes nodes level by level with the head, and score it in one call.

    expected_tokens: per step, from the draft's measured acceptance rates. depth: number of levels of the tree.
    """
    rates = head.rates or USUAL_RATES
    tree = optimal_tree(rates.acceptance, num_nodes, rates.level_cost)
    own, cache = (model.allocate(1, CONTEXT + len(tree) + 1) for model in (head, target))
    features = torch.zeros(1, 1, target.config.hidden_size, dtype=target.dtype, device=target.device)
    tokens = torch.ones(1, len(tree) + 1, dtype=torch.int64, device=target.device)

    @torch.inference_mode()
    def run() -> None:
        own.num_cached[0] = cache.num_cached[0] = CONTEXT
        guessed = head(features, tokens[:, :1], own)
        own.num_cached[0] += 1
        for level in levels_of(tree, target.device):
            if level.number:
                fed = tokens[:, : len(level.counts)]
                guessed = head(guessed[:, level.above], fed, own, branches=level.branches)
            head.logits(guessed)
        target.forward(tokens, cache, branches=Branches.after_root(tree.parents))
        synchronize(target.device)

    num_bytes = target.step_bytes + tree.depth * head.step_bytes + CONTEXT * target.token_bytes
    expected = 1 + expected_accepted(tree, rates.acceptance)
    return Sized(run, num_bytes, len(tree) + 1, lambda: {"depth": tree.depth, "expected_tokens": expected})


def _sampling(target: CausalLM, vocab_size: int) -> Sized:
    """Compute the distributions of five positions at temperature 1 from logits, and draw from each."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, WIDTH, vocab_size, generator=generator).to(target.device, target.dtype)
    uniforms = torch.rand(1, WIDTH, dtype=torch.float64, generator=generator).to(target.device)
    state = SamplingState([SamplingParams()], [()], [()], vocab_size, target.device)

    def run() -> None:
        state.distribution(logits)[0].draw(uniforms)
        synchronize(target.device)

    return Sized(run, None, WIDTH)


def _copying(make: Callable[[], Callable[[list[int]], object]], num_tokens: int) -> Sized:
    """Copy a few tokens from a text that grows as in decoding. make: creates a copier, given the text so far."""
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
