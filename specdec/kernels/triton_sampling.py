"""Sampling and verification on GPUs: Triton kernels behind the entry points of `specdec.sampling.state` and others.

Imported when first used: it needs Triton, which comes with CUDA builds of torch. TRITON_INTERPRET=1 runs the kernels on
CPU tensors. Every entry point is a torch operator, so that fake tensors pass through it too; none reads anything back
to the host or chooses a shape by values, so all of them can be captured in a CUDA graph.

A row of the vocabulary is cut into chunks of one size, and most entry points are two kernels: one program per row and
chunk leaves a number for each chunk, and the next combines them. What a row gives does not depend on its batch mates,
bit for bit: chunks depend on the vocabulary only; a row that truncation leaves whole is not divided by its sum because
another row is cut; and no sum depends on how the compiler orders it, which may change with whatever it knows of the
arguments: their dtype, whether they are 1 or multiples of 16, and where a tensor begins in memory.

So integers stand for sums of exponentials within a chunk, in units of 2**-50, and for sums of probabilities in top-p
and min-p, in units of 2**-61: they are exact, whatever the order. float64 is used where probabilities meet a uniform,
which has 53 bits: in cumulative sums, acceptance tests and waiting times. In float32 draws would be of 24 bits, and a
token rarer than 6e-8 in the wrong place would be drawn too often or never. Their tensors begin at multiples of 16
bytes, and sizes that change with the batch are not compiled in, so that each sum has one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.runtime.devices import on_device

_WAYS = tl.constexpr(16)  # a pass of a search divides its range by this
_UNIT = tl.constexpr(2.0**61)  # of sums of probabilities as integers
_EXPONENTIAL_UNIT = tl.constexpr(2.0**50)  # of sums of up to 4096 exponentials, each at most 1
_DENSE, _ONE_HOT, _PARTIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # forms of a draft's distribution
_MIN_TEMPERATURE = tl.constexpr(2.0**-126)  # the least normal float32; below it some units take numbers for 0
_UNIFORMS_PER_PROGRAM = 512
_ALIGNMENT = 16  # bytes, at a multiple of which Triton takes a tensor to begin, or compiles another kernel
_VARYING = ("per_row", "chunks", "num_drafted", "uniform_0", "uniform_1")  # by batch or draft: one kernel for all
_jit = partial(triton.jit, do_not_specialize=_VARYING)


# ---- shared by the kernels


@triton.jit
def _chunk(vocab, BLOCK: tl.constexpr):
    """(tokens of the program's chunk, which of them exist)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return at, at < vocab


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Integers int32 in the order of floats; SHIFT drops bits that are always 0. -0 is 0; NaN is beyond both ends."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _units(x, UNIT: tl.constexpr):
    """Numbers as integers, multiples of 1 / UNIT; NaN is 0."""
    return tl.where(x == x, x * UNIT, 0.0).to(tl.int64)


@triton.jit
def _first_above(values, before, threshold, at, size):
    """The first place where before + the cumulative sum of values exceeds a threshold, and the value is above 0.

    Where rounding hides it the last place with a value above 0; 0 if there is none.
    """
    above = (before + tl.cumsum(values, 0) > threshold) & (values > 0.0)
    first = tl.min(tl.where(above, at, size), 0)
    last = tl.max(tl.where(values > 0.0, at, 0), 0)
    return tl.where(first < size, first, last)


@triton.jit
def _place_of(token, tokens, size, mask, STEPS: tl.constexpr):
    """Where tokens stand among ascending ones: (place, whether there); by STEPS halvings, 2**STEPS > size."""
    low = tl.zeros_like(token)
    high = low + size
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        here = tl.load(tokens + middle, mask=mask & (low < high), other=0).to(token.dtype)
        low, high = tl.where((low < high) & (here < token), middle + 1, low), tl.where(here < token, high, middle)
    there = mask & (low < size)
    return low, there & (tl.load(tokens + low, mask=there, other=0).to(token.dtype) == token)


# ---- uniforms

_UNIFORMS_SIZES = (
    *("size", "dim_1", "dim_2"),
    *(f"{word}_{axis}" for word in ("seed", "position", "role", "origin") for axis in range(3)),
)


@triton.jit(do_not_specialize=_UNIFORMS_SIZES)
def _uniforms_kernel(
    seeds, positions, roles, origins, out, size, dim_1, dim_2,
    seed_0, seed_1, seed_2, position_0, position_1, position_2,
    role_0, role_1, role_2, origin_0, origin_1, origin_2, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    k = at % dim_2
    j = at // dim_2 % dim_1
    i = at // dim_2 // dim_1
    seed = tl.load(seeds + i * seed_0 + j * seed_1 + k * seed_2, mask=mask, other=0)
    position = tl.load(positions + i * position_0 + j * position_1 + k * position_2, mask=mask, other=0)
    role = tl.load(roles + i * role_0 + j * role_1 + k * role_2, mask=mask, other=0)
    origin = tl.load(origins + i * origin_0 + j * origin_1 + k * origin_2, mask=mask, other=0)
    word = position.to(tl.uint32)
    high, low, _, _ = tl.philox_impl(
        word, origin.to(tl.uint32), role.to(tl.uint32), tl.zeros_like(word),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 10,
    )  # fmt: skip
    bits = ((high >> 5).to(tl.int64) << 26) + (low >> 6).to(tl.int64)
    tl.store(out + at, bits.to(tl.float64) * (2.0**-53), mask=mask)


# ---- logits to probabilities


@triton.jit
def _logits(logits, floors, row, at, mask, vocab, SHIFT: tl.constexpr, HAS_FLOOR: tl.constexpr):
    """A row's logits in float32, -inf for those below its floor and beyond the end."""
    x = tl.load(logits + row * vocab + at, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_FLOOR:
        x = tl.where(_key(x, SHIFT) < tl.load(floors + row * 2 + 1).to(tl.int32), -float("inf"), x)
    return x


@triton.jit
def _peak(x, at, mask, vocab):
    """(the largest, NaN left out; where the first of them stands; whether there is a NaN)."""
    numbers = tl.where(x == x, x, -float("inf"))
    peak = tl.max(numbers, 0)
    return peak, tl.min(tl.where(mask & (numbers == peak), at, vocab), 0), tl.max((x != x).to(tl.int32), 0) > 0


@triton.jit
def _exponentials(x, peak, temperature):
    """exp((x - peak) / temperature), 0 where x is -inf."""
    return tl.exp((x - tl.where(peak == -float("inf"), 0.0, peak)) / temperature)


@_jit
def _scan_kernel(
    logits, temperatures, floors, peaks, places, sums, vocab, per_row, chunks,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Of each chunk: the largest logit, NaN if any is; its place; the sum of exponentials beside it."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    x = _logits(logits, floors, row, at, mask, vocab, SHIFT, HAS_FLOOR)
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.maximum(tl.load(temperatures + row // per_row), _MIN_TEMPERATURE)
    peak, place, is_bad = _peak(x, at, mask, vocab)
    here = row * chunks + tl.program_id(1)
    tl.store(peaks + here, tl.where(is_bad, float("nan"), peak))
    tl.store(places + here, place)
    total = tl.sum(_units(_exponentials(x, peak, temperature), _EXPONENTIAL_UNIT), 0)
    tl.store(sums + here, total.to(tl.float32) / _EXPONENTIAL_UNIT)


@triton.jit
def _combined(peaks, places, sums, row, vocab, chunks, temperature, CHUNKS: tl.constexpr):
    """Of a row, from its chunks: the largest logit, where it stands, the sum of exponentials, whether any is NaN."""
    at = tl.arange(0, CHUNKS)
    mask = at < chunks
    x = tl.load(peaks + row * chunks + at, mask=mask, other=-float("inf"))
    place = tl.load(places + row * chunks + at, mask=mask, other=0)
    numbers = tl.where(x == x, x, -float("inf"))
    peak = tl.max(numbers, 0)
    first = tl.min(tl.where(mask & (numbers == peak), place, vocab), 0)
    total = tl.sum(tl.load(sums + row * chunks + at, mask=mask, other=0.0) * _exponentials(x, peak, temperature), 0)
    return peak, tl.minimum(first, vocab - 1), total, tl.max((x != x).to(tl.int32), 0) > 0


@_jit
def _largest_kernel(peaks, places, sums, peak_out, place_out, confidence_out, vocab, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak, place, total, is_bad = _combined(peaks, places, sums, row, vocab, chunks, 1.0, CHUNKS)
    tl.store(peak_out + row, tl.where(is_bad, float("nan"), peak))
    tl.store(place_out + row, place.to(tl.int64))
    tl.store(confidence_out + row, tl.div_rn(1.0, total))


@_jit
def _softmax_kernel(
    logits, temperatures, greedy, floors, peaks, places, sums, probs, finite, place_out, vocab, per_row, chunks,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    temperature = tl.maximum(tl.load(temperatures + row // per_row), _MIN_TEMPERATURE)
    peak, place, total, is_bad = _combined(peaks, places, sums, row, vocab, chunks, temperature, CHUNKS)
    is_distribution = (peak < float("inf")) & (peak > -float("inf")) & (is_bad == 0)
    x = _logits(logits, floors, row, at, mask, vocab, SHIFT, HAS_FLOOR)
    p = tl.div_rn(_exponentials(x, peak, temperature), tl.where(is_distribution, total, float("nan")))
    if HAS_GREEDY:
        p = tl.where(tl.load(greedy + row // per_row) != 0, (at == place).to(tl.float32), p)
    tl.store(probs + row * vocab + at, p, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(finite + row, is_distribution.to(tl.uint8))
        tl.store(place_out + row, place)


# ---- the threshold of top-k and top-p: the least key with less than a bound of count or probability above it


@triton.jit
def _probe(low, high, number):
    """The key that probe `number` of _WAYS - 1 looks at."""
    return low + ((high - low) * (number + 1)) // _WAYS


@triton.jit
def _narrowed(state, partials, bound, row, chunks, CHUNKS: tl.constexpr):
    """The range [low, high] of the threshold after a pass, from the range that it looked at and what it found above."""
    low, high = tl.load(state + row * 2), tl.load(state + row * 2 + 1)
    number, chunk = tl.arange(0, _WAYS), tl.arange(0, CHUNKS)
    places = (row * _WAYS + number[:, None]) * chunks + chunk[None, :]
    is_real = (number[:, None] < _WAYS - 1) & (chunk[None, :] < chunks) & (low < high)
    above = tl.sum(tl.load(partials + places, mask=is_real, other=0), 1)
    probes = _probe(low, high, number)
    counts = (number < _WAYS - 1) & (low < high)
    return (
        tl.max(tl.where(counts & (above >= bound), probes + 1, low), 0),
        tl.min(tl.where(counts & (above < bound), probes, high), 0),
    )


@triton.jit
def _bound(bounds, keeps_all, row, IS_TOP_K: tl.constexpr):
    """(how much must be above a key that is too low, whether all are kept anyway)."""
    if IS_TOP_K:
        bound = tl.load(bounds + row)
        is_all = tl.load(keeps_all + row) != 0
    else:
        top_p = tl.load(bounds + row).to(tl.float32)  # compared with float32 probabilities
        bound = tl.maximum(_units(top_p, _UNIT), 1)
        is_all = top_p >= 1.0
    return bound, is_all


@_jit
def _search_kernel(
    values, bounds, keeps_all, state_before, partials_before, state, partials, vocab, per_row, chunks,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
    IS_TOP_K: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """One pass: the range by the pass before, and of each chunk how much is above each of _WAYS - 1 keys in it."""
    row = tl.program_id(0).to(tl.int64)
    bound, is_all = _bound(bounds, keeps_all, row // per_row, IS_TOP_K)
    if IS_FIRST:
        least = tl.full([], LOW, tl.int64)
        most = tl.where(is_all, least, tl.full([], HIGH, tl.int64))
    else:
        least, most = _narrowed(state_before, partials_before, bound, row, chunks, CHUNKS)
    if tl.program_id(1) == 0:
        tl.store(state + row * 2, least)
        tl.store(state + row * 2 + 1, most)
    if least < most:
        at, mask = _chunk(vocab, BLOCK)
        x = tl.load(values + row * vocab + at, mask=mask, other=0.0).to(tl.float32)
        keys = _key(x, SHIFT)
        if IS_TOP_K:
            counted = mask.to(tl.int32)
        else:
            counted = _units(x, _UNIT)
        for number in tl.static_range(_WAYS - 1):
            above = tl.sum(tl.where(keys > _probe(least, most, number).to(tl.int32), counted, 0), 0)
            tl.store(partials + (row * _WAYS + number) * chunks + tl.program_id(1), above.to(tl.int64))


@_jit
def _floor_kernel(
    bounds, keeps_all, state_before, partials_before, state, per_row, chunks,
    CHUNKS: tl.constexpr, IS_TOP_K: tl.constexpr,
):  # fmt: skip
    """The end of a search: the threshold is state[row, 1]."""
    row = tl.program_id(0).to(tl.int64)
    bound, _ = _bound(bounds, keeps_all, row // per_row, IS_TOP_K)
    low, high = _narrowed(state_before, partials_before, bound, row, chunks, CHUNKS)
    tl.store(state + row * 2, low)
    tl.store(state + row * 2 + 1, high)


@triton.jit
def _kept(
    probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr
):
    """A row's probabilities that top-p and min-p keep, 0 for others."""
    p = tl.load(probs + row * vocab + at, mask=mask, other=0.0)
    kept = p
    if HAS_TOP_P:
        kept = tl.where(_key(p, 0) < tl.load(floors + row * 2 + 1).to(tl.int32), 0.0, kept)
    if HAS_MIN_P:
        peak = tl.load(probs + row * vocab + tl.load(places + row))
        kept = tl.where(p < tl.load(min_ps + row // per_row).to(tl.float32) * peak, 0.0, kept)
    return kept


@_jit
def _kept_kernel(
    probs, floors, places, min_ps, masses, vocab, per_row, chunks,
    BLOCK: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """Of each chunk the probability that is kept."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    kept = _kept(probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P, HAS_MIN_P)
    tl.store(masses + row * chunks + tl.program_id(1), tl.sum(_units(kept, _UNIT), 0))


@triton.jit
def _is_cut(top_ps, min_ps, row, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr):
    """Whether top-p or min-p may take something from a row, and not only from one beside it."""
    is_cut = tl.full([], 0, tl.int1)
    if HAS_TOP_P:
        is_cut |= tl.load(top_ps + row).to(tl.float32) < 1.0
    if HAS_MIN_P:
        is_cut |= tl.load(min_ps + row).to(tl.float32) > 0.0
    return is_cut


@_jit
def _normalize_kernel(
    probs, floors, places, top_ps, min_ps, masses, out, vocab, per_row, chunks,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """Rows that are cut, divided by what is kept; others as they are."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    chunk = tl.arange(0, CHUNKS)
    mass = tl.sum(tl.load(masses + row * chunks + chunk, mask=chunk < chunks, other=0), 0)
    kept = _kept(probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P, HAS_MIN_P)
    # NaN throughout, where mass is 0: 0 / 0
    total = tl.where(mass > 0, mass.to(tl.float32) / _UNIT, float("nan"))
    whole = tl.load(probs + row * vocab + at, mask=mask, other=0.0)
    is_cut = _is_cut(top_ps, min_ps, row // per_row, HAS_TOP_P, HAS_MIN_P)
    p = tl.where(is_cut, tl.div_rn(kept, total), whole)
    tl.store(out + row * vocab + at, p, mask=mask)


# ---- draws


@triton.jit
def _excess(target, draft, tokens, draft_row, size, weight, at, mask, FORM: tl.constexpr, STEPS: tl.constexpr,
            HAS_WEIGHT: tl.constexpr):  # fmt: skip
    """max(weight * target - draft, 0), of a chunk: a row of target, and row `draft_row` of a draft's distributions."""
    p = tl.load(target + at, mask=mask, other=0.0)
    if HAS_WEIGHT:
        p = p.to(tl.float64) * weight
    if FORM == _ONE_HOT:
        excess = tl.where(at == tl.load(tokens + draft_row), 0.0, p)
    else:
        if FORM == _PARTIAL:
            place, there = _place_of(at, tokens, size, mask, STEPS)
        else:
            place, there = at, mask
        excess = p - tl.load(draft + draft_row * size + place, mask=there, other=0.0)
    return tl.where(excess > 0.0, excess, 0.0).to(tl.float64)


@_jit
def _mass_kernel(probs, masses, vocab, chunks, BLOCK: tl.constexpr):
    """Of each chunk the sum in float64."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    p = tl.load(probs + row * vocab + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(masses + row * chunks + tl.program_id(1), tl.sum(p, 0))


@triton.jit
def _chosen_chunk(masses, uniform, chunks, CHUNKS: tl.constexpr):
    """(the chunk where the sum first exceeds the uniform's share of all, the sum before it, the share)."""
    at = tl.arange(0, CHUNKS)
    threshold = uniform * tl.sum(masses, 0)
    chunk = _first_above(masses, 0.0, threshold, at, chunks)
    return chunk, tl.sum(tl.where(at < chunk, masses, 0.0), 0), threshold


@_jit
def _draw_kernel(probs, uniforms, masses, out, vocab, chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, CHUNKS)
    mass = tl.load(masses + row * chunks + every, mask=every < chunks, other=0.0)
    chunk, before, threshold = _chosen_chunk(mass, tl.load(uniforms + row), chunks, CHUNKS)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(probs + row * vocab + at, mask=at < vocab, other=0.0).to(tl.float64)
    tl.store(out + row, _first_above(p, before, threshold, at, vocab).to(tl.int64))


@_jit
def _wait_kernel(probs, uniforms, waits, places, vocab, chunks, BLOCK: tl.constexpr):
    """Of each chunk the least waiting time, -log(1 - uniform) / probability, and whose it is."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    p = tl.load(probs + row * vocab + at, mask=mask, other=0.0).to(tl.float64)
    uniform = tl.load(uniforms + row * vocab + at, mask=mask, other=0.0)
    left = 1.0 - uniform
    # -log(1 - u) = u * log(left) / (left - 1), whose last two factors err alike; next to 0 it is u
    time = tl.where(left == 1.0, uniform, uniform * tl.log(left) / tl.where(left == 1.0, 1.0, left - 1.0))
    wait = tl.where(p > 0.0, time / tl.where(p > 0.0, p, 1.0), float("inf"))  # an impossible token must lose
    least = tl.min(wait, 0)
    here = row * chunks + tl.program_id(1)
    tl.store(waits + here, least)
    tl.store(places + here, tl.min(tl.where(mask & (wait == least), at, vocab), 0))


@_jit
def _race_kernel(waits, places, out, vocab, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    mask = at < chunks
    wait = tl.load(waits + row * chunks + at, mask=mask, other=float("inf"))
    place = tl.load(places + row * chunks + at, mask=mask, other=0)
    first = tl.min(tl.where(mask & (wait == tl.min(wait, 0)), place, vocab), 0)
    tl.store(out + row, tl.minimum(first, vocab - 1).to(tl.int64))


# ---- verification


@triton.jit
def _prob_of(probs, tokens, size, row, token, mask, FORM: tl.constexpr, STEPS: tl.constexpr):
    """Probability, float64, of a token by each row's distribution, in whichever form that is."""
    if FORM == _ONE_HOT:
        prob = (tl.load(tokens + row, mask=mask, other=0) == token).to(tl.float64)
    else:
        if FORM == _PARTIAL:
            place, there = _place_of(token, tokens, size, mask, STEPS)
        else:
            place, there = token, mask
        prob = tl.load(probs + row * size + place, mask=there, other=0.0).to(tl.float64)
    return prob


@_jit
def _accept_kernel(
    target, target_tokens, draft, draft_tokens, tokens, lengths, uniforms, out, num_drafted, vocab, size,
    uniform_0, uniform_1, WIDTH: tl.constexpr, TARGET: tl.constexpr, DRAFT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """How many leading tokens of a row's draft pass; see `specdec.verification.verify_tokens`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    mask = at < num_drafted
    token = tl.load(tokens + row * num_drafted + at, mask=mask, other=0)
    own, scored = row * num_drafted + at, row * (num_drafted + 1) + at
    target_prob = _prob_of(target, target_tokens, vocab, scored, token, mask, TARGET, STEPS)
    draft_prob = _prob_of(draft, draft_tokens, size, own, token, mask, DRAFT, STEPS)
    uniform = tl.load(uniforms + row * uniform_0 + at * uniform_1, mask=mask, other=0.0)
    # strict <: at u = 0 an impossible token must lose
    passed = (uniform * draft_prob < target_prob) & (at < tl.load(lengths + row))
    tl.store(out + row, tl.min(tl.where(mask & (passed == 0), at, num_drafted), 0).to(tl.int64))


@_jit
def _last_masses_kernel(
    target, draft, draft_tokens, accepted, weights, masses, num_drafted, vocab, size, chunks,
    BLOCK: tl.constexpr, FORM: tl.constexpr, STEPS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Of each chunk the residual's sum and the target's, at the position behind the accepted tokens."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    place = tl.load(accepted + row)
    here = target + (row * (num_drafted + 1) + place) * vocab
    draft_row = row * num_drafted + tl.minimum(place, num_drafted - 1)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weights + row)
    excess = _excess(here, draft, draft_tokens, draft_row, size, weight, at, mask, FORM, STEPS, HAS_WEIGHT)
    out = masses + row * 2 * chunks + tl.program_id(1)
    tl.store(out, tl.sum(excess, 0))
    tl.store(out + chunks, tl.sum(tl.load(here + at, mask=mask, other=0.0).to(tl.float64), 0))


@_jit
def _last_draw_kernel(
    target, draft, draft_tokens, accepted, lengths, weights, uniforms, masses, out, num_drafted, vocab, size, chunks,
    uniform_0, uniform_1, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FORM: tl.constexpr, STEPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The recovered token by the residual, or the bonus token by the target."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(accepted + row)
    here = target + (row * (num_drafted + 1) + place) * vocab
    draft_row = row * num_drafted + tl.minimum(place, num_drafted - 1)
    every = tl.arange(0, CHUNKS)
    excess = tl.load(masses + row * 2 * chunks + every, mask=every < chunks, other=0.0)
    # where nothing exceeds a rejection has probability 0: the target, then
    is_residual = (place < tl.load(lengths + row)) & (tl.sum(excess, 0) > 0.0)
    full = tl.load(masses + (row * 2 + 1) * chunks + every, mask=every < chunks, other=0.0)
    uniform = tl.load(uniforms + row * uniform_0 + place * uniform_1)
    chunk, before, threshold = _chosen_chunk(tl.where(is_residual, excess, full), uniform, chunks, CHUNKS)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = at < vocab
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weights + row)
    rest = _excess(here, draft, draft_tokens, draft_row, size, weight, at, mask, FORM, STEPS, HAS_WEIGHT)
    p = tl.where(is_residual, rest, tl.load(here + at, mask=mask, other=0.0).to(tl.float64))
    tl.store(out + row, _first_above(p, before, threshold, at, vocab).to(tl.int64))


# ---- entry points


def _blocks(size: int) -> dict[str, int]:
    """How a row is cut into chunks, and how many warps work on one."""
    block = 4096 if size > 1024 else 1024
    return {"BLOCK": block, "num_warps": block // 512}


def _num_chunks(size: int) -> int:
    return -(-size // int(_blocks(size)["BLOCK"]))


def _power(number: int) -> int:
    """The least power of two that is not less, and at least 16, so that few variants are compiled."""
    return max(16, 1 << (number - 1).bit_length())


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and beginning where Triton need not compile another kernel, whose sums may have another order."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _shift(dtype: torch.dtype) -> int:
    """How many low bits of a dtype's numbers as float32 are always 0."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)


@torch.library.custom_op("specdec::uniforms", mutates_args=())
def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """As `specdec.sampling.randomness.uniforms`; nothing that broadcasts is copied."""
    words = [word.flatten(0, word.ndim - 3) for word in _broadcast(seeds, positions, roles, origins)]
    out = _uniforms_like(seeds, positions, roles, origins)
    grid = (-(-out.numel() // _UNIFORMS_PER_PROGRAM),)
    if out.numel():
        with on_device(out.device):
            _uniforms_kernel[grid](
                *words, out, out.numel(), *words[0].shape[1:], *(each for word in words for each in word.stride()),
                BLOCK=_UNIFORMS_PER_PROGRAM,
            )  # fmt: skip
    return out


def _broadcast(*words: Tensor) -> list[Tensor]:
    """Views of one shape with three axes or more."""
    views = torch.broadcast_tensors(*words)
    missing = max(0, 3 - views[0].ndim)
    return [view[(None,) * missing] for view in views]


def _uniforms_like(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(seeds.shape, positions.shape, roles.shape, origins.shape)
    return torch.empty(shape, dtype=torch.float64, device=seeds.device)


uniforms.register_fake(_uniforms_like)


class _Rows:
    """Logits as rows, and what a scan leaves of each chunk of a row."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.vocab = logits.contiguous(), logits.shape[-1]
        self.num_rows, self.num_chunks = logits.numel() // self.vocab, _num_chunks(self.vocab)
        self.peaks, self.sums = (self.empty(self.num_chunks, dtype=torch.float32) for _ in range(2))
        self.places = self.empty(self.num_chunks, dtype=torch.int32)
        self.grid, self.blocks = (self.num_rows, self.num_chunks), _blocks(self.vocab)

    @property
    def per_chunk(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.peaks, self.places, self.sums

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.num_rows, *sizes, dtype=dtype, device=self.logits.device)

    def scan(self, temperatures: Tensor | None, floors: Tensor | None, per_row: int) -> None:
        _scan_kernel[self.grid](
            self.logits, temperatures, floors, *self.per_chunk, self.vocab, per_row, self.num_chunks,
            SHIFT=_shift(self.logits.dtype), HAS_FLOOR=floors is not None, HAS_TEMPERATURE=temperatures is not None,
            **self.blocks,
        )  # fmt: skip


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `specdec.sampling.distributions.largest`."""
    peaks, places, _ = summaries(logits)
    return peaks, places


def confidence(logits: Tensor) -> Tensor:
    """The largest probability of each row of logits [..., n], float32 [...]."""
    largest_probs: Tensor = summaries(logits)[2]
    return largest_probs


@torch.library.custom_op("specdec::summaries", mutates_args=())
def summaries(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [..., n]: the largest, NaN if any is; where the first of them stands; its probability."""
    out = _summaries_like(logits)
    if out[0].numel():
        rows = _Rows(logits)
        with on_device(logits.device):
            rows.scan(None, None, 1)
            chunks = {"chunks": rows.num_chunks, "CHUNKS": _power(rows.num_chunks)}
            _largest_kernel[(rows.num_rows,)](*rows.per_chunk, *out, rows.vocab, **chunks, num_warps=1)
    return out


def _summaries_like(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peaks = logits.new_empty(logits.shape[:-1])
    return peaks, torch.empty_like(peaks, dtype=torch.int64), torch.empty_like(peaks, dtype=torch.float32)


summaries.register_fake(_summaries_like)


@torch.library.custom_op("specdec::probabilities", mutates_args=())
def probabilities(
    logits: Tensor,
    temperature: Tensor,
    greedy: Tensor | None,
    top_k: Tensor | None,
    keeps_all: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Distributions float32 [rows, n, vocab] of logits of that shape, and whether they are ones, bool [rows, n].

    The parameters are each row's, as in `sampling.state.RowParams`. NaN throughout where there is no distribution,
    except in greedy rows, which are one-hot.
    """
    probs, finite = _probabilities_like(logits, temperature, greedy, top_k, keeps_all, top_p, min_p)
    if finite.numel() == 0:
        return probs, finite
    rows, per_row = _Rows(logits), logits.shape[1]
    with on_device(logits.device):
        floors = None if top_k is None else _search(rows, rows.logits, top_k, keeps_all, per_row)
        rows.scan(temperature, floors, per_row)
        place = rows.empty(dtype=torch.int32)
        _softmax_kernel[rows.grid](
            rows.logits, temperature, None if greedy is None else greedy.view(torch.uint8), floors, *rows.per_chunk,
            probs, finite.view(torch.uint8), place, rows.vocab, per_row, rows.num_chunks,
            CHUNKS=_power(rows.num_chunks), SHIFT=_shift(logits.dtype), HAS_FLOOR=floors is not None,
            HAS_GREEDY=greedy is not None, **rows.blocks,
        )  # fmt: skip
        if top_p is not None or min_p is not None:
            probs = _truncated(rows, probs, place, top_p, min_p, per_row)
    return probs, finite


def _probabilities_like(
    logits: Tensor,
    temperature: Tensor,
    greedy: Tensor | None,
    top_k: Tensor | None,
    keeps_all: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    return probs, torch.empty(logits.shape[:-1], dtype=torch.bool, device=logits.device)


probabilities.register_fake(_probabilities_like)


def _search(rows: _Rows, values: Tensor, bounds: Tensor, keeps_all: Tensor | None, per_row: int) -> Tensor:
    """The least key that top-k, or top-p if keeps_all is None, keeps in each row: [:, 1] of an int64 [rows, 2]."""
    is_top_k, shift = keeps_all is not None, _shift(values.dtype)
    low, high = ((-(2**31)) >> shift if is_top_k else 0), (0x7F800000 if is_top_k else 0x3F800000) >> shift
    states = [rows.empty(2, dtype=torch.int64) for _ in range(2)]
    partials = [rows.empty(_WAYS.value * rows.num_chunks, dtype=torch.int64) for _ in range(2)]
    given = (bounds, None if keeps_all is None else keeps_all.view(torch.uint8))
    constants = {"CHUNKS": _power(rows.num_chunks), "IS_TOP_K": is_top_k}
    for number in range(_num_passes(high - low)):
        before, after = (number + 1) % 2, number % 2
        _search_kernel[rows.grid](
            values, *given, states[before], partials[before], states[after], partials[after], rows.vocab, per_row,
            rows.num_chunks, LOW=low, HIGH=high, SHIFT=shift, IS_FIRST=number == 0, **constants, **rows.blocks,
        )  # fmt: skip
    _floor_kernel[(rows.num_rows,)](
        *given, states[after], partials[after], states[before], per_row, rows.num_chunks, **constants, num_warps=1
    )
    return states[before]


def _num_passes(width: int) -> int:
    """Passes that a search needs for a range of keys; each leaves at most a _WAYS-th of its width, rounded down."""
    passes = 0
    while width:
        width, passes = width // _WAYS.value, passes + 1
    return passes


def _truncated(
    rows: _Rows, probs: Tensor, place: Tensor, top_p: Tensor | None, min_p: Tensor | None, per_row: int
) -> Tensor:
    floors = None if top_p is None else _search(rows, probs, top_p, None, per_row)
    masses, out = rows.empty(rows.num_chunks, dtype=torch.int64), torch.empty_like(probs)
    sizes = (rows.vocab, per_row, rows.num_chunks)
    constants = {"HAS_TOP_P": top_p is not None, "HAS_MIN_P": min_p is not None, **rows.blocks}
    _kept_kernel[rows.grid](probs, floors, place, min_p, masses, *sizes, **constants)
    chunks = _power(rows.num_chunks)
    _normalize_kernel[rows.grid](probs, floors, place, top_p, min_p, masses, out, *sizes, CHUNKS=chunks, **constants)
    return out


@torch.library.custom_op("specdec::draw", mutates_args=())
def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """As `specdec.sampling.distributions.Dense.draw`, uniforms float64 [...].

    Sums are float64: within chunks of up to 4096 tokens first, then over chunks. Where rounding within a chunk hides
    the token it is the last one of the chunk that has a probability; without a distribution it is some token.
    """
    probs, uniforms, out = _aligned(probs), uniforms.contiguous(), _draw_like(probs, uniforms)
    if out.numel():
        vocab = probs.shape[-1]
        chunks, blocks = _num_chunks(vocab), _blocks(vocab)
        masses = torch.empty(out.numel(), chunks, dtype=torch.float64, device=probs.device)
        with on_device(probs.device):
            _mass_kernel[(out.numel(), chunks)](probs, masses, vocab, chunks, **blocks)
            _draw_kernel[(out.numel(),)](probs, uniforms, masses, out, vocab, chunks, CHUNKS=_power(chunks), **blocks)
    return out


def _draw_like(probs: Tensor, uniforms: Tensor) -> Tensor:
    return torch.empty(probs.shape[:-1], dtype=torch.int64, device=probs.device)


draw.register_fake(_draw_like)


@torch.library.custom_op("specdec::race", mutates_args=())
def race(probs: Tensor, uniforms: Tensor) -> Tensor:
    """As `specdec.sampling.distributions.race`, waiting times in float64."""
    probs, uniforms, out = probs.contiguous(), uniforms.contiguous(), _draw_like(probs, uniforms)
    if out.numel():
        vocab = probs.shape[-1]
        chunks = _num_chunks(vocab)
        waits = torch.empty(out.numel(), chunks, dtype=torch.float64, device=probs.device)
        places = torch.empty_like(waits, dtype=torch.int32)
        with on_device(probs.device):
            _wait_kernel[(out.numel(), chunks)](probs, uniforms, waits, places, vocab, chunks, **_blocks(vocab))
            _race_kernel[(out.numel(),)](waits, places, out, vocab, chunks, CHUNKS=_power(chunks), num_warps=1)
    return out


race.register_fake(_draw_like)


@torch.library.custom_op("specdec::num_accepted", mutates_args=())
def num_accepted(
    target: Sequence[Tensor | None],
    draft: Sequence[Tensor | None],
    tokens: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """How many leading draft tokens pass their test: int64 [batch].

    target, draft: probabilities and tokens: (probs, None) if dense, (None, tokens) if one-hot, (probs, tokens) if
    the distributions are over some tokens. Other arguments as for `specdec.verification.verify_tokens`.
    """
    out, num_drafted = torch.empty_like(lengths), tokens.shape[1]
    (target_probs, target_tokens), (draft_probs, draft_tokens) = map(_contiguous, (target, draft))
    size = 1 if draft_probs is None else draft_probs.shape[-1]
    with on_device(tokens.device):
        _accept_kernel[(len(tokens),)](
            target_probs, target_tokens, draft_probs, draft_tokens, tokens.contiguous(), lengths.contiguous(), uniforms,
            out, num_drafted, 1 if target_probs is None else target_probs.shape[-1], size, *uniforms.stride(),
            WIDTH=_power(num_drafted), TARGET=_form(target), DRAFT=_form(draft), STEPS=_steps(draft), num_warps=1,
        )  # fmt: skip
    return out


def _num_accepted_like(
    target: Sequence[Tensor | None],
    draft: Sequence[Tensor | None],
    tokens: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
) -> Tensor:
    return torch.empty_like(lengths)


num_accepted.register_fake(_num_accepted_like)


@torch.library.custom_op("specdec::final_token", mutates_args=())
def final_token(
    target: Tensor,
    draft: Sequence[Tensor | None],
    accepted: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """The token behind the accepted ones, int64 [batch], drawn as by `specdec.verification.draw_final`.

    target: [batch, k + 1, vocab], k > 0. draft: as for `num_accepted`. uniforms: float64 [batch, k + 1].
    The residual is nowhere written out. Sums are taken as by `draw`.
    """
    target, out, (probs, tokens) = _aligned(target), torch.empty_like(accepted), _contiguous(draft)
    num_rows, num_drafted, vocab = target.shape[0], target.shape[1] - 1, target.shape[2]
    size, chunks = 1 if probs is None else probs.shape[-1], _num_chunks(vocab)
    masses = torch.empty(num_rows, 2, chunks, dtype=torch.float64, device=target.device)
    weight = None if weight is None else weight.contiguous()
    form = {"FORM": _form(draft), "STEPS": _steps(draft), "HAS_WEIGHT": weight is not None, **_blocks(vocab)}
    form["enable_fp_fusion"] = False  # weight * target is rounded, as by torch, before the draft is subtracted
    sizes = (num_drafted, vocab, size, chunks)
    with on_device(target.device):
        _last_masses_kernel[(num_rows, chunks)](target, probs, tokens, accepted, weight, masses, *sizes, **form)
        _last_draw_kernel[(num_rows,)](
            target, probs, tokens, accepted, lengths.contiguous(), weight, uniforms, masses, out, *sizes,
            *uniforms.stride(), CHUNKS=_power(chunks), **form,
        )  # fmt: skip
    return out


def _final_token_like(
    target: Tensor,
    draft: Sequence[Tensor | None],
    accepted: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
    weight: Tensor | None,
) -> Tensor:
    return torch.empty_like(accepted)


final_token.register_fake(_final_token_like)


def _contiguous(distribution: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    probs, tokens = (None if each is None else _aligned(each) for each in distribution)
    return probs, tokens


def _form(distribution: Sequence[Tensor | None]) -> int:
    probs, tokens = distribution
    form = _DENSE if tokens is None else _ONE_HOT if probs is None else _PARTIAL
    return int(form.value)


def _steps(distribution: Sequence[Tensor | None]) -> int:
    """Halvings to find a token among some; none where they are all there, so that one kernel is compiled for all."""
    probs, tokens = distribution
    return 0 if probs is None or tokens is None else probs.shape[-1].bit_length()
