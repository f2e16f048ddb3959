"""Lossy verification: rules of the field that accept more draft tokens than the target's distribution allows.

NONE OF THESE RULES IS LOSSLESS. They are here to measure what they cost (`python -m bench.tools.lossy_modes`): how far
the output distribution moves, per token, for how much speed. An engine uses one only if its name is given, as in
`verification="lossy:typical"`; everything that vouches for a distribution refuses them.

At temperature 0 the target's distribution is one-hot, and each rule accepts what the target would choose. (FLy and
TensorRT-LLM relax greedy decoding as well, by the logits, which a rule does not see here.)

Each rule only decides how many draft tokens are accepted. The token after them is drawn as by `verify_tokens`, from the
residual after a rejection and from the target after full acceptance, except where the source draws it otherwise:
    typical: a draft token is accepted if the target gives it more than min(epsilon, delta * exp(-entropy)); the next
        token is the target's own. Medusa, Cai et al. 2024 (arXiv:2401.10774), section 2.3.1; epsilon 0.3 and delta 0.09
        are the defaults of its code (`posterior_threshold`, `posterior_alpha`).
    threshold: a draft token is accepted if the target gives it at least `single`, or else with probability
        min(1, target / acc); the recovered token is drawn from the target without the rejected one. SGLang's
        `--speculative-accept-threshold-single` and `-acc`, for chains; it ignores the draft's probabilities.
        With both at 1 it is lossless, though it accepts less than `verify_tokens`.
    top_k: a draft token is accepted if it is among the target's k most probable ones and its log-probability is at most
        delta below the largest; the next token is the target's most probable one there and here drawn from it.
        TensorRT-LLM's `relaxed_topk` and `relaxed_delta`, which it applies while a model thinks.
    fly: a rejection by `verify_tokens` is overruled if the target is uncertain (the entropy of its three largest
        probabilities is at least `entropy`), gives the token any probability, and would accept the `window` draft
        tokens after it. FLy, arXiv:2511.22972, as vLLM's `rejection_sample_method="fly"` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.runtime.checks import require, require_choice
from specdec.sampling.distributions import Dense, Distribution
from specdec.verification import Draft, Verification, draw_final

PREFIX = "lossy:"


@dataclass(frozen=True, slots=True)
class _LossyRule:
    """A verification rule that is not lossless. Raises ValueError for parameters out of range."""

    needs_noise: ClassVar[bool] = False
    always_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for each in fields(self):
            low, high = each.metadata["range"]
            value = getattr(self, each.name)
            require(low <= value <= high, f"{each.name}={value} of {self} must lie between {low} and {high}")

    def __call__(
        self, target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
    ) -> Verification:
        """Same arguments as `verify_tokens`."""
        num_drafted = draft.tokens.shape[1]
        if num_drafted == 0:
            return draw_final(target, draft, draft.num_proposed, final_uniforms)
        proposed = torch.arange(num_drafted, device=draft.tokens.device) < draft.num_proposed.unsqueeze(1)
        passed = self.passed(Dense(target.dense()[:, :num_drafted]), draft, accept_uniforms, proposed) & proposed
        accepted = passed.long().cumprod(1).sum(1)
        return self.finish(target, draft, accepted, final_uniforms)

    def passed(self, target: Dense, draft: Draft, accept_uniforms: Tensor, proposed: Tensor) -> Tensor:
        """Whether each draft token may be accepted, bool [batch, k]. target: [batch, k]. proposed: bool [batch, k]."""
        raise NotImplementedError

    def finish(self, target: Distribution, draft: Draft, accepted: Tensor, final_uniforms: Tensor) -> Verification:
        """Draw the token after the accepted ones: from the target's own distribution."""
        uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
        return Verification(accepted, target.at(accepted).draw(uniform))

    def __str__(self) -> str:
        """The rule as the argument `verification` takes it: "lossy:typical(epsilon=0.3, delta=0.09)"."""
        name = next(name for name, rule in LOSSY_RULES.items() if rule is type(self))
        return f"{PREFIX}{name}({', '.join(f'{each.name}={getattr(self, each.name):g}' for each in fields(self))})"


def _in(low: float, high: float, default: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True, slots=True)
class Typical(_LossyRule):
    """Medusa's typical acceptance. At temperature 0 it accepts what the target would choose, as every rule does."""

    epsilon: float = _in(0, 1, 0.3)
    delta: float = _in(0, 1, 0.09)

    def passed(self, target: Dense, draft: Draft, accept_uniforms: Tensor, proposed: Tensor) -> Tensor:
        entropy = torch.special.entr(target.probs.double()).sum(-1)
        return target.prob(draft.tokens) > torch.minimum(self.delta * (-entropy).exp(), torch.tensor(self.epsilon))


@dataclass(frozen=True, slots=True)
class Threshold(_LossyRule):
    """SGLang's accept thresholds."""

    single: float = _in(1e-9, 1, 0.5)
    acc: float = _in(1e-9, 1, 1.0)

    def passed(self, target: Dense, draft: Draft, accept_uniforms: Tensor, proposed: Tensor) -> Tensor:
        prob = target.prob(draft.tokens)
        return (prob >= self.single) | (accept_uniforms * self.acc < prob)

    def finish(self, target: Distribution, draft: Draft, accepted: Tensor, final_uniforms: Tensor) -> Verification:
        certain = Draft.deterministic(draft.tokens, draft.num_proposed, target.vocab_size)
        return draw_final(target, certain, accepted, final_uniforms)


@dataclass(frozen=True, slots=True)
class TopK(_LossyRule):
    """TensorRT-LLM's relaxed acceptance, at every token and not only while a model thinks."""

    k: int = _in(1, 1 << 30, 10)
    delta: float = _in(0, float("inf"), 0.6)

    def passed(self, target: Dense, draft: Draft, accept_uniforms: Tensor, proposed: Tensor) -> Tensor:
        prob = target.prob(draft.tokens)
        highest = target.probs.topk(min(self.k, target.vocab_size), -1).values.double()
        return (prob >= highest[..., -1]) & (prob.log() >= highest[..., 0].log() - self.delta) & (prob > 0)


@dataclass(frozen=True, slots=True)
class Fly(_LossyRule):
    """FLy: a rejection is deferred where the target is uncertain and agrees with what follows."""

    window: int = _in(1, 1 << 30, 2)
    entropy: float = _in(0, float("inf"), 0.3)
    top_k: int = _in(1, 1 << 30, 3)

    def passed(self, target: Dense, draft: Draft, accept_uniforms: Tensor, proposed: Tensor) -> Tensor:
        prob = target.prob(draft.tokens)
        natively = (accept_uniforms * draft.distribution.prob(draft.tokens) < prob) & proposed
        largest = target.probs.double().topk(min(self.top_k, target.vocab_size), -1).values
        is_uncertain = torch.special.entr(largest).sum(-1) >= self.entropy
        # padded with False: a window that reaches past the draft defers nothing
        after = torch.nn.functional.pad(natively[:, 1:], (0, self.window)).unfold(1, self.window, 1).all(-1)
        deferred: Tensor = is_uncertain & (prob > 0) & after[:, : natively.shape[1]]
        return natively | deferred

    def finish(self, target: Distribution, draft: Draft, accepted: Tensor, final_uniforms: Tensor) -> Verification:
        return draw_final(target, draft, accepted, final_uniforms)


LOSSY_RULES: dict[str, Callable[..., _LossyRule]] = {
    "typical": Typical,
    "threshold": Threshold,
    "top_k": TopK,
    "fly": Fly,
}


def is_lossy(verification: str) -> bool:
    """Whether the name of a verification rule is that of a lossy one."""
    return verification.startswith(PREFIX)


def lossy_rule(verification: str) -> _LossyRule:
    """The rule of a name such as "lossy:typical" or "lossy:typical(epsilon=0.3, delta=0.09)".

    Raises ValueError for a name or parameter that is unknown, or a value out of range.
    """
    name, _, given = verification.removeprefix(PREFIX).partition("(")
    require_choice("verification", PREFIX + name, {PREFIX + each: None for each in LOSSY_RULES})
    rule = LOSSY_RULES[name]()
    known = {each.name: type(getattr(rule, each.name)) for each in fields(rule)}
    values = {}
    for part in filter(None, given.removesuffix(")").split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        require(
            key in known, f"verification={verification!r} must name parameters among {', '.join(known)}, not {key!r}"
        )
        try:
            values[key] = known[key](value)
        except ValueError:
            raise ValueError(
                f"verification={verification!r} must give {key} as {known[key].__name__}, not {value!r}"
            ) from None
    return replace(rule, **values)
