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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.decoding import Decoder
from specdec.randomness import Role, UniformSource
from specdec.requests import Request
from specdec.sampling import SamplingParams
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


def exact_law(
    make_decoder: MakeDecoder,
    prompt: tuple[int, ...],
    num_tokens: int,
    grid: tuple[int, int, int],
    rule: VerificationRule = verify_tokens,
    params: SamplingParams | None = None,
) -> dict[tuple[int, ...], float]:
    """Law of the first num_tokens tokens that the decoder emits: {tokens: probability}.

    make_decoder: (uniforms, rule, max_batch_size) -> a fresh decoder. grid: points for draft, accept and last uniforms.
    """
    law: dict[tuple[int, ...], float] = defaultdict(float)
    nodes = [({}, 1.0)]  # a script that leads to the node, and the node's probability
    while nodes:
        children = []
        gamma = make_decoder(ScriptedUniforms([]), rule, 1).num_speculative_tokens
        for script, probability in nodes:
            outcomes = _expand(make_decoder, prompt, num_tokens, grid, rule, params, script, gamma)
            total = sum(count for count, _ in outcomes.values())
            for (tokens, _), (count, child) in outcomes.items():
                if len(tokens) == num_tokens:
                    law[tokens] += probability * count / total
                else:
                    children.append((child, probability * count / total))
        nodes = children
    return dict(law)


def _expand(
    make_decoder: MakeDecoder,
    prompt: tuple[int, ...],
    num_tokens: int,
    grid: tuple[int, int, int],
    rule: VerificationRule,
    params: SamplingParams | None,
    script: dict[int, StepUniforms],
    gamma: int,
):
    """Outcomes of the step after the script: {(tokens so far, what was drafted): (grid points, a script to it)}."""
    num_steps = len(script)
    origin = len(prompt) + len(_run(make_decoder, prompt, num_tokens, rule, params, [script])[0][0][num_steps])
    num_drafted = gamma if num_steps else 0  # the first token comes from the prefill
    scripts = [script | {origin: uniforms} for uniforms in _grid(grid, num_drafted)]
    outcomes: dict[tuple, tuple[int, dict]] = {}
    counts: Counter = Counter()
    for child, (progress, drafted) in zip(
        scripts, _run(make_decoder, prompt, num_tokens, rule, params, scripts), strict=True
    ):
        key = (tuple(progress[num_steps + 1]), tuple(drafted[num_steps]))
        counts[key] += 1
        outcomes[key] = (counts[key], child)
    return outcomes


def _grid(grid: tuple[int, int, int], num_drafted: int):
    drafts, accepts, lasts = ([(i + 0.5) / n for i in range(n)] for n in grid)
    for draft in itertools.product(drafts, repeat=num_drafted):
        for accept in itertools.product(accepts, repeat=num_drafted):
            for last in lasts:
                yield StepUniforms(draft, accept, last)


def _run(
    make_decoder: MakeDecoder,
    prompt: tuple[int, ...],
    num_tokens: int,
    rule: VerificationRule,
    params: SamplingParams | None,
    scripts: list[dict[int, StepUniforms]],
):
    """For each script: the tokens emitted before each step, and the drafts of each step."""
    calls: list[Tensor] = []

    def recording(target, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
        calls.append(draft.tokens)
        return rule(target, draft, accept_uniforms, final_uniforms)

    base = params or SamplingParams()
    requests = [Request(i, prompt, _with(base, max_tokens=num_tokens, seed=i)) for i in range(len(scripts))]
    decoder = make_decoder(ScriptedUniforms(scripts), recording, len(scripts))
    rows = {row.request.index: row for row in decoder.run(requests)}
    step_calls = calls[len(scripts) :]  # one call for each prefill, then one for each step of the batch
    results = []
    for index in range(len(scripts)):
        row, emitted, progress, drafted = rows[index], 1, [[], rows[index].output[:1]], [()]
        for number, step in enumerate(row.steps):
            emitted += step.num_accepted + (step.last is not None)
            progress.append(row.output[:emitted])
            drafted.append(step_calls[number][index, : step.num_drafted].tolist())
        results.append((progress + [row.output] * num_tokens, drafted + [()] * num_tokens))
    return results


def _with(params: SamplingParams, **changes) -> SamplingParams:
    import dataclasses

    return dataclasses.replace(params, **changes)
