"""What the dispatch modes of the tests share."""

from __future__ import annotations

from typing import Any

import torch


def decomposed(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a composite operator by the operators it consists of, which the mode then sees.

    NotImplemented if it is none.
    """
    if not func.name().startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    ):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)
