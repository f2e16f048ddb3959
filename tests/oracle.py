"""The exact output law of the real decode loop, by feeding it every uniform of a grid.

If all thresholds of a pair of models are multiples of 1/N, then the loop's output over the midpoints (i + 1/2)/N of
every uniform *is* its law. One step needs gamma draft uniforms, gamma accept uniforms and one for the last token; a
whole run would need the product over its steps. But the loop is deterministic given its uniforms, and what it
remembers of a step is only what was drafted, accepted and drawn. So the tree of such histories is walked: each node
fixes one assignment that leads to it, and runs the loop, from the prompt on, over the full grid of the next step.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.decoding import Decoder
from specdec.randomness import Role, UniformSource
from specdec.requests import Generation, Request
from specdec.sampling import Law, SamplingParams
from specdec.verification import Draft, Verification, VerificationRule, verify_tokens


@dataclass(frozen=True)
class StepUniforms:
    """The uniforms of one step: by draft position, by draft position, and for whichever token comes last."""

    draft: tuple[float, ...]
    accept: tuple[float, ...]
    last: float


class ScriptedUniforms:
    """A uniform source that reads from scripts: row seed -> the step beginning at an origin -> its uniforms."""

    def __init__(self, scripts: list[dict[int, StepUniforms]]) -> None:
        self.scripts = scripts

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        seeds, roles, origins = (x.expand(positions.shape).tolist() for x in (seeds, roles, origins))
        return torch.tensor(
            [
                [self._one(*key) for key in zip(*row, strict=True)]
                for row in zip(seeds, positions.tolist(), roles, origins, strict=True)
            ],
            dtype=torch.float64,
        )

    def _one(self, seed: int, position: int, role: int, origin: int) -> float:
        step = self.scripts[seed].get(origin)
        if step is None:  # a step after the one that is being enumerated
            return 0.5
        if role == Role.DRAFT:
            return step.draft[position - origin]
        if role == Role.ACCEPT:
            return step.accept[position - origin]
        return step.last


MakeDecoder = Callable[[UniformSource, VerificationRule, int], Decoder]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A history of the loop: a script that leads to it, the tokens emitted by then, its probability."""

    script: dict[int, StepUniforms]
    tokens: Tokens
    probability: float


def exact_law(
    make_decoder: MakeDecoder,
    prompt: Tokens,
    num_tokens: int,
    grid: tuple[int, int, int],
    params: SamplingParams | None = None,
) -> dict[Tokens, float]:
    """Law of the first num_tokens tokens that the decoder emits: {tokens: probability}.

    make_decoder: (uniforms, rule, max_batch_size) -> a fresh decoder. grid: points for draft, accept and last uniforms.
    """
    runs = _Runs(make_decoder, prompt, replace(params or SamplingParams(), max_tokens=num_tokens))
    law: dict[Tokens, float] = defaultdict(float)
    nodes = [Node({}, (), 1.0)]
    while nodes:
        children = [child for node in nodes for child in _expand(runs, node, grid)]
        for child in children:
            if len(child.tokens) == num_tokens:
                law[child.tokens] += child.probability
        nodes = [child for child in children if len(child.tokens) < num_tokens]
    return dict(law)


def _expand(runs: _Runs, node: Node, grid: tuple[int, int, int]) -> list[Node]:
    """The outcomes of the step after a node, as frequent as they are in the grid of its uniforms."""
    origin, number = len(runs.prompt) + len(node.tokens), len(node.script)
    num_drafted = runs.gamma if number else 0  # the first token comes from the prefill
    scripts = [node.script | {origin: uniforms} for uniforms in _grid(grid, num_drafted)]
    outcomes = runs.step(scripts, number)
    counts, scripts_to = Counter(outcomes), dict(zip(outcomes, scripts, strict=True))
    return [
        Node(scripts_to[outcome], outcome.tokens, node.probability * count / len(scripts))
        for outcome, count in counts.items()
    ]


def _grid(grid: tuple[int, int, int], num_drafted: int) -> Iterator[StepUniforms]:
    drafts, accepts, lasts = ([(i + 0.5) / n for i in range(n)] for n in grid)
    for draft in itertools.product(drafts, repeat=num_drafted):
        for accept in itertools.product(accepts, repeat=num_drafted):
            for last in lasts:
                yield StepUniforms(draft, accept, last)


@dataclass(frozen=True)
class _Outcome:
    """All tokens emitted up to a step, and what the step drafted."""

    tokens: Tokens
    drafted: Tokens


class _Runs:
    """Runs the real loop, from the prompt on, once for each script."""

    def __init__(self, make_decoder: MakeDecoder, prompt: Tokens, params: SamplingParams) -> None:
        self.make_decoder, self.prompt, self.params = make_decoder, prompt, params
        self.gamma = make_decoder(ScriptedUniforms([]), verify_tokens, 1).num_speculative_tokens

    def step(self, scripts: list[dict[int, StepUniforms]], number: int) -> list[_Outcome]:
        """What became of step `number`, the prefill being step 0, in the run of each script."""
        drafts: list[Tensor] = []

        def recording(target: Law, draft: Draft, accept: Tensor, final: Tensor) -> Verification:
            drafts.append(draft.tokens.clone())  # a recorded step's place is used again
            return verify_tokens(target, draft, accept, final)

        decoder = self.make_decoder(ScriptedUniforms(scripts), recording, len(scripts))
        requests = [Request(seed, self.prompt, replace(self.params, seed=seed)) for seed in range(len(scripts))]
        rows = sorted(decoder.run(requests), key=lambda row: row.request.index)
        if number == 0:
            return [_Outcome(tuple(row.output[:1]), ()) for row in rows]
        drafted = drafts[len(scripts) + number - 1]  # one call for each prefill, then one for each step of the batch
        return [_outcome(row, number, drafted[index].tolist()) for index, row in enumerate(rows)]


def _outcome(row: Generation, number: int, drafted: list[int]) -> _Outcome:
    num_emitted = 1 + sum(step.num_accepted + (step.last is not None) for step in row.steps[:number])
    return _Outcome(tuple(row.output[:num_emitted]), tuple(drafted[: row.steps[number - 1].num_drafted]))
