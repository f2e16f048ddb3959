"""Builds the parts of an engine: proposer, verification rule, tree and adaptive draft length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from specdec.decoding import Decoder
from specdec.drafts import MODELS, Kind, can_be_recorded, check_draft, is_head, kind_of
from specdec.forced import ForcedDecoder, as_pattern
from specdec.lossy import is_lossy, lossy_rule
from specdec.methods import DRAFT_SAMPLING_NAMES, METHODS, VERIFICATION_NAMES, Builder, MethodSpec, Parts, method_spec
from specdec.models.base import LanguageModel, LayeredModel
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts, sample_tokens, target_costs
from specdec.proposers.adaptive import AdaptiveLength
from specdec.requests import Request
from specdec.runtime.checks import require, require_choice, require_integer
from specdec.runtime.progress import doing
from specdec.runtime.recording import Recorder
from specdec.sampling_params import SamplingParams
from specdec.synthetic import SyntheticAcceptance
from specdec.trees.optimal import USUAL_RATES, fastest_tree, optimal_tree
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_coupled_tree, verify_tree
from specdec.verification import VerificationRule, verify_block, verify_coupled, verify_tokens

if TYPE_CHECKING:
    from specdec.drafts import AnyDraft
    from specdec.heads.base import Head

VERIFICATIONS: dict[str, VerificationRule] = dict(
    zip(VERIFICATION_NAMES, (verify_tokens, verify_block, verify_coupled), strict=True)
)
TREE_VERIFICATIONS: dict[str, VerificationRule] = {"token": verify_tree, "coupled": verify_coupled_tree}
_EXAMPLES = {"method": "ngram", "verification": "token"}
_TREE_WIDTHS = (1, 2, 3, 5, 7, 9, 12, 13, 16, 20, 24, 25, 32, 36, 48)  # step widths that "auto" measures


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The arguments of `Engine` besides its models. Raises ValueError for values that are invalid for every model."""

    method: str = "autoregressive"
    num_speculative_tokens: int | Literal["auto"] = 4
    max_batch_size: int = 1
    verification: str = "token"
    synthetic_acceptance_rates: Sequence[float] | None = None
    records: bool | None = None
    max_history_bytes: int | None = None
    exit_layer: int | None = None
    tree: Tree | None = None
    draft_sampling: str = "probabilistic"
    forced_acceptance: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("method", "verification"):
            value = getattr(self, name)
            require(isinstance(value, str), f"{name}={value!r} must be a name, such as {_EXAMPLES[name]!r}")
        method_spec(self.method)
        if is_lossy(self.verification):
            lossy_rule(self.verification)
        else:
            require_choice("verification", self.verification, VERIFICATIONS)
        require_choice("draft_sampling", self.draft_sampling, DRAFT_SAMPLING_NAMES)
        require_integer("max_batch_size", self.max_batch_size, 1)
        require(self.records in (None, True, False), f"records={self.records!r} must be True, False or None")
        if self.synthetic_acceptance_rates is not None:
            SyntheticAcceptance.of(self.synthetic_acceptance_rates)
        self._check_method_options()
        self._check_length()
        if self.forced_acceptance is not None:
            self._check_forced(self.forced_acceptance)
        if self.spec.drafts_trees:
            self._check_tree()

    @property
    def spec(self) -> MethodSpec:
        """The method's entry in the registry."""
        return method_spec(self.method)

    @property
    def history_bytes(self) -> int:
        """Memory for the text of finished requests."""
        return (self.spec.history_bytes or 0) if self.max_history_bytes is None else self.max_history_bytes

    @property
    def is_adaptive(self) -> bool:
        """Whether drafts end as soon as another token is not worth its cost."""
        return self.num_speculative_tokens == "auto" and self.spec.is_adaptive

    @property
    def has_own_seeds(self) -> bool:
        """Whether each request gets its own seed, because outputs of earlier requests reveal their uniforms."""
        is_coupled = self.verification == "coupled" or self.forced_acceptance is not None
        return (self.history_bytes > 0 or self.is_adaptive) and not is_coupled

    @property
    def accepts_blindly(self) -> str | None:
        """The option that accepts draft tokens whatever they are, so that the output is not the target's; else None."""
        names = ("synthetic_acceptance_rates", "forced_acceptance")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def lossy(self) -> str | None:
        """What keeps the output from following the target's distribution; None if it does."""
        return self.accepts_blindly or (str(lossy_rule(self.verification)) if is_lossy(self.verification) else None)

    def check_draft_kind(self, kind: Kind | None) -> None:
        """Raise ValueError unless the method uses a draft of this kind (None for no draft)."""
        needed = self.spec.draft_kinds
        require(
            kind is not None or not needed,
            f'method="{self.method}" needs a draft ({" or ".join(needed)}); name one, or use "ngram"',
        )
        require(
            kind is None or kind in needed,
            f"draft: method={self.method!r} does not use a {kind}; omit it, or use "
            f"method={' or '.join(repr(spec.name) for spec in METHODS.values() if kind in spec.draft_kinds)}",
        )

    def _check_method_options(self) -> None:
        if self.max_history_bytes is not None:
            require_integer("max_history_bytes", self.max_history_bytes, 0, "; 0 disables the history")
            self._check_used("max_history_bytes", lambda spec: spec.history_bytes is not None)
        if self.exit_layer is not None:
            require_integer("exit_layer", self.exit_layer, 1)
            self._check_used("exit_layer", lambda spec: spec.exits_early)
        require(
            self.draft_sampling == "probabilistic" or self.spec.draw is not None,
            f"draft_sampling={self.draft_sampling!r} must be left out with method={self.method!r}, which samples no "
            "drafts from a model",
        )
        require(
            self.tree is None or self.spec.drafts_trees,
            f'tree: method={self.method!r} does not draft trees; omit it, or use method="tree"',
        )

    def _check_used(self, option: str, uses: Callable[[MethodSpec], bool]) -> None:
        require(
            uses(self.spec),
            f"{option}={getattr(self, option)} must be left out with method={self.method!r}; use "
            f"method={' or '.join(repr(spec.name) for spec in METHODS.values() if uses(spec))}",
        )

    def _check_length(self) -> None:
        length: Any = self.num_speculative_tokens
        is_number = isinstance(length, int) and not isinstance(length, bool)
        require(
            self.spec.build is None or length == "auto" or (is_number and length > 0),
            f'num_speculative_tokens={length!r} must be at least 1, or "auto"; for plain decoding use '
            'method="autoregressive"',
        )
        require(
            self.spec.build is None or length != "auto" or self.spec.is_adaptive or self.spec.drafts_trees,
            f'num_speculative_tokens="auto" needs a method that can end drafts early, which {self.method!r} cannot; '
            "give a number",
        )

    def _check_forced(self, forced: str | Sequence[int]) -> None:
        as_pattern(forced)
        others = {
            "synthetic_acceptance_rates": self.synthetic_acceptance_rates is not None,
            "records": bool(self.records),
            f"verification={self.verification!r}": self.verification != "token",
        }
        for name, is_given in others.items():
            require(not is_given, f"{name} must be omitted with forced_acceptance, which verifies nothing")

    def _check_tree(self) -> None:
        require(
            self.verification in TREE_VERIFICATIONS,
            f'verification={self.verification!r} must be {" or ".join(TREE_VERIFICATIONS)} with method="{self.method}"',
        )
        require(
            self.accepts_blindly is None,
            f'{self.accepts_blindly} must be omitted with method="{self.method}": it applies only to chains',
        )


def assemble(target: LanguageModel, draft: AnyDraft | None, options: EngineOptions) -> tuple[Decoder, Tree | None]:
    """A decoder for the target, and the tree of its drafts if they are trees.

    Raises ValueError if the method does not use such a draft, or if it cannot propose tokens for the target.
    """
    spec = options.spec
    options.check_draft_kind(None if draft is None else kind_of(draft))
    shared = None if draft is None else check_draft(target, draft)
    recordable = None if can_be_recorded(target, draft) else False
    require(
        not options.records or recordable is None,
        "records=True must be left out: target and draft must be on one device, and their rotary embeddings must not "
        "depend on the sequence length (dynamic or longrope)",
    )
    source = _first_layers(target, options) if spec.exits_early else draft
    parts = Parts(target, source, shared, history_bytes=options.history_bytes)
    timing = Timing(parts, spec.draw, options.max_batch_size, recordable)
    tree = _tree(timing, options) if spec.drafts_trees else None
    adaptive = adaptive_length(timing) if options.is_adaptive else None
    num_tokens = _num_speculative_tokens(options, tree, _max_tokens(draft))
    for model in (target, draft) if draft is not None and kind_of(draft) in MODELS else (target,):
        _check_rollback(cast("LanguageModel", model), num_tokens)
    make: Callable[..., Decoder] = Decoder
    if options.forced_acceptance is not None:
        make, recordable = partial(ForcedDecoder, pattern=as_pattern(options.forced_acceptance)), False
    decoder = make(
        target,
        spec.build(replace(parts, adaptive=adaptive, tree=tree)) if spec.build else None,
        num_tokens,
        max_batch_size=options.max_batch_size,
        rule=_rule(options),
        adaptive=adaptive,
        records=recordable if options.records is None else options.records,
        greedy_drafts=options.draft_sampling == "greedy",
    )
    return decoder, tree


def _first_layers(target: LanguageModel, options: EngineOptions) -> LanguageModel:
    if not isinstance(target, LayeredModel):
        raise ValueError(
            f'target={type(target).__name__} must have first_layers for method="{options.method}", as CausalLM has; '
            'use another method, such as "ngram"'
        )
    return target.first_layers(options.exit_layer or max(1, target.num_layers // 4))


def _num_speculative_tokens(options: EngineOptions, tree: Tree | None, max_tokens: int | None) -> int:
    """max_tokens: the most that the draft can propose, None for any number. Raises ValueError if more are asked for."""
    if options.spec.build is None:
        return 0
    if tree:
        return len(tree)
    if options.num_speculative_tokens == "auto":
        return min(MAX_DRAFT_LENGTH, max_tokens or MAX_DRAFT_LENGTH)
    require(
        max_tokens is None or options.num_speculative_tokens <= max_tokens or options.spec.history_bytes is not None,
        f"num_speculative_tokens={options.num_speculative_tokens} must be at most {max_tokens}, the draft positions of "
        "this head; use fewer",
    )
    return options.num_speculative_tokens


def _check_rollback(model: LanguageModel, num_tokens: int) -> None:
    limit = model.max_draft_tokens
    require(
        limit is None or num_tokens <= limit,
        f"num_speculative_tokens={num_tokens}, for a tree its nodes, must be at most {limit}: more could not be taken "
        f"back in the layers of {type(model).__name__} with a sliding window; use fewer",
    )


def _max_tokens(draft: AnyDraft | None) -> int | None:
    """The most tokens that a draft can propose in a step, None for any number."""
    return cast("Head", draft).max_tokens if draft is not None and is_head(kind_of(draft)) else None


def _rule(options: EngineOptions) -> VerificationRule:
    if options.synthetic_acceptance_rates is not None:
        return SyntheticAcceptance.of(options.synthetic_acceptance_rates)
    if is_lossy(options.verification):
        return lossy_rule(options.verification)
    return (TREE_VERIFICATIONS if options.spec.drafts_trees else VERIFICATIONS)[options.verification]


# ---- measured costs of a step


@dataclass(frozen=True, slots=True)
class Timing:
    """A configuration to time. draw: builds the proposer if a model drafts, else None. records: as for `Recorder`."""

    parts: Parts
    draw: Builder | None
    num_rows: int
    records: bool | None


def adaptive_length(timing: Timing) -> AdaptiveLength:
    """Adaptive draft lengths with costs measured for 1, 2, 4, ... rows; recorded steps always have all rows."""
    max_rows, fewer = timing.num_rows, list[int]()
    if not Recorder(timing.parts.target.device, timing.records).records:
        fewer = [1 << i for i in range((max_rows - 1).bit_length())]
    with doing("measuring costs"):
        return AdaptiveLength({rows: step_costs(replace(timing, num_rows=rows)) for rows in [*fewer, max_rows]})


def step_costs(timing: Timing) -> StepCosts:
    """Measured costs of a step; without a draft model, drafting is free."""
    costs_s = target_costs(timing.parts.target, timing.num_rows, timing.records)
    if timing.draw is None:
        return StepCosts(costs_s, 0.0)
    longest = min(MAX_DRAFT_LENGTH, _max_tokens(timing.parts.draft) or MAX_DRAFT_LENGTH)
    one_s, most_s = (draft_cost(timing, length) for length in (1, longest))
    draft_s = max(0.0, (longest * most_s - one_s) / max(1, longest - 1))
    return StepCosts(costs_s, draft_s, max(0.0, one_s - draft_s))


def draft_cost(timing: Timing, length: int = MAX_DRAFT_LENGTH) -> float:
    """Seconds per draft token and row for drafts of this length, the minimum of a few measurements."""
    assert timing.draw, "a model drafts"
    length = min(length, _max_tokens(timing.parts.draft) or length)
    decoder = Decoder(
        timing.parts.target,
        timing.draw(timing.parts),
        length,
        max_batch_size=timing.num_rows,
        records=timing.records,
    )
    sampling = SamplingParams(temperature=0, max_tokens=2 * length + 2)
    prompts = sample_tokens(timing.parts.target, timing.num_rows, 2)
    requests = [Request(index, tuple(prompt), sampling) for index, prompt in enumerate(prompts)]
    seconds = []
    for _ in range(5):
        num_drafted = sum(step.num_drafted for row in decoder.run(requests) for step in row.steps)
        seconds.append(decoder.times.draft_s * timing.num_rows / num_drafted)
    return min(seconds[2:])  # the first runs warm up


# ---- the shape of a tree


def _tree(timing: Timing, options: EngineOptions) -> Tree:
    """The requested tree, else the best one. Raises ValueError if the models cannot score or draw it."""
    target, draft = timing.parts.target, timing.parts.draft
    target.check_tree()
    if kind_of(draft) in MODELS:
        cast("LanguageModel", draft).check_tree()
    tree = options.tree or _best_tree(timing, options.num_speculative_tokens)
    num_tokens = _num_draftable(draft)
    require(
        max(tree.ranks) < num_tokens,
        f"a tree with {max(tree.ranks) + 1} siblings must have at most {num_tokens}, the draft's vocabulary; use a "
        "narrower tree",
    )
    return tree


def _best_tree(timing: Timing, num_nodes: int | Literal["auto"]) -> Tree:
    """The best tree of a size by the draft's measured acceptance rates; "auto" also chooses the size, by step costs."""
    draft: Any = timing.parts.draft
    rates = (draft.rates if is_head(kind_of(draft)) else None) or USUAL_RATES
    acceptance = [level[: _num_draftable(draft)] for level in rates.acceptance]
    if num_nodes != "auto":
        return optimal_tree(acceptance, num_nodes, rates.level_cost)
    tree = fastest_tree(acceptance, *_tree_costs(timing))
    return tree or Tree.chain(1)  # this method always drafts


def tree_costs(target: LanguageModel, draft: AnyDraft, num_rows: int = 1) -> tuple[list[float], float]:
    """Measured seconds of a target step with 1, 2, ... tokens in each of num_rows rows, and of drawing one level."""
    parts = Parts(target, draft, check_draft(target, draft))
    records = None if can_be_recorded(target, draft) else False
    return _tree_costs(Timing(parts, METHODS["tree"].draw, num_rows, records))


def _tree_costs(timing: Timing) -> tuple[list[float], float]:
    target = timing.parts.target
    widths = [width for width in _TREE_WIDTHS if width < target.context_length]
    with doing("measuring costs"):
        costs_s = target_costs(target, timing.num_rows, timing.records, widths)
        step_s = np.interp(range(1, max(widths) + 1), widths, costs_s).tolist()
        return step_s, draft_cost(timing)


def _num_draftable(draft: Any) -> int:
    """Number of different tokens that a draft can propose."""
    return len(cast("Head", draft).draft_vocabulary) if is_head(kind_of(draft)) else int(draft.vocab_size)
