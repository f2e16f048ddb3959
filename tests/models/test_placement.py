"""The planner of placements: by property for every ratio and number of layers, and against every other way to cut."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.models.placement import LayerBytes, Placement, PlacementError, num_devices, parse, plan_placement

PLENTY = 1 << 50
sizes = st.integers(0, 20)


@st.composite
def models(draw: st.DrawFn, most_layers: int = 100) -> LayerBytes:
    layers = tuple(draw(st.lists(sizes, min_size=1, max_size=most_layers)))
    before, after = draw(sizes), draw(sizes)
    return LayerBytes(layers, before, after, draw(st.integers(0, min(before, after))))


def loads(model: LayerBytes, devices: tuple[int, ...]) -> dict[int, int]:
    """Bytes on each device, counted without the planner."""
    loads = dict.fromkeys(devices, 0)
    for device, size in zip(devices, model.layers, strict=True):
        loads[device] += size
    loads[devices[0]] += model.before
    loads[devices[-1]] += model.after - (model.shared if devices[0] == devices[-1] else 0)
    return loads


@given(models(), models(), st.integers(1, 9), st.integers(1, 9))
def test_every_layer_is_placed_once_in_order_on_the_devices_of_the_ratio(
    target: LayerBytes, draft: LayerBytes, num_target: int, num_draft: int
) -> None:
    placed = plan_placement(target, draft, [PLENTY] * (num_target + num_draft), f"ratio:{num_target}:{num_draft}")
    assert placed.draft is not None
    assert (len(placed.target), len(placed.draft)) == (len(target.layers), len(draft.layers))
    for devices in (placed.target, placed.draft):
        assert list(devices) == sorted(devices)  # in order, and so each device's layers are contiguous
    assert set(placed.target) <= set(range(num_target))
    assert set(placed.draft) <= set(range(num_target, num_target + num_draft))
    for model, devices, count in ((target, placed.target, num_target), (draft, placed.draft, num_draft)):
        pieces = [*model.layers]
        pieces[0] += model.before
        pieces[-1] += model.after
        assert max(loads(model, devices).values()) <= sum(pieces) / count + max(pieces)


@given(models(most_layers=7), st.integers(1, 4))
def test_the_fullest_device_is_as_empty_as_any_cut_can_make_it(model: LayerBytes, count: int) -> None:
    placed = plan_placement(model, LayerBytes((1,)), [PLENTY] * (count + 1), f"ratio:{count}:1")
    assert max(loads(model, placed.target).values()) == min(
        max(loads(model, cut).values()) for cut in cuts(model, count)
    )


def cuts(model: LayerBytes, count: int) -> list[tuple[int, ...]]:
    """Every assignment of layers to devices that keeps the order."""
    return list(combinations_with_replacement(range(count), len(model.layers)))


@given(models(most_layers=6), st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_memory_is_respected_or_the_error_is_right(model: LayerBytes, memories: list[int]) -> None:
    fitting = [
        cut
        for cut in cuts(model, len(memories))
        if all(load <= memories[device] for device, load in loads(model, cut).items())
    ]
    placement = f"ratio:{len(memories)}:1"
    if fitting:
        assert plan_placement(model, LayerBytes((0,)), [*memories, 0], placement).target in fitting
    else:
        with pytest.raises(PlacementError, match=f"placement='{placement}' must fit the target's"):
            plan_placement(model, LayerBytes((0,)), [*memories, 0], placement)


@given(st.integers(1, 130), st.integers(1, 9))
def test_equal_layers_are_shared_out_evenly(num_layers: int, count: int) -> None:
    placed = plan_placement(LayerBytes((5,) * num_layers), LayerBytes((1,)), [PLENTY] * (count + 1), f"ratio:{count}:1")
    shares = [placed.target.count(device) for device in range(count)]
    assert max(shares) - min(shares) <= 1


def test_an_example_by_hand() -> None:
    target = LayerBytes((4, 4, 4, 4, 4, 4), before=4, after=8)
    # 36 bytes on three devices: 12 each, as the embeddings weigh as one layer and the head as two
    assert plan_placement(target, LayerBytes((1,)), [99] * 4, "ratio:3:1") == Placement((0, 0, 1, 1, 1, 2), (3,))
    assert plan_placement(target, LayerBytes((1, 1)), [99] * 2, "same") == Placement((0,) * 6, (0, 0))
    assert plan_placement(target, LayerBytes((1, 1)), [99] * 2, "separate") == Placement((0,) * 6, (1, 1))
    assert plan_placement(target, None, [99] * 2, "separate") == Placement((0,) * 6)


def test_auto_takes_the_first_and_smallest_that_fits() -> None:
    target, draft = LayerBytes((10,) * 4), LayerBytes((5, 5))
    assert plan_placement(target, draft, [50, 50, 50], "auto") == plan_placement(target, draft, [50], "same")
    assert plan_placement(target, draft, [40, 40, 40], "auto") == plan_placement(target, draft, [40, 40], "separate")
    assert plan_placement(target, draft, [20, 20, 20, 20], "auto") == Placement((0, 0, 1, 1), (2, 2))
    assert plan_placement(target, None, [20, 20, 20, 20], "auto") == Placement((0, 0, 1, 1))


@given(models(most_layers=5), models(most_layers=3), st.lists(st.integers(0, 80), min_size=1, max_size=3))
def test_auto_finds_a_placement_if_any_ratio_does(target: LayerBytes, draft: LayerBytes, memories: list[int]) -> None:
    names = ["same", "separate", *(f"ratio:{a}:{b}" for a, b in ratios(len(memories)))]
    found = []
    for name in names:
        try:
            found.append(plan_placement(target, draft, memories, name))
        except PlacementError:
            continue
    try:
        assert plan_placement(target, draft, memories, "auto") in found
    except PlacementError:
        assert not found


def ratios(most: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(1, most) for b in range(1, most) if a + b <= most]


def test_shared_weights_count_once_on_one_device_and_twice_on_two() -> None:
    tied = LayerBytes((10, 10), before=30, after=31, shared=30)
    assert tied.total == 51
    assert plan_placement(tied, None, [51], "same") == Placement((0, 0))
    with pytest.raises(PlacementError, match=r"placement='same' must fit into 0.0 GB .* use auto"):
        plan_placement(tied, None, [50], "same")
    assert plan_placement(tied, None, [50, 50], "auto") == Placement((0, 1))  # 40 and 41


@pytest.mark.parametrize(
    ("memories", "placement", "message"),
    [
        ([10**12], "separate", "placement='separate' must have 2 devices, but there are 1; use --placements same or"),
        ([10**12] * 7, "ratio:6:2", "placement='ratio:6:2' must have 8 devices, but there are 7"),
        ([80 * 10**9] * 8, "same", r"one device, but target and draft have 142.0 GB of weights \(62.0 GB short\)"),
        ([20 * 10**9] * 3, "ratio:2:1", "the target's 70 layers and 140.0 GB .* into 2 devices of 40.0 GB in total"),
        (
            [150 * 10**9, 10**9],
            "separate",
            r"the draft's 1 layers and 2.0 GB .* into 1 devices of 1.0 GB in total \(1.0 G",
        ),
        (
            [50 * 10**9] * 2,
            "auto",
            r"2 devices with 100.0 GB in total, but .* 142.0 GB of weights \(42.0 GB short\)",
        ),
        ([10**12], "ratio:6", "placement='ratio:6' must be same, separate, auto or ratio:T:D"),
        ([10**12], "ratio:0:1", "try ratio:6:2"),
        ([10**12], "ratio:1:0", "try ratio:6:2"),
        ([10**12], "elsewhere", "placement='elsewhere' must be"),
    ],
)
def test_missing_memory_or_devices_are_named(memories: list[int], placement: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_placement(LayerBytes((2 * 10**9,) * 70), LayerBytes((2 * 10**9,)), memories, placement)


def test_placements_name_the_number_of_devices_that_they_need() -> None:
    assert [num_devices(each) for each in ("same", "separate", "ratio:6:2", "auto")] == [1, 2, 8, 1]
    assert parse("ratio:6:2") == (6, 2)


@pytest.mark.parametrize("wrong", [{"layers": ()}, {"layers": (1, -1)}, {"layers": (1,), "shared": 1}])
def test_impossible_sizes_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must have at least one layer, sizes >= 0"):
        LayerBytes(**wrong)  # type: ignore[arg-type]
