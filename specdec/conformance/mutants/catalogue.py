"""The list of planted bugs: each one shipped in a real engine."""

from __future__ import annotations

from functools import partial

from specdec.conformance.mutants.loops import (
    ConstantLogprobs,
    CountsAfterTheEnd,
    DraftLogprobs,
    ForgetsRollback,
    IgnoredStop,
    OverlongDraft,
    ParametersOnBonusOnly,
    PenaltiesOncePerStep,
    ReusedProposalNoise,
    SoftGreedy,
    TopKOnOneSide,
)
from specdec.conformance.mutants.planting import Plant, maker, with_rule
from specdec.conformance.mutants.proposals import (
    DrawnInLowPrecision,
    GreedyDraftDeclaredSampled,
    NeverProposes,
    PeekingLength,
    SampledDraftDeclaredOneHot,
    prompt_lookup,
)
from specdec.conformance.mutants.rules import (
    accept_always,
    accept_at_equality,
    accept_padding,
    argmax_for_draw,
    block_by_weight,
    block_with_token_residual,
    recover_from_target,
    reuse_accept_uniform,
    share_draft_stream,
    wrong_accept_row,
    wrong_bonus_row,
)

MUTANTS: dict[str, Plant] = {
    "M1 greedy draft declared as sampled": partial(maker, break_proposer=GreedyDraftDeclaredSampled),
    "M2 recover from the target": partial(maker, break_rule=with_rule(recover_from_target)),
    "M3 accept always": partial(maker, break_rule=with_rule(accept_always)),
    "M4 accept uniform reused": partial(maker, break_rule=with_rule(reuse_accept_uniform)),
    "M4 draft stream shared": partial(maker, break_uniforms=share_draft_stream),
    "M5 accept at equality": partial(maker, break_rule=with_rule(accept_at_equality)),
    "M6 argmax for a draw": partial(maker, break_rule=with_rule(argmax_for_draw)),
    "M7 wrong accept row": partial(maker, break_rule=with_rule(wrong_accept_row)),
    "M7 wrong bonus row": partial(maker, break_rule=with_rule(wrong_bonus_row)),
    "M8 top-k on one side": partial(maker, decoder=TopKOnOneSide),
    "M9 no rollback": partial(maker, break_target=ForgetsRollback, records=False),
    "M10 stop token ignored": partial(maker, decoder=IgnoredStop),
    "M10 max_tokens ignored": partial(maker, decoder=OverlongDraft),
    "M11 soft greedy": partial(maker, decoder=SoftGreedy),
    "M12 token residual under block": partial(maker, break_rule=with_rule(block_with_token_residual)),
    "M13 speculation silently off": partial(maker, break_proposer=NeverProposes),
    "M14 proposal noise reused": partial(maker, decoder=ReusedProposalNoise),
    "M15 draft drawn in low precision": partial(maker, break_proposer=DrawnInLowPrecision),
    "M16 penalties once per step": partial(maker, decoder=PenaltiesOncePerStep),
    "M17 min-p and bias on the bonus only": partial(maker, decoder=ParametersOnBonusOnly),
    "M18 block by weight, one-hot drafts": partial(
        maker, break_proposer=SampledDraftDeclaredOneHot, break_rule=with_rule(block_by_weight)
    ),
    "M19 padding accepted": partial(maker, proposer=prompt_lookup, break_rule=with_rule(accept_padding)),
    "M20 draft length peeks": partial(maker, break_proposer=PeekingLength),
}

REPORT_MUTANTS: dict[str, Plant] = {  # outputs are right, what is reported about them is not
    "M21 counts after the end": partial(maker, decoder=CountsAfterTheEnd),
    "M22 constant log-probability": partial(maker, decoder=ConstantLogprobs),
    "M22 log-probability of the draft": partial(maker, decoder=DraftLogprobs),
}
