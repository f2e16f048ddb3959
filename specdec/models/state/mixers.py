"""Runs the mixers of recurrent layers on a `RecurrentCache`.

A mixer is the module that updates a recurrent or convolution state. transformers' mixers read several tokens at once,
in parallel, or a single token that continues from a state. Only the latter leaves the state after each token, so the
tokens of a step go through a mixer one by one, and the state after each is kept. Plain decoding takes the same path, so
its numbers are the same. A prompt is read in parallel, and so are its later chunks if the mixer can continue from a
state in parallel, which is found out by running it.

The mixers are found by running the model and seeing which modules use the states, so no architecture is named here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from specdec.models.state.recurrent import Key, RecurrentCache, RecurrentLayer, plain_cache

_TRACED = 6  # tokens; the last half continues the first


class StatesElsewhereError(ValueError):
    """A recurrent layer whose states are not in transformers' cache."""


class Mixer:
    """Steps a mixer module through the tokens of a call; replaces its `forward` for calls with a RecurrentCache.

    layer: its index. keys: the states that it updates. continues: whether it reads several tokens at once from a state.
    """

    def __init__(self, module: nn.Module, layer: int, keys: Sequence[Key], continues: bool) -> None:
        self.layer, self.keys, self.continues = layer, keys, continues
        self._forward = module.forward
        self._is_stepping = False
        least, most = getattr(module, "time_step_limit", None) or (0.0, math.inf)
        self._bias: Any = getattr(module, "dt_bias", None)
        self._limits = _inverse_softplus(least), _inverse_softplus(most)
        if (least > 0 or most < math.inf) and self._bias is not None:
            module.get_submodule("in_proj").register_forward_hook(self._bounded)
        module.forward = self
        module.stepped_mixer = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = next((each for each in (*args, *kwargs.values()) if isinstance(each, RecurrentCache)), None)
        if state is None:
            return self._forward(*args, **kwargs)
        layer: RecurrentLayer = state.layers[self.layer]
        layer.load(self.keys)
        width = state.window.positions.shape[1]
        if state.is_prompt and (self.continues or not any(state.starts)):
            output = self._forward(*args, **kwargs)
            layer.save(self.keys, width)
            return output
        outputs = []
        self._is_stepping = True
        try:
            for index in range(width):
                outputs.append(_run(self._forward, args, kwargs, width, slice(index, index + 1)))
                if index == width - 1 or not state.is_prompt:
                    layer.save(self.keys, index + 1)
        finally:
            self._is_stepping = False
        return _joined(outputs)

    def _bounded(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """A hook of Mamba 2's input projection, whose last columns give the time steps, softplus(column + bias).

        transformers 5.23 bounds these where several tokens are read, but not for a single token that continues from a
        state. softplus increases, so its argument can be bounded instead.
        """
        if not self._is_stepping:
            return None
        rest, steps = output.split([output.shape[-1] - len(self._bias), len(self._bias)], -1)
        least, most = ((limit - self._bias).to(steps) for limit in self._limits)
        return torch.cat([rest, steps.maximum(least).minimum(most)], -1)


def _inverse_softplus(value: float) -> float:
    if value in (0.0, math.inf):
        return math.inf if value else -math.inf
    return value + math.log(-math.expm1(-value))


def step_mixers(model: PreTrainedModel) -> list[Mixer]:
    """Find the mixers of a model with recurrent layers and step them; returns those already found by an earlier call.

    Raises StatesElsewhereError.
    """
    existing = [module.stepped_mixer for module in model.modules() if hasattr(module, "stepped_mixer")]
    if existing:
        return existing
    uses = _uses(model)
    return [Mixer(use.module, use.layer, use.keys, _continues(use, model.config)) for use in uses]


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name of the cache among the arguments of a model's forward; None if it has none."""
    arguments = inspect.signature(type(model).forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in arguments), None)


# ---- how a model uses its states


@dataclass(slots=True)
class _Use:
    """A module's use of the states of a layer, and its arguments in the traced call."""

    module: nn.Module
    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: list[Key] = field(default_factory=list)


@torch.inference_mode()
def _uses(model: PreTrainedModel) -> list[_Use]:
    """The uses of recurrent states in a call for a few tokens. Raises StatesElsewhereError for a layer without any."""
    state, name = plain_cache(model.config), cache_argument(model)
    uses: dict[nn.Module, _Use] = {}
    tokens = torch.arange(_TRACED, device=model.device).unsqueeze(0) % model.config.vocab_size
    with _calls(model) as calls:

        def noting(kind: str, update: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def note(states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
                module, args, kwargs = calls[-1]
                use = uses.setdefault(module, _Use(module, layer_idx, args, kwargs))
                use.keys.append((kind, state_idx))
                return update(states, layer_idx, state_idx, **options)

            return note

        state.update_conv_state = noting("conv", state.update_conv_state)
        state.update_recurrent_state = noting("recurrent", state.update_recurrent_state)
        if name:
            model(input_ids=tokens, **{name: state}, use_cache=True)
    missing = set(recurrent_layers(state)) - {use.layer for use in uses.values()}
    if missing or not name:
        raise StatesElsewhereError(
            f"layer {min(missing, default=0)} of {type(model).__name__} keeps a recurrent state outside of "
            "transformers' cache, so it cannot be kept per sequence and rolled back; it would have to use "
            "Cache.update_recurrent_state, as Mamba does"
        )
    return list(uses.values())


def recurrent_layers(state: Cache) -> list[int]:
    """The indices of the recurrent layers of transformers' own cache."""
    return [index for index, layer in enumerate(state.layers) if isinstance(layer, LinearAttentionLayer)]


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]:
    """The calls of modules that are in progress, with their arguments, outermost first."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.pop()

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _continues(use: _Use, config: Any) -> bool:
    """Whether a mixer reads several tokens at once from its states as it reads them one by one.

    The error must be small against what each state contributes to the output, so that a mixer which ignores one of them
    is noticed however little it matters.
    """
    half = _TRACED // 2

    def second_half(parts: Sequence[slice], without: Key | None = None) -> Tensor:
        state = plain_cache(config)
        args, kwargs = (_with_cache(each, state) for each in (use.args, use.kwargs))
        _run(use.module.forward, args, kwargs, _TRACED, slice(0, half))
        if without:
            kind, index = without
            getattr(state.layers[use.layer], f"{kind}_states")[index].zero_()
        output = _joined([_run(use.module.forward, args, kwargs, _TRACED, part) for part in parts])
        return (output if isinstance(output, Tensor) else output[0]).float()

    one_by_one = [slice(i, i + 1) for i in range(half, _TRACED)]
    expected = second_half(one_by_one)
    error = (second_half([slice(half, _TRACED)]) - expected).norm()
    return all(bool(error < 0.1 * (second_half(one_by_one, key) - expected).norm()) for key in use.keys)


def _with_cache(values: Any, state: Cache) -> Any:
    """Arguments with another cache."""
    if isinstance(values, dict):
        return {name: _with_cache(value, state) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_with_cache(value, state) for value in values)
    return state if isinstance(values, Cache) else values


# ---- parts of a call


def _run(forward: Callable[..., Any], args: Any, kwargs: Any, width: int, part: slice) -> Any:
    """Call a mixer with a part of its `width` tokens."""
    return forward(*_part_of(args, width, part), **_part_of(kwargs, width, part))


def _part_of(value: Any, width: int, part: slice) -> Any:
    """Arguments with tensors [rows, width, ...] cut to a part of the tokens."""
    if isinstance(value, dict):
        return {name: _part_of(each, width, part) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_part_of(each, width, part) for each in value)
    return value[:, part] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width else value


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs for consecutive tokens, tensors [rows, n, ...] or tuples that begin with such, as one."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], 1), *outputs[-1][1:])
    return torch.cat(list(outputs), 1)
