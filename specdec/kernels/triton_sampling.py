"""Triton kernels for sampling and verification on GPUs, behind `specdec.sampling` and `specdec.verification`.

Imported on first use, because it needs Triton, which comes with CUDA builds of torch. TRITON_INTERPRET=1 runs the
kernels on CPU tensors. Every entry point is a torch operator and supports fake tensors. None synchronizes with the host
or has a data-dependent shape, so CUDA graphs can capture all of them.

A row of the vocabulary is divided into chunks of equal size, and most entry points launch two kernels: the first writes
a partial result for each row and chunk, the second combines them. The result of a row is bit-identical whatever the
other rows of the batch: the chunk size depends only on the vocabulary; a row without truncation is not renormalized
because another row is truncated; and no sum depends on the order that the compiler chooses, which may vary with the
dtypes of the arguments, whether sizes are 1 or multiples of 16, and the alignment of tensors.

Therefore sums of exponentials within a chunk are integers in units of 2**-50, and sums of probabilities in top-p and
min-p are integers in units of 2**-61; both are exact in any order. float64 is used where probabilities meet a uniform,
which has 53 bits: in cumulative sums, acceptance tests and waiting times. float32 has only 24 bits, so a
token with a probability below 6e-8 would be drawn too often or never, depending on its position. The tensors of float64
sums are aligned to 16 bytes and batch-dependent sizes are not specialized, which leaves each sum with a single order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.runtime.devices import on_device

_WAYS = tl.constexpr(16)  # a pass of a search divides the range by this
_UNIT = tl.constexpr(2.0**61)  # scale of sums of probabilities as integers
_EXPONENTIAL_UNIT = tl.constexpr(2.0**50)  # scale of sums of up to 4096 exponentials, each at most 1
_DENSE, _ONE_HOT, _PARTIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # forms of a draft's distribution
_MIN_TEMPERATURE = tl.constexpr(2.0**-126)  # the smallest normal float32; some GPU units flush smaller numbers to 0
_UNIFORMS_PER_PROGRAM = 512
_ALIGNMENT = 16  # bytes; Triton specializes kernels on whether tensors are aligned to this
_VARYING = ("per_row", "chunks", "num_drafted", "uniform_0", "uniform_1")  # batch-dependent, so never specialized
_jit = partial(triton.jit, do_not_specialize=_VARYING)


# ---- shared by the kernels


@triton.jit
def _chunk(vocab, BLOCK: tl.constexpr):
    """(tokens of the program's chunk, mask of those within the vocabulary)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return at, at < vocab


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Map floats to int32 keys in the same order; SHIFT drops bits that are always 0. -0 equals 0; NaNs are extreme."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _units(x, UNIT: tl.constexpr):
    """Convert numbers to integer multiples of 1 / UNIT, and NaN to 0."""
    return tl.where(x == x, x * UNIT, 0.0).to(tl.int64)


@triton.jit
def _first_above(values, before, threshold, at, size):
    """The first index with a positive value where before + cumsum(values) exceeds the threshold.

    If rounding prevents that, the last index with a positive value; 0 if there is none.
    """
    above = (before + tl.cumsum(values, 0) > threshold) & (values > 0.0)
    first = tl.min(tl.where(above, at, size), 0)
    last = tl.max(tl.where(values > 0.0, at, 0), 0)
    return tl.where(first < size, first, last)


@triton.jit
def _place_of(token, tokens, size, mask, STEPS: tl.constexpr):
    """Look up tokens in an ascending list: (index, whether found), by STEPS bisections with 2**STEPS > size."""
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
    """A row's logits in float32; -inf below the row's floor and beyond the vocabulary."""
    x = tl.load(logits + row * vocab + at, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_FLOOR:
        x = tl.where(_key(x, SHIFT) < tl.load(floors + row * 2 + 1).to(tl.int32), -float("inf"), x)
    return x


@triton.jit
def _peak(x, at, mask, vocab):
    """(maximum ignoring NaN, index of its first occurrence, whether there is a NaN)."""
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
    """For each chunk: its maximum logit (NaN if any is), the index of it, the sum of exponentials relative to it."""
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
    """Combine a row's chunks: (maximum logit, its index, sum of exponentials, whether any logit is NaN)."""
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


# ---- the threshold of top-k and top-p: the smallest key such that the count or probability above it is below a bound


@triton.jit
def _probe(low, high, number):
    """The key tested by probe `number` of _WAYS - 1."""
    return low + ((high - low) * (number + 1)) // _WAYS


@triton.jit
def _narrowed(state, partials, bound, row, chunks, CHUNKS: tl.constexpr):
    """The range [low, high] of the threshold after a pass, from the range before and the sums above its probes."""
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
    """(bound on the count or probability above the threshold, whether the row keeps all tokens)."""
    if IS_TOP_K:
        bound = tl.load(bounds + row)
        is_all = tl.load(keeps_all + row) != 0
    else:
        top_p = tl.load(bounds + row).to(tl.float32)  # the dtype of the probabilities
        bound = tl.maximum(_units(top_p, _UNIT), 1)
        is_all = top_p >= 1.0
    return bound, is_all


@_jit
def _search_kernel(
    values, bounds, keeps_all, state_before, partials_before, state, partials, vocab, per_row, chunks,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
    IS_TOP_K: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """One pass: narrow the range by the previous pass; sum, per chunk, the values above each of _WAYS - 1 probes."""
    row = tl.program_id(0).to(tl.int64)
    bound, is_all = _bound(bounds, keeps_all, row // per_row, IS_TOP_K)
    if IS_FIRST:
        low = tl.full([], LOW, tl.int64)
        high = tl.where(is_all, low, tl.full([], HIGH, tl.int64))
    else:
        low, high = _narrowed(state_before, partials_before, bound, row, chunks, CHUNKS)
    if tl.program_id(1) == 0:
        tl.store(state + row * 2, low)
        tl.store(state + row * 2 + 1, high)
    if low < high:
        at, mask = _chunk(vocab, BLOCK)
        x = tl.load(values + row * vocab + at, mask=mask, other=0.0).to(tl.float32)
        keys = _key(x, SHIFT)
        if IS_TOP_K:
            counted = mask.to(tl.int32)
        else:
            counted = _units(x, _UNIT)
        for number in tl.static_range(_WAYS - 1):
            above = tl.sum(tl.where(keys > _probe(low, high, number).to(tl.int32), counted, 0), 0)
            tl.store(partials + (row * _WAYS + number) * chunks + tl.program_id(1), above.to(tl.int64))


@_jit
def _floor_kernel(
    bounds, keeps_all, state_before, partials_before, state, per_row, chunks,
    CHUNKS: tl.constexpr, IS_TOP_K: tl.constexpr,
):  # fmt: skip
    """Finish a search: writes the threshold to state[row, 1]."""
    row = tl.program_id(0).to(tl.int64)
    bound, _ = _bound(bounds, keeps_all, row // per_row, IS_TOP_K)
    low, high = _narrowed(state_before, partials_before, bound, row, chunks, CHUNKS)
    tl.store(state + row * 2, low)
    tl.store(state + row * 2 + 1, high)


@triton.jit
def _kept(
    probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr
):
    """A row's probabilities after top-p and min-p: 0 for removed tokens, not renormalized."""
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
    """For each chunk, the total probability kept."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    kept = _kept(probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P, HAS_MIN_P)
    tl.store(masses + row * chunks + tl.program_id(1), tl.sum(_units(kept, _UNIT), 0))


@triton.jit
def _is_cut(top_ps, min_ps, row, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr):
    """Whether the row itself has a top-p or min-p that may remove tokens."""
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
    """Renormalize truncated rows; copy the others unchanged."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    chunk = tl.arange(0, CHUNKS)
    mass = tl.sum(tl.load(masses + row * chunks + chunk, mask=chunk < chunks, other=0), 0)
    kept = _kept(probs, floors, places, min_ps, row, per_row, at, mask, vocab, HAS_TOP_P, HAS_MIN_P)
    # rows without kept probability become all NaN
    total = tl.where(mass > 0, mass.to(tl.float32) / _UNIT, float("nan"))
    whole = tl.load(probs + row * vocab + at, mask=mask, other=0.0)
    is_cut = _is_cut(top_ps, min_ps, row // per_row, HAS_TOP_P, HAS_MIN_P)
    p = tl.where(is_cut, tl.div_rn(kept, total), whole)
    tl.store(out + row * vocab + at, p, mask=mask)


# ---- draws


@triton.jit
def _excess(target, draft, tokens, draft_row, size, weight, at, mask, FORM: tl.constexpr, STEPS: tl.constexpr,
            HAS_WEIGHT: tl.constexpr):  # fmt: skip
    """max(weight * target - draft, 0) of a chunk of one target row and of row `draft_row` of the draft."""
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
    """For each chunk, its sum in float64."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    p = tl.load(probs + row * vocab + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(masses + row * chunks + tl.program_id(1), tl.sum(p, 0))


@triton.jit
def _chosen_chunk(masses, uniform, chunks, CHUNKS: tl.constexpr):
    """(first chunk where the cumulative sum exceeds uniform * total, the sum before it, uniform * total)."""
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
    """For each chunk, the minimum waiting time, -log(1 - uniform) / probability, and its token."""
    row = tl.program_id(0).to(tl.int64)
    at, mask = _chunk(vocab, BLOCK)
    p = tl.load(probs + row * vocab + at, mask=mask, other=0.0).to(tl.float64)
    uniform = tl.load(uniforms + row * vocab + at, mask=mask, other=0.0)
    left = 1.0 - uniform
    # -log(1 - u) = u * log(left) / (left - 1): rounding errors of the last two factors cancel; near u = 0 it is u
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
    """The probability, float64, of a token under each row's distribution, in any form."""
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
    """The number of leading draft tokens accepted per row; see `specdec.verification.verify_tokens`."""
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
    """For each chunk, the sums of the residual and of the target at the position after the accepted tokens."""
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
    """Draw the recovered token from the residual, or the bonus token from the target."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(accepted + row)
    here = target + (row * (num_drafted + 1) + place) * vocab
    draft_row = row * num_drafted + tl.minimum(place, num_drafted - 1)
    every = tl.arange(0, CHUNKS)
    excess = tl.load(masses + row * 2 * chunks + every, mask=every < chunks, other=0.0)
    # with an empty residual a rejection has probability 0: use the target
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
    """Launch options for a row of this size: the chunk size and the warps per chunk."""
    block = 4096 if size > 1024 else 1024
    return {"BLOCK": block, "num_warps": block // 512}


def _num_chunks(size: int) -> int:
    return -(-size // int(_blocks(size)["BLOCK"]))


def _power(number: int) -> int:
    """The next power of two, at least 16 so that few variants are compiled."""
    return max(16, 1 << (number - 1).bit_length())


def _aligned(tensor: Tensor) -> Tensor:
    """Make a tensor contiguous and aligned: for others Triton compiles a variant that may sum in another order."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _shift(dtype: torch.dtype) -> int:
    """The number of low bits that are always 0 when the dtype is converted to float32."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)


@torch.library.custom_op("specdec::uniforms", mutates_args=())
def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """`specdec.sampling.randomness.uniforms`, without copies of broadcast inputs."""
    words = [word.flatten(0, word.ndim - 3) for word in _broadcast(seeds, positions, roles, origins)]
    out = _uniforms_like(seeds, positions, roles, origins)
    grid = (-(-out.numel() // _UNIFORMS_PER_PROGRAM),)
    if out.numel():
        with on_device(out.device):
            _uniforms_kernel[grid](
                *words, out, out.numel(), *words[0].shape[1:], *(stride for word in words for stride in word.stride()),
                BLOCK=_UNIFORMS_PER_PROGRAM,
            )  # fmt: skip
    return out


def _broadcast(*words: Tensor) -> list[Tensor]:
    """Broadcast tensors to a common shape with at least three axes."""
    views = torch.broadcast_tensors(*words)
    missing = max(0, 3 - views[0].ndim)
    return [view[(None,) * missing] for view in views]


def _uniforms_like(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(seeds.shape, positions.shape, roles.shape, origins.shape)
    return torch.empty(shape, dtype=torch.float64, device=seeds.device)


uniforms.register_fake(_uniforms_like)


class _Rows:
    """Logits as rows, with the partial results of a scan for each chunk."""

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
    """`specdec.sampling.distributions.largest`."""
    peaks, places, _ = summaries(logits)
    return peaks, places


def confidence(logits: Tensor) -> Tensor:
    """The largest probability of each row of logits [..., n], float32 [...]."""
    largest_probs: Tensor = summaries(logits)[2]
    return largest_probs


@torch.library.custom_op("specdec::summaries", mutates_args=())
def summaries(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits [..., n]: (maximum, NaN if any logit is; first index of the maximum; its probability)."""
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
    """Distributions float32 [rows, n, vocab] from logits of that shape, and whether each is valid, bool [rows, n].

    The parameters are per row, as in `sampling.state.RowParams`. Invalid distributions are all NaN, except in greedy
    rows, which are one-hot.
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
    """The smallest key that top-k (or top-p if keeps_all is None) keeps in each row: column 1 of an int64 [rows, 2]."""
    is_top_k, shift = keeps_all is not None, _shift(values.dtype)
    low, high = ((-(2**31)) >> shift if is_top_k else 0), (0x7F800000 if is_top_k else 0x3F800000) >> shift
    states = [rows.empty(2, dtype=torch.int64) for _ in range(2)]
    partials = [rows.empty(_WAYS.value * rows.num_chunks, dtype=torch.int64) for _ in range(2)]
    parameters = (bounds, None if keeps_all is None else keeps_all.view(torch.uint8))
    constants = {"CHUNKS": _power(rows.num_chunks), "IS_TOP_K": is_top_k}
    for number in range(_num_passes(high - low)):
        before, after = (number + 1) % 2, number % 2
        _search_kernel[rows.grid](
            values, *parameters, states[before], partials[before], states[after], partials[after], rows.vocab, per_row,
            rows.num_chunks, LOW=low, HIGH=high, SHIFT=shift, IS_FIRST=number == 0, **constants, **rows.blocks,
        )  # fmt: skip
    _floor_kernel[(rows.num_rows,)](
        *parameters, states[after], partials[after], states[before], per_row, rows.num_chunks, **constants, num_warps=1
    )
    return states[before]


def _num_passes(width: int) -> int:
    """The number of passes to search a range of keys; each reduces its width by a factor of _WAYS, rounded down."""
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
    """`specdec.sampling.distributions.Dense.draw` with uniforms float64 [...].

    Sums are float64, within chunks of up to 4096 tokens and then over chunks. If rounding within the chosen chunk keeps
    its sum below the threshold, this is its last token with positive probability. For a row that is not a distribution
    the token is arbitrary.
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
    """`specdec.sampling.distributions.race` with waiting times in float64."""
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
    """The number of leading draft tokens accepted, int64 [batch].

    target, draft: distributions as (probs, tokens): (probs, None) if dense, (None, tokens) if one-hot, both if partial,
    over the given tokens. Other arguments as for `specdec.verification.verify_tokens`.
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
    """`specdec.verification.draw_final`: the token after the accepted ones, int64 [batch].

    target: [batch, k + 1, vocab], k > 0. draft: as for `num_accepted`. uniforms: float64 [batch, k + 1].
    The residual is never materialized. Sums are as in `draw`.
    """
    target, out, (probs, tokens) = _aligned(target), torch.empty_like(accepted), _contiguous(draft)
    num_rows, num_drafted, vocab = target.shape[0], target.shape[1] - 1, target.shape[2]
    size, chunks = 1 if probs is None else probs.shape[-1], _num_chunks(vocab)
    masses = torch.empty(num_rows, 2, chunks, dtype=torch.float64, device=target.device)
    weight = None if weight is None else weight.contiguous()
    form = {"FORM": _form(draft), "STEPS": _steps(draft), "HAS_WEIGHT": weight is not None, **_blocks(vocab)}
    form["enable_fp_fusion"] = False  # round weight * target before subtracting the draft, as torch does
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
    probs, tokens = (None if tensor is None else _aligned(tensor) for tensor in distribution)
    return probs, tokens


def _form(distribution: Sequence[Tensor | None]) -> int:
    probs, tokens = distribution
    form = _DENSE if tokens is None else _ONE_HOT if probs is None else _PARTIAL
    return int(form.value)


def _steps(distribution: Sequence[Tensor | None]) -> int:
    """Bisections to find a token in a partial distribution; 0 for other forms, so that they share a kernel."""
    probs, tokens = distribution
    return 0 if probs is None or tokens is None else probs.shape[-1].bit_length()
