"""The token-by-token rule as a few kernels, for GPUs: what `specdec.verification` says, fused.

Each function returns None where no kernels run on the distributions; the caller then does it in torch operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from specdec import kernels
from specdec.sampling import Dense, Law, OneHot

if TYPE_CHECKING:
    from specdec.verification import Draft


def num_accepted(target: Law, draft: Draft, accept_uniforms: Tensor) -> Tensor | None:
    """How many leading tokens pass, int64 [batch], in one kernel; arguments as for `verify_tokens`, k > 0."""
    fast = _kernels(target, draft)
    if fast is None:
        return None
    forms = _form(target), _form(draft.law)
    accepted: Tensor = fast.num_accepted(*forms, draft.tokens, draft.lengths, accept_uniforms)
    return accepted


def last_token(
    target: Law, draft: Draft, accepted: Tensor, final_uniforms: Tensor, weight: Tensor | None = None
) -> Tensor | None:
    """The token after the accepted ones, int64 [batch], in two kernels; arguments as for `draw_last`.

    None, too, where nothing is left to chance or was drafted: then there is nothing to fuse.
    """
    fast = _kernels(target, draft) if isinstance(target, Dense) and draft.tokens.shape[1] else None
    if fast is None:
        return None
    token: Tensor = fast.last_token(target.dense(), _form(draft.law), accepted, draft.lengths, final_uniforms, weight)
    return token


def _kernels(target: Law, draft: Draft) -> Any:
    """The kernels, if they run on both sides' distributions."""
    probs = [form for law in (target, draft.law) for form in _form(law) if form is not None]
    found = [kernels.for_gpu(each) for each in probs]
    return found[0] if all(found) else None


def _form(law: Law) -> tuple[Tensor | None, Tensor | None]:
    """Probabilities and tokens, as `specdec.kernels.triton_sampling.num_accepted` takes them."""
    if isinstance(law, OneHot):
        return None, law.tokens
    if isinstance(law, Dense):
        return law.probs, None
    return law.inner.probs, law.tokens
