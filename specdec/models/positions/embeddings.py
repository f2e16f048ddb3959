"""Position embeddings of each row, for models that derive them from the number of cached tokens.

transformers gives such models one length of the cache for all rows. Here their embedding modules get the position of
each token while a forward call with a ragged cache runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from specdec.models.positions.alibi import PerRow


class PositionEmbeddings:
    """The position embeddings of a decoder that takes no position ids.

    decoder: whose modules have the embeddings. padding: the token that has no position of its own, if there is one.
    """

    def __init__(self, decoder: nn.Module) -> None:
        dtype = next(decoder.parameters()).dtype
        counting: list[Any] = [each for each in decoder.modules() if "past_key_values_length" in _names(each)]
        self._lookups = [(each, _lookup(each, dtype)) for each in counting]
        self.padding: int | None = next((each.padding_idx for each in counting if _skips_padding(each)), None)
        # RoFormer's are applied to all rows at once
        self._lacks_rows = type(decoder).__name__.startswith("RoFormer")

    @contextmanager
    def applied(self, tokens: Tensor, positions: Tensor) -> Iterator[None]:
        """During calls inside, tokens are at these positions, both int64 [rows, width]."""

        def of_rows(lookup: _Lookup) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                embedded = lookup(tokens, positions)
                return PerRow(embedded.unsqueeze(1)) if self._lacks_rows else embedded

            return forward

        with ExitStack() as stack:
            for module, lookup in self._lookups:
                stack.enter_context(_with_forward(module, of_rows(lookup)))
            yield


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward, which may be its class's or one of its own, during calls inside."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


_Lookup = Callable[[Tensor, Tensor], Tensor]  # (tokens, positions), int64 [rows, width] -> [rows, width, hidden]


def _names(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _lookup(module: Any, dtype: torch.dtype) -> _Lookup:
    """Embeddings of positions, as a module has them, in its model's dtype."""
    table = getattr(module, "weights", getattr(module, "weight", None))
    if table is None:  # computed
        return lambda tokens, positions: (
            type(module)
            .forward(
                module,
                torch.zeros(1, positions.numel(), 1, dtype=dtype, device=positions.device),
                position_ids=positions.reshape(-1, 1),
            )
            .view(*positions.shape, -1)
        )
    if _skips_padding(module):
        return lambda tokens, positions: embedding(ids_after_padding(tokens, positions, module.padding_idx), table)
    offset = getattr(module, "offset", 0)
    return lambda tokens, positions: embedding(positions + offset, table)


def _skips_padding(module: nn.Module) -> bool:
    return hasattr(module, "create_position_ids_from_input_ids") or hasattr(module, "make_positions")


def ids_after_padding(tokens: Tensor, positions: Tensor, padding: int) -> Tensor:
    """Position ids that begin after the id of the padding token, which a padding token has as its own."""
    return torch.where(tokens == padding, padding, positions + padding + 1)
