"""Hidden states of transformers models, read by hooks while the model runs.

transformers' own `output_hidden_states` returns all of them at once, holds them until the call ends, and lacks the last
layer's output before the final norm. Hooks read only the requested ones, at the time they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specdec.models.base import FINAL, FeatureLayers

_TRIAL = 3  # tokens


class HiddenStates:
    """Reads hidden states, see `FeatureLayers`, during the forward calls of a transformers causal language model.

    model: in eval mode; it is run once, on a few tokens. num_layers: of its decoder.
    widths: the width of each hidden state that can be read, by its index. Without a list of layers, each of which reads
    the output of the one before, that is only the final one.
    """

    def __init__(self, model: Any, num_layers: int) -> None:
        self._body: nn.Module = model.get_decoder()
        lists = (module for module in self._body.modules() if isinstance(module, nn.ModuleList))
        chains = (layers for layers in lists if len(layers) == num_layers and _is_chain(model, layers))
        self._layers = next(chains, None)
        self.widths: dict[int, int] = {}
        indices = (*range(num_layers + 1), FINAL) if self._layers is not None else (FINAL,)
        with self.reading(indices, lambda states, i: self.widths.update({indices[i]: states.shape[-1]})):
            _try(model)

    @contextmanager
    def reading(self, indices: FeatureLayers, take: Callable[[Tensor, int], None]) -> Iterator[None]:
        """During forward calls inside, call take(hidden states [rows, width, n] of indices[i], i) once computed."""
        handles = [self._hook(each, lambda states, i=i: take(states, i)) for i, each in enumerate(indices)]  # type: ignore[misc]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, take: Callable[[Tensor], None]) -> Any:
        if index == FINAL:
            return _after(self._body, take)
        assert self._layers is not None, "one of `widths`"
        return _after(self._layers[index - 1], take) if index else _before(self._layers[0], take)


def _before(module: nn.Module, take: Callable[[Tensor], None]) -> Any:
    """Call take(hidden states that the module reads) before each of its calls."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, take: Callable[[Tensor], None]) -> Any:
    """Call take(hidden states that the module returns, alone or first) after each of its calls."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(output if isinstance(output, Tensor) else output[0])

    return module.register_forward_hook(hook)


def _is_chain(model: Any, layers: nn.ModuleList) -> bool:
    """Whether each layer runs once, in order, on what the one before returned: [rows, width, n]."""
    read: list[Tensor] = []
    returned: list[Tensor] = []
    handles = [_before(layer, read.append) for layer in layers] + [_after(layer, returned.append) for layer in layers]
    try:
        _try(model)
    except KeyError:  # a layer that calls its input something else
        return False
    finally:
        for handle in handles:
            handle.remove()
    if not len(read) == len(returned) == len(layers) or {x.shape[:-1] for x in (*read, *returned)} != {(1, _TRIAL)}:
        return False
    return all(bool((x.to(y.device) == y).all()) for x, y in zip(returned[:-1], read[1:], strict=True))


@torch.inference_mode()
def _try(model: Any) -> None:
    """Run the model on a few tokens."""
    model(input_ids=torch.arange(_TRIAL, device=model.device).unsqueeze(0), use_cache=False)
