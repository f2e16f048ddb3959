"""Broken samplers, each a bug that a real engine shipped: the negative controls of every instrument.

A mutant is a decoder with one bug. `MUTANTS` has M1 to M20, some in two variants, and `REPORT_MUTANTS` those whose
outputs are right; `TREE_MUTANTS` has T1 to T4, the additional ones of token trees. They work with any target and any
sampling proposer, so they can be planted in a real engine. `WINDOW_MUTANTS` are for targets with a sliding window;
`STATE_MUTANTS`, S1 to S4, for those with recurrent layers, and `ROUTER_MUTANTS`, R1, for those with experts.
"""

from specdec.conformance.mutants.catalogue import MUTANTS as MUTANTS
from specdec.conformance.mutants.catalogue import REPORT_MUTANTS as REPORT_MUTANTS
from specdec.conformance.mutants.constraints import (
    ConstraintNotRolledBack as ConstraintNotRolledBack,
)
from specdec.conformance.mutants.constraints import (
    UnconstrainedDraft as UnconstrainedDraft,
)
from specdec.conformance.mutants.constraints import (
    UnconstrainedDraw as UnconstrainedDraw,
)
from specdec.conformance.mutants.constraints import (
    UnconstrainedTarget as UnconstrainedTarget,
)
from specdec.conformance.mutants.loops import (
    ForgetsRollback as ForgetsRollback,
)
from specdec.conformance.mutants.loops import (
    IgnoredStop as IgnoredStop,
)
from specdec.conformance.mutants.loops import (
    OverlongDraft as OverlongDraft,
)
from specdec.conformance.mutants.loops import (
    SoftGreedy as SoftGreedy,
)
from specdec.conformance.mutants.loops import (
    TopKOnOneSide as TopKOnOneSide,
)
from specdec.conformance.mutants.planting import Maker as Maker
from specdec.conformance.mutants.planting import Plant as Plant
from specdec.conformance.mutants.planting import maker as maker
from specdec.conformance.mutants.planting import with_rule as with_rule
from specdec.conformance.mutants.proposals import (
    GreedyDraftDeclaredSampled as GreedyDraftDeclaredSampled,
)
from specdec.conformance.mutants.proposals import (
    NeverProposes as NeverProposes,
)
from specdec.conformance.mutants.proposals import (
    SampledDraftDeclaredOneHot as SampledDraftDeclaredOneHot,
)
from specdec.conformance.mutants.proposals import (
    StaleDraftCache as StaleDraftCache,
)
from specdec.conformance.mutants.rules import (
    accept_always as accept_always,
)
from specdec.conformance.mutants.rules import (
    accept_at_equality as accept_at_equality,
)
from specdec.conformance.mutants.rules import (
    argmax_for_draw as argmax_for_draw,
)
from specdec.conformance.mutants.rules import (
    block_with_token_residual as block_with_token_residual,
)
from specdec.conformance.mutants.rules import (
    recover_from_target as recover_from_target,
)
from specdec.conformance.mutants.rules import (
    reuse_accept_uniform as reuse_accept_uniform,
)
from specdec.conformance.mutants.rules import (
    wrong_accept_row as wrong_accept_row,
)
from specdec.conformance.mutants.states import (
    BROKEN_WINDOWS as BROKEN_WINDOWS,
)
from specdec.conformance.mutants.states import (
    ROUTER_MUTANTS as ROUTER_MUTANTS,
)
from specdec.conformance.mutants.states import (
    STATE_MUTANTS as STATE_MUTANTS,
)
from specdec.conformance.mutants.states import (
    WINDOW_MUTANTS as WINDOW_MUTANTS,
)
from specdec.conformance.mutants.states import (
    StateOfPreviousToken as StateOfPreviousToken,
)
from specdec.conformance.mutants.states import (
    with_window as with_window,
)
from specdec.conformance.mutants.trees import TREE_MUTANTS as TREE_MUTANTS
from specdec.conformance.mutants.trees import tree_maker as tree_maker
