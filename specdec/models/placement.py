"""Assignment of the layers of a target and its draft to devices, as pure functions of their sizes.

Each device gets a contiguous run of layers, in order. Modules before the first layer (embeddings) are placed with it,
modules after the last (final norm, output head) with that. The runs minimize the bytes on the fullest device, and
among those assignments balance the devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Devices = tuple[int, ...]  # the device index of each layer


class PlacementError(ValueError):
    """An unknown placement, or one that does not fit the devices."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of a model's weights.

    layers: of each decoder layer, at least one. before, after: of the modules before and after the layers.
    shared: of weights in both `before` and `after` (tied embeddings), stored once on one device but twice on two.
    """

    layers: tuple[int, ...]
    before: int = 0
    after: int = 0
    shared: int = 0
    _sums: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of the first 0, 1, ... layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sums", (0, *accumulate(self.layers)))
        sizes = (*self.layers, self.before, self.after, self.shared)
        if not self.layers or min(sizes) < 0 or self.shared > min(self.before, self.after):
            raise ValueError(
                f"{self} must have at least one layer, sizes >= 0, and shared <= min(before, after); correct the sizes"
            )

    @property
    def total(self) -> int:
        """Bytes on a single device."""
        return self.on(0, len(self.layers))

    def on(self, first: int, end: int) -> int:
        """Bytes of layers first to end - 1 with the modules placed with them; 0 for an empty run."""
        if first == end:
            return 0
        before, after = first == 0, end == len(self.layers)
        ends = self.before * before + self.after * after - self.shared * (before and after)
        return ends + self._sums[end] - self._sums[first]


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of each layer of the target and, if there is one, of the draft."""

    target: Devices
    draft: Devices | None = None


def parse(text: str) -> tuple[int, int]:
    """(devices of the target, devices of the draft); 0 for a draft on the target's device, (0, 0) for auto.

    text: "same", "separate", "ratio:T:D" or "auto". Raises PlacementError.
    """
    by_name = {"same": (1, 0), "separate": (1, 1), "auto": (0, 0)}
    kind, *numbers = text.split(":")
    if text in by_name:
        return by_name[text]
    if kind == "ratio" and len(numbers) == 2 and all(number.isdecimal() and int(number) > 0 for number in numbers):
        return int(numbers[0]), int(numbers[1])
    raise PlacementError(
        f"placement={text!r} must be same, separate, auto or ratio:T:D with T devices for the target and D for the "
        "draft; try ratio:6:2"
    )


def num_devices(text: str) -> int:
    """The minimum number of devices for a placement."""
    return max(sum(parse(text)), 1)


def plan_placement(target: LayerBytes, draft: LayerBytes | None, memories: Sequence[int], placement: str) -> Placement:
    """Assign the layers to devices.

    memories: bytes available for weights on each device.
    placement: "same": all on the first device. "separate": the target on the first, the draft on the second.
    "ratio:T:D": the target on the first T devices, the draft on the next D. "auto": the first that fits, with as few
    devices as possible: same, separate, ratio:2:1, ratio:3:1, ratio:2:2 and so on; without a draft, the fewest devices
    that hold the target.
    Raises PlacementError naming the missing memory or devices.
    """
    if placement != "auto":
        return _plan(target, draft, memories, placement)
    for candidate in _candidates(len(memories), draft):
        try:
            return _plan(target, draft, memories, candidate)
        except PlacementError:
            continue
    needed = target.total + (draft.total if draft else 0)
    raise PlacementError(
        f"placement='auto' must fit into {len(memories)} devices with {_gigabytes(sum(memories))} in total, but target "
        f"and draft have {_gigabytes(needed)} of weights{_lack(needed, sum(memories))}; quantize, or use smaller models"
    )


def _candidates(count: int, draft: LayerBytes | None) -> Iterator[str]:
    yield "same"
    if draft is None:
        yield from (f"ratio:{num_target}:1" for num_target in range(2, count + 1))
        return
    yield "separate"
    yield from (
        f"ratio:{total - num_draft}:{num_draft}" for total in range(3, count + 1) for num_draft in range(1, total)
    )


def _plan(target: LayerBytes, draft: LayerBytes | None, memories: Sequence[int], placement: str) -> Placement:
    num_target, num_draft = parse(placement)
    if draft is None:
        num_draft = 0
    if len(memories) < num_target + num_draft:
        raise PlacementError(
            f"placement={placement!r} must have {num_target + num_draft} devices, but there are {len(memories)}; "
            "use --placements same or auto"
        )
    if num_target + num_draft == 1:
        return _on_one(target, draft, memories[0])
    on_target = _spread("target", target, memories[:num_target], placement)
    if draft is None:
        return Placement(on_target)
    on_draft = _spread("draft", draft, memories[num_target : num_target + num_draft], placement)
    return Placement(on_target, tuple(num_target + device for device in on_draft))


def _on_one(target: LayerBytes, draft: LayerBytes | None, memory: int) -> Placement:
    needed = target.total + (draft.total if draft else 0)
    if needed > memory:
        raise PlacementError(
            f"placement='same' must fit into {_gigabytes(memory)} of one device, but target and draft have "
            f"{_gigabytes(needed)} of weights{_lack(needed, memory)}; use auto or another placement, or quantize"
        )
    return Placement((0,) * len(target.layers), (0,) * len(draft.layers) if draft else None)


def _spread(role: str, model: LayerBytes, memories: Sequence[int], placement: str) -> Devices:
    """The device of each layer, balanced within the available memory."""
    loads = _balance(model, memories, max)
    if loads is None:
        raise PlacementError(
            f"placement={placement!r} must fit the {role}'s {len(model.layers)} layers and "
            f"{_gigabytes(model.total)} of weights into {len(memories)} devices of {_gigabytes(sum(memories))} in total"
            f"{_lack(model.total, sum(memories))}; use more devices or auto, or quantize"
        )
    fullest = max(model.on(first, end) for first, end in loads)
    even = _balance(model, [min(memory, fullest) for memory in memories], lambda sofar, load: sofar + load * load)
    assert even is not None, "the assignment found above satisfies these limits"
    return tuple(device for device, (first, end) in enumerate(even) for _ in range(first, end))


def _balance(
    model: LayerBytes, limits: Sequence[int], combine: Callable[[int, int], int]
) -> list[tuple[int, int]] | None:
    """The cheapest run of layers for each device, as (first, end), by dynamic programming; None if nothing fits.

    combine: (cost of the previous devices, load of this one) -> cost.
    """
    count = len(model.layers)
    costs: list[float] = [0.0] + [math.inf] * count  # of placing 0, 1, ... layers on the devices so far
    choices: list[list[int]] = []
    for limit in limits:
        options = [
            [
                combine(int(costs[first]), load) if costs[first] < math.inf and load <= limit else math.inf
                for first in range(end + 1)
                for load in (model.on(first, end),)
            ]
            for end in range(count + 1)
        ]
        choices.append([min(range(len(option)), key=option.__getitem__) for option in options])
        costs = [min(option) for option in options]
    if costs[count] == math.inf:
        return None
    runs, end = [], count
    for firsts in reversed(choices):
        runs.append((firsts[end], end))
        end = firsts[end]
    return runs[::-1]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _lack(needed: int, available: int) -> str:
    return f" ({_gigabytes(needed - available)} short)" if needed > available else " (no split between layers fits)"
