"""`verify_tokens` of `specdec.verification` as a few fused GPU kernels.

Each function returns None if the distributions are not on a GPU with kernels; the caller then uses torch operations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specdec.kernels import gpu
from specdec.sampling.distributions import Dense, Distribution, OneHot


def num_accepted(
    target: Distribution, draft: Distribution, tokens: Tensor, num_proposed: Tensor, accept_uniforms: Tensor
) -> Tensor | None:
    """Number of accepted draft tokens, int64 [batch], in one kernel.

    target: distributions [batch, k + 1], k > 0. draft: distributions [batch, k]. tokens, num_proposed: see `Draft`.
    accept_uniforms: see `specdec.verification.verify_tokens`.
    """
    fast = _kernels(target, draft)
    if fast is None:
        return None
    accepted: Tensor = fast.num_accepted(_form(target), _form(draft), tokens, num_proposed, accept_uniforms)
    return accepted


def final_token(
    target: Distribution,
    draft: Distribution,
    accepted: Tensor,
    num_proposed: Tensor,
    final_uniforms: Tensor,
    weight: Tensor | None = None,
) -> Tensor | None:
    """The recovered or bonus token, int64 [batch], in two kernels; see `specdec.verification.draw_final`.

    None also for greedy targets and empty drafts, where there is nothing to fuse.
    """
    fast = _kernels(target, draft) if isinstance(target, Dense) and draft.shape[1] else None
    if fast is None:
        return None
    token: Tensor = fast.final_token(target.dense(), _form(draft), accepted, num_proposed, final_uniforms, weight)
    return token


def _kernels(target: Distribution, draft: Distribution) -> Any:
    """The kernel module, if it runs on both distributions."""
    found = [gpu.for_gpu(form) for distribution in (target, draft) for form in _form(distribution) if form is not None]
    return found[0] if all(found) else None


def _form(distribution: Distribution) -> tuple[Tensor | None, Tensor | None]:
    """(probabilities, tokens), the form that `specdec.kernels.triton_sampling` takes."""
    if isinstance(distribution, OneHot):
        return None, distribution.tokens
    if isinstance(distribution, Dense):
        return distribution.probs, None
    return distribution.inner.probs, distribution.tokens
