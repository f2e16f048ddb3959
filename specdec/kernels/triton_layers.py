"""Decoder layers for decode steps on NVIDIA GPUs, as six or seven Triton kernels per layer.

A decode step reads all weights for a few tokens, so its time is bytes / bandwidth plus the launch overhead. The kernels
of a layer: QKV product + rotary embedding + cache write; attention over splits of the context; combination of the
splits; output product + residual; gate/up product + activation; down product + residual. (For models with query and key
norms, or head sizes not divisible by 16, rotary embedding + cache write are a separate kernel. So are the norms after
attention and MLP of Gemma 2 and 3, with the residual and the next norm.)

In bfloat16, RMSNorm is fused into its neighbors: the kernel that writes the residual stream also writes it times the
norm's weight, and the sums of squares; the next product divides by the root mean square at its end. (Normalizing within
the product's loop breaks the pipelining of loads and takes two to four times as long, measured on an H100.)

**Batch-invariant order of summation.** A product accumulates over blocks of inputs whose size depends only on the shape
and dtype of the weight, and each token is a row of its own in the tiles of the tensor cores. Attention splits the
context at multiples of `split_size`, whatever the length of a row, and combines the splits in order. So the result for
a token is bit-identical alone, in a batch, in a speculative step of any width and as a node of a tree. That is why
greedy speculative decoding emits exactly the tokens of plain decoding.

Needs Triton, which is included in CUDA builds of torch. TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specdec.runtime.devices import on_device

MAX_WIDTH = 64  # maximum tokens per row; for more, as in prompts, torch's matrix products are faster
_LOG2_E = 1.4426950408889634
_UNLIMITED = 1 << 30  # a window that is longer than any sequence
# the interpreter multiplies the bit patterns of bfloat16, so convert to float32 first: the products are the same
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_PRODUCT_OVERLAP, _OTHER_OVERLAP = 1, 1  # see `overlap`; 2 was slower on an H100, 0 by 6 % for 135M parameters
_PREFETCHED_BYTES = 1 << 10  # prefetched of each weight row of a program while the previous kernel ends
_SPLIT_BYTES = 32 << 10  # of keys, and of values, per program


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's weights: projections [out, in] with biases [out] or None, norms [in].

    gate_up: [2 * intermediate, hidden], gates first. query_norm, key_norm: [head_dim], or both None.
    norm_after_attention, norm_after_mlp: of the outputs of attention and MLP, before the residual is added; or both
    None. softcap: c for attention scores c * tanh(score / c), or None. residual_scale: of those outputs without such
    norms. activation: "silu" or "gelu_tanh".
    """

    qkv: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    norm_before_attention: Tensor | None
    norm_before_mlp: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float
    scaling: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_after_attention: Tensor | None = None
    norm_after_mlp: Tensor | None = None
    softcap: float | None = None
    residual_scale: float = 1.0
    activation: str = "silu"
    is_interleaved: bool = False  # whether the rows of qkv were permuted by `interleaved`


@dataclass(frozen=True, slots=True)
class Places:
    """Positions and cache columns of the tokens of a call, all int64.

    positions: [rows, width], in the sequence. places: [rows, width], cache columns. starts: [rows], valid columns
    before the call. paths: for a tree, [width, n], see `trees.columns.tree_paths`, else None. extent: an upper bound on
    the attended columns.
    """

    positions: Tensor
    places: Tensor
    starts: Tensor
    paths: Tensor | None
    extent: int


@dataclass(frozen=True, slots=True)
class Cached:
    """A layer's keys and values [rows, kv heads, columns, head_dim]; a token's column is taken modulo `columns`.

    window: how many positions a token attends to, up to its own; None for no limit.
    """

    keys: Tensor
    values: Tensor
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile sizes of a product: they depend on the weight's shape and dtype, never on the number of tokens."""

    outputs: int
    inputs: int
    num_stages: int
    num_warps: int


def run_layers(
    layers: Sequence[Layer],
    hidden: Tensor,
    angles: Sequence[tuple[Tensor, Tensor]],
    blocks: Sequence[Cached],
    at: Places,
    after: Sequence[int] = (),
) -> list[Tensor]:
    """Run decoder layers one after the other on hidden states [rows, width, hidden].

    Returns the hidden states after the first n layers, for each n of `after`, ascending; of all layers if it is empty.

    angles: each layer's tables of cos and sin [positions, head_dim]. blocks: of each layer, written at
    `at.places`.
    """
    rows, after = hidden.reshape(-1, hidden.shape[-1]).contiguous(), after or [len(layers)]
    with on_device(hidden.device):
        return [states.view_as(hidden) for states in _run_layers(layers, rows, angles, blocks, at, after)]


def _run_layers(
    layers: Sequence[Layer],
    hidden: Tensor,
    angles: Sequence[tuple[Tensor, Tensor]],
    blocks: Sequence[Cached],
    at: Places,
    after: Sequence[int],
) -> list[Tensor]:
    scratch = _Scratch.of(layers[0], at, hidden)
    states, normed = hidden, normed_states(hidden, layers[0].norm_before_attention, layers[0].epsilon)
    following = [*(layer.norm_before_attention for layer in layers[1:]), None]
    results = []
    each = zip(layers, blocks, angles, following, strict=True)
    for number, (layer, cached, turns, next_norm) in enumerate(each, 1):
        if layer.is_interleaved:
            _launch_product(normed, *layer.qkv, scratch.queries, heads=_Heads(layer, turns, cached, at))
        else:
            _place_heads(layer, product(normed, *layer.qkv), turns, cached, at, scratch)
        attended = _attend(layer, cached, at, scratch)
        states, normed = _added(
            layer, layer.output, layer.norm_after_attention, attended, states, layer.norm_before_mlp
        )
        inner = product(normed, *layer.gate_up, activation=layer.activation)
        states, normed = _added(layer, layer.down, layer.norm_after_mlp, inner, states, next_norm)
        if number in after:
            results.append(states)
    return results


def _added(
    layer: Layer,
    projection: tuple[Tensor, Tensor | None],
    norm: Tensor | None,
    x: Tensor,
    residual: Tensor,
    next_norm: Tensor | None,
) -> tuple[Tensor, Normed]:
    """residual + the projection of x after `norm`, before and after the next norm."""
    if norm is None:
        return added_product(x, *projection, residual, next_norm, layer.epsilon, scale=layer.residual_scale)
    return normed_sum(residual, product(x, *projection), norm, next_norm, layer.epsilon)


@dataclass(frozen=True, slots=True)
class Normed:
    """States after an RMSNorm, [tokens, n]; with `squares`, products of them must still be divided by the norm.

    squares: float32 [tokens, parts], partial sums of the squares of the states before the norm.
    """

    states: Tensor
    squares: Tensor | None = None
    epsilon: float = 0.0


def normed_states(states: Tensor, norm: Tensor | None, epsilon: float) -> Normed:
    """States [tokens, n] after an RMSNorm with this weight, or unchanged without one."""
    if norm is None:
        return Normed(states)
    if not _defers_norm(states):
        return Normed(rms_norm(states, norm, epsilon))
    scaled, squares = torch.empty_like(states), _float32(states, len(states), 1)
    size = states.shape[1]
    block = triton.next_power_of_2(size)
    _scale_kernel[(len(states),)](
        states, norm, scaled, squares, SIZE=size, BLOCK=block, **overlap(states, _OTHER_OVERLAP), num_warps=4
    )
    return Normed(scaled, squares, epsilon)


def normed_sum(
    residual: Tensor, x: Tensor, norm: Tensor, next_norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Normed]:
    """residual + RMSNorm of x, [tokens, n], before and after the next RMSNorm."""
    out, size = torch.empty_like(x), x.shape[1]
    normed = out if next_norm is None else torch.empty_like(x)
    _normed_sum_kernel[(len(x),)](
        residual,
        x,
        norm,
        next_norm,
        out,
        normed,
        epsilon,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        **overlap(x, _OTHER_OVERLAP),
        num_warps=4,
    )
    return out, Normed(normed)


def added_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor | None,
    epsilon: float,
    *,
    scale: float = 1.0,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Normed]:
    """residual + scale * product of x, [tokens, out], before and after an RMSNorm with the weight `norm`."""
    out, blocks = torch.empty_like(residual), blocks or default_blocks(len(weight), weight.shape[1], x.dtype)
    if norm is None or not _defers_norm(x):
        _launch_product(Normed(x), weight, bias, out, residual=_Residual(residual, scale), blocks=blocks)
        return out, normed_states(out, norm, epsilon)
    scaled, squares = torch.empty_like(out), _float32(out, len(out), triton.cdiv(len(weight), blocks.outputs))
    _launch_product(
        Normed(x),
        weight,
        bias,
        out,
        residual=_Residual(residual, scale, norm, scaled, squares),
        blocks=blocks,
    )
    return out, Normed(scaled, squares, epsilon)


def product(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """x [tokens, in] times the transposed weight [out, in], accumulated in float32: [tokens, out].

    activation: "silu" or "gelu_tanh"; weight is then [2 * out, in], the gates first; returns activation(gate) * other.
    blocks: overrides `default_blocks`, for measurements.
    """
    x = x if isinstance(x, Normed) else Normed(x)
    out = x.states.new_empty(len(x.states), len(weight) // 2 if activation else len(weight))
    with on_device(out.device):
        _launch_product(x, weight, bias, out, activation=activation, blocks=blocks)
    return out


def supports_interleaving(head_dim: int, *, has_norms: bool) -> bool:
    """Whether the QKV product can rotate and store heads of this size; query and key norms need a whole head first."""
    return head_dim % 16 == 0 and not has_norms


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Permute rows [heads * head_dim, ...] of a QKV weight such that elements rotated together are in the same tile.

    The order within a head: 8 elements of its first half, the matching 8 of its second half, the next 8, and so on.
    """
    return rows.view(-1, 2, head_dim // 16, 8, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def deinterleaved(outputs: Tensor, head_dim: int) -> Tensor:
    """Undo `interleaved` on outputs [..., heads * head_dim]."""
    return outputs.view(*outputs.shape[:-1], -1, head_dim // 16, 2, 8).transpose(-3, -2).reshape(outputs.shape)


@dataclass(frozen=True, slots=True)
class _Heads:
    """Destination of the heads of a QKV product with interleaved rows; fields as for `run_layers`."""

    layer: Layer
    angles: tuple[Tensor, Tensor]
    cached: Cached
    at: Places


@dataclass(frozen=True, slots=True)
class _Residual:
    """What a product is added to, scaled, and where it also goes: times the weight `norm`, and as sums of squares."""

    states: Tensor
    scale: float = 1.0
    norm: Tensor | None = None
    scaled: Tensor | None = None
    squares: Tensor | None = None


def _launch_product(
    x: Normed,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    heads: _Heads | None = None,
    residual: _Residual | None = None,
    activation: str | None = None,
    blocks: Blocks | None = None,
) -> None:
    gated = activation is not None
    num_tokens, num_inputs = x.states.shape
    num_outputs, num_parts = len(weight) // (1 + gated), 0 if x.squares is None else x.squares.shape[1]
    cos, sin = heads.angles if heads else (None, None)
    blocks = blocks or default_blocks(num_outputs, num_inputs, weight.dtype, gated)
    stage_bytes = blocks.inputs * blocks.outputs * (1 + gated) * weight.element_size()
    token_bytes = blocks.inputs * weight.element_size()
    block_tokens, num_stages = _pipeline(num_tokens, blocks, token_bytes, stage_bytes, _shared_bytes(weight.device))
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_outputs, blocks.outputs))
    _product_kernel[grid](
        x.states,
        weight,
        bias,
        x.squares,
        residual.states if residual else None,
        residual.norm if residual else None,
        out,
        residual.scaled if residual else None,
        residual.squares if residual else None,
        cos,
        sin,
        heads.at.positions if heads else None,
        heads.at.places if heads else None,
        heads.cached.keys if heads else None,
        heads.cached.values if heads else None,
        num_tokens,
        x.epsilon,
        residual.scale if residual else 1.0,
        heads.at.positions.shape[1] if heads else 1,
        len(heads.angles[0]) - 1 if heads else 0,
        heads.cached.keys.shape[2] if heads else 0,
        heads.cached.keys.stride(0) if heads else 0,
        heads.cached.keys.stride(1) if heads else 0,
        NUM_HEADS=heads.layer.num_heads if heads else 0,
        NUM_KV_HEADS=heads.layer.num_kv_heads if heads else 0,
        HEAD_DIM=heads.layer.head_dim if heads else 16,
        NUM_INPUTS=num_inputs,
        NUM_OUTPUTS=num_outputs,
        NUM_PARTS=num_parts,
        BLOCK_PARTS=max(16, triton.next_power_of_2(num_parts)),
        GATED=gated,
        GELU=activation == "gelu_tanh",
        PRECISION=_precision(weight.dtype),
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUTPUTS=blocks.outputs,
        BLOCK_INPUTS=blocks.inputs,
        PREFETCHED=_PREFETCHED_BYTES // weight.element_size(),
        **overlap(weight, _PRODUCT_OVERLAP),
        num_stages=num_stages,
        num_warps=blocks.num_warps,
    )


def _pipeline(
    num_tokens: int, blocks: Blocks, token_bytes: int, weight_bytes: int, shared_bytes: int
) -> tuple[int, int]:
    """(tokens per program, pipeline stages) that fit into shared memory; neither changes any result.

    token_bytes, weight_bytes: bytes per stage, of a token's inputs and of the weights.
    """
    for block_tokens in (64, 32, 16):
        num_fitting = shared_bytes // (block_tokens * token_bytes + weight_bytes) - 1
        if block_tokens == 16 or (num_fitting >= 2 and num_tokens > block_tokens // 2):
            break
    return block_tokens, max(2, min(blocks.num_stages, num_fitting))


@cache
def _shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory available to a program."""
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _defers_norm(x: Tensor) -> bool:
    """Whether products apply the scale of a norm at their end: bfloat16 sums of squares are exact, without overflow."""
    return x.dtype == torch.bfloat16


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., n]."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(size)
    with on_device(x.device):
        _norm_kernel[(x.numel() // size,)](
            x, weight, out, epsilon, SIZE=size, BLOCK=block, **overlap(x, _OTHER_OVERLAP), num_warps=4
        )
    return out


def default_blocks(num_outputs: int, num_inputs: int, dtype: torch.dtype, gated: bool = False) -> Blocks:
    """Tile sizes of a product: the fastest of twelve on an H100, for shapes of 135M, 1B and 8B models."""
    if dtype == torch.float32:
        return Blocks(32, 32, 2, 4)
    if gated:
        return Blocks(64, 128, 4, 4) if num_outputs >= 4096 else Blocks(16, 64, 8, 2)
    if num_outputs <= 2048 and num_inputs > 2 * num_outputs:
        return Blocks(16, 256, 8, 4)  # few programs, each with many weights to read
    return Blocks(64, 128, 4, 4) if 4096 < num_outputs <= 16384 else Blocks(16, 128, 8, 2)


def split_size(head_dim: int, dtype: torch.dtype) -> int:
    """Cache columns per attention split: constant over calls, because it determines the order of summation."""
    limit = _SPLIT_BYTES // 2 if dtype == torch.float32 else _SPLIT_BYTES  # more spills registers
    return max(16, min(128, limit // (_padded(head_dim) * dtype.itemsize)))


def overlap(x: Tensor, level: int) -> dict[str, Any]:
    """Launch options to start a kernel before the previous one has ended (programmatic dependent launch, Hopper).

    level: 0 disables it; 1 starts when the last programs of the previous kernel end, 2 when they have started.
    """
    if not level or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"OVERLAPS": 0}
    return {"OVERLAPS": level, "launch_pdl": True}


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # only affects float32 products


def _padded(head_dim: int) -> int:
    """The head size, padded for the tensor cores."""
    return max(16, int(triton.next_power_of_2(head_dim)))


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Buffers reused by all layers. queries: [tokens, heads, head_dim].

    sums: unnormalized sums of values per split, float32 [tokens, heads, splits, head_dim]. peaks, totals: maximum score
    and sum of weights per split, float32 [tokens, heads, splits]. split: columns per split.
    """

    queries: Tensor
    sums: Tensor
    peaks: Tensor
    totals: Tensor
    split: int

    @classmethod
    def of(cls, layer: Layer, at: Places, hidden: Tensor) -> _Scratch:
        split = split_size(layer.head_dim, hidden.dtype)
        heads = (at.positions.numel(), layer.num_heads)
        shape = (*heads, triton.cdiv(at.extent, split))
        return cls(
            hidden.new_empty(*heads, layer.head_dim),
            _float32(hidden, *shape, layer.head_dim),
            _float32(hidden, *shape),
            _float32(hidden, *shape),
            split,
        )


def _place_heads(
    layer: Layer,
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    cached: Cached,
    at: Places,
    scratch: _Scratch,
) -> None:
    """Rotate queries and keys by their positions; write keys and values to the cache."""
    (cos, sin), keys = angles, cached.keys
    num_programs = (len(qkv), layer.num_heads + 2 * layer.num_kv_heads)
    _place_kernel[num_programs](
        qkv,
        cos,
        sin,
        layer.query_norm,
        layer.key_norm,
        at.positions,
        at.places,
        scratch.queries,
        keys,
        cached.values,
        at.positions.shape[1],
        len(cos) - 1,
        keys.shape[2],
        keys.stride(0),
        keys.stride(1),
        layer.epsilon,
        NUM_HEADS=layer.num_heads,
        NUM_KV_HEADS=layer.num_kv_heads,
        HEAD_DIM=layer.head_dim,
        BLOCK=triton.next_power_of_2(layer.head_dim // 2),
        **overlap(qkv, _OTHER_OVERLAP),
        num_warps=1,
    )


def _attend(layer: Layer, cached: Cached, at: Places, scratch: _Scratch) -> Tensor:
    """Attention of `scratch.queries`: [tokens, heads * head_dim]."""
    keys, window = cached.keys, _UNLIMITED if cached.window is None else cached.window
    (rows, width), group = at.positions.shape, layer.num_heads // layer.num_kv_heads
    is_tree = at.paths is not None
    num_tiles = width * triton.cdiv(group, 16) if is_tree else triton.cdiv(width * group, 16)
    num_splits = scratch.peaks.shape[2]
    _attend_kernel[(num_splits, layer.num_kv_heads, rows * num_tiles)](
        scratch.queries,
        keys,
        cached.values,
        at.positions,
        at.starts,
        at.paths,
        scratch.sums,
        scratch.peaks,
        scratch.totals,
        width,
        num_tiles,
        at.paths.shape[1] if at.paths is not None else 0,
        num_splits,
        keys.shape[2],
        window,
        keys.stride(0),
        keys.stride(1),
        layer.scaling * _LOG2_E if layer.softcap is None else layer.scaling / layer.softcap,
        0.0 if layer.softcap is None else layer.softcap * _LOG2_E,
        NUM_HEADS=layer.num_heads,
        HEAD_DIM=layer.head_dim,
        GROUP=group,
        IS_TREE=is_tree,
        IS_CAPPED=layer.softcap is not None,
        SPLIT=scratch.split,
        BLOCK_DIM=_padded(layer.head_dim),
        PRECISION=_precision(keys.dtype),
        **overlap(keys, _OTHER_OVERLAP),
        num_warps=8 if 2 * scratch.split * _padded(layer.head_dim) * keys.element_size() > _SPLIT_BYTES else 4,
        num_stages=1,
    )
    attended = scratch.queries.new_empty(len(scratch.queries), layer.num_heads * layer.head_dim)
    _combine_kernel[(len(scratch.queries), layer.num_heads)](
        scratch.sums,
        scratch.peaks,
        scratch.totals,
        at.positions,
        attended,
        num_splits,
        window,
        NUM_HEADS=layer.num_heads,
        HEAD_DIM=layer.head_dim,
        SPLIT=scratch.split,
        BLOCK_DIM=_padded(layer.head_dim),
        BLOCK_SPLITS=16,
        **overlap(attended, _OTHER_OVERLAP),
        num_warps=4,
    )
    return attended


# ---- kernels. Token counts are never specialized: one compiled kernel for all, so one order of summation.


@triton.jit
def _prefetch_rows(rows, SIZE: tl.constexpr, PREFETCHED: tl.constexpr):
    """Prefetch the first elements of rows (pointers [n]) into the L2 cache."""
    line: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    lines = tl.minimum(tl.arange(0, PREFETCHED // line) * line, SIZE - 1)
    at = (rows[:, None] + lines[None, :]).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_tokens", "width", "last_position", "num_columns", "slot_stride", "head_stride"])
def _product_kernel(
    x,
    weight,
    bias,
    squares,
    residual,
    norm,
    out,
    scaled_out,
    squares_out,
    cos,
    sin,
    positions,
    places,
    keys,
    values_out,
    num_tokens,
    epsilon,
    residual_scale,
    width,
    last_position,
    num_columns,
    slot_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PREFETCHED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    is_token, is_column = tokens < num_tokens, columns < NUM_OUTPUTS
    x_at = x + tokens[:, None].to(tl.int64) * NUM_INPUTS + inputs[None, :]
    weight_at = weight + columns[None, :].to(tl.int64) * NUM_INPUTS + inputs[:, None]
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        rows = weight + tl.minimum(columns, NUM_OUTPUTS - 1).to(tl.int64) * NUM_INPUTS
        if PREFETCHED > 0:
            _prefetch_rows(rows, NUM_INPUTS, PREFETCHED)
        if GATED and PREFETCHED > 0:
            _prefetch_rows(rows + NUM_OUTPUTS * NUM_INPUTS, NUM_INPUTS, PREFETCHED)
        gdc_wait()
    if squares is not None:
        part = tl.arange(0, BLOCK_PARTS)
        part_at = squares + tokens[:, None] * NUM_PARTS + part[None, :]
        parts = tl.load(part_at, mask=is_token[:, None] & (part[None, :] < NUM_PARTS), other=0.0)
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.float32)
    others = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.float32)
    for start in range(0, NUM_INPUTS, BLOCK_INPUTS):
        is_input = start + inputs < NUM_INPUTS
        is_weight = is_input[:, None] & is_column[None, :]
        values = tl.load(x_at + start, mask=is_token[:, None] & is_input[None, :], other=0.0)
        w = tl.load(weight_at + start, mask=is_weight, other=0.0)
        if _INTERPRETED:
            values, w = values.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(values, w, sums, input_precision=PRECISION)
        if GATED:
            w = tl.load(weight_at + NUM_OUTPUTS * NUM_INPUTS + start, mask=is_weight, other=0.0)
            others = tl.dot(values, w.to(values.dtype), others, input_precision=PRECISION)
    if squares is not None:
        scale = tl.rsqrt(_row_sums(parts, BLOCK_PARTS) / NUM_INPUTS + epsilon)
        sums *= scale[:, None]
        others *= scale[:, None]
    if bias is not None:
        sums += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if GATED:
            others += tl.load(bias + NUM_OUTPUTS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        _place_interleaved(
            sums.to(out.dtype.element_ty).to(tl.float32), tokens, columns, is_token, is_column,
            cos, sin, positions, places, out, keys, values_out, width, last_position, num_columns, slot_stride,
            head_stride, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS, BLOCK_OUTPUTS,
        )  # fmt: skip
    else:
        if GATED:
            logit = sums
            if GELU:  # by tanh, written as a logistic function: 1.596 is 2 sqrt(2 / pi)
                logit = tl.maximum(sums * (1.5957691216057308 + 0.07135481627159471 * sums * sums), -87.0)
            sums = sums / (1.0 + tl.exp(-logit)) * others
        at = tokens[:, None].to(tl.int64) * NUM_OUTPUTS + columns[None, :]
        is_output = is_token[:, None] & is_column[None, :]
        if residual is not None:
            sums = sums * residual_scale + tl.load(residual + at, mask=is_output, other=0.0).to(tl.float32)
        states = sums.to(out.dtype.element_ty)
        tl.store(out + at, states, mask=is_output)
        if norm is not None:
            wide = states.to(tl.float32)
            scaled = wide * tl.load(norm + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
            tl.store(scaled_out + at, scaled.to(out.dtype.element_ty), mask=is_output)
            part_at = squares_out + tokens * tl.num_programs(1) + tl.program_id(1)
            tl.store(part_at, _row_sums_of_squares(wide, BLOCK_OUTPUTS), mask=is_token)


@triton.jit
def _place_interleaved(
    x, tokens, columns, is_token, is_column, cos, sin, positions, places, queries, keys, values, width, last_position,
    num_columns, slot_stride, head_stride, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys by position and write keys and values to the cache. x: a tile of interleaved heads."""
    pairs = tl.reshape(x, (BLOCK_TOKENS, BLOCK_OUTPUTS // 16, 2, 8)).permute(0, 1, 3, 2)
    low, high = tl.split(pairs)
    other = tl.reshape(tl.join(high, low).permute(0, 1, 3, 2), (BLOCK_TOKENS, BLOCK_OUTPUTS))
    head, within = columns // HEAD_DIM, columns % HEAD_DIM
    is_high = within // 8 % 2
    dim = is_high * (HEAD_DIM // 2) + within // 16 * 8 + within % 8
    is_here = is_token[:, None] & is_column[None, :]
    position = tl.minimum(tl.load(positions + tokens, mask=is_token, other=0), last_position)
    angle = position[:, None] * HEAD_DIM + dim[None, :]
    is_turned = is_here & (head < NUM_HEADS + NUM_KV_HEADS)[None, :]
    turn = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    turned = x * tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
    turned += tl.where(is_high[None, :] > 0, other, -other) * turn
    turned = turned.to(queries.dtype.element_ty)
    query_at = queries + (tokens[:, None].to(tl.int64) * NUM_HEADS + head[None, :]) * HEAD_DIM + dim[None, :]
    tl.store(query_at, turned, mask=is_here & (head < NUM_HEADS)[None, :])
    place = tl.load(places + tokens, mask=is_token, other=0) % num_columns
    state_at = ((tokens // width).to(tl.int64) * slot_stride + place * HEAD_DIM)[:, None] + dim[None, :]
    kv_head = head - NUM_HEADS
    key_at = keys + state_at + kv_head[None, :] * head_stride
    tl.store(key_at, turned, mask=is_here & ((kv_head >= 0) & (kv_head < NUM_KV_HEADS))[None, :])
    value_at = values + state_at + (kv_head - NUM_KV_HEADS)[None, :] * head_stride
    tl.store(value_at, turned, mask=is_here & (kv_head >= NUM_KV_HEADS)[None, :])


@triton.jit
def _row_sums(values, SIZE: tl.constexpr):
    """Sums float32 [n] of values float32 [n, SIZE], as a product, so that their order does not depend on n."""
    sums = tl.dot(values, tl.full((SIZE, 16), 1.0, tl.float32), input_precision="ieee")
    return tl.max(sums, 1)  # all columns are equal


@triton.jit
def _row_sums_of_squares(values, SIZE: tl.constexpr):
    """`_row_sums` of the squares of bfloat16 values [n, SIZE], exactly: a 16-bit square is the sum of two bfloat16s."""
    squares = values * values
    if _INTERPRETED:  # the interpreter converts to bfloat16 with another rounding
        return _row_sums(squares, SIZE)
    ones = tl.full((SIZE, 16), 1.0, tl.bfloat16)
    high = squares.to(tl.bfloat16)
    low = (squares - high.to(tl.float32)).to(tl.bfloat16)
    return tl.max(tl.dot(low, ones, tl.dot(high, ones)), 1)


@triton.jit
def _scale_kernel(x, weight, scaled, squares, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """For a token: its states times the norm's weight, and the sum of their squares."""
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    at = tl.arange(0, BLOCK)
    token, inside = tl.program_id(0).to(tl.int64), at < SIZE
    values = tl.load(x + token * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + token, tl.sum(values * values, 0))
    values *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + token * SIZE + at, values.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(x, weight, out, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    at = tl.arange(0, BLOCK)
    first, inside = tl.program_id(0).to(tl.int64) * SIZE, at < SIZE
    values = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    values = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed_sum_kernel(
    residual,
    x,
    norm,
    next_norm,
    out,
    normed,
    epsilon,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """For a token: residual + the norm of x, rounded, and the next norm of the sum."""
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    at = tl.arange(0, BLOCK)
    first, inside = tl.program_id(0).to(tl.int64) * SIZE, at < SIZE
    values = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    values = values * scale * tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
    values = values.to(out.dtype.element_ty).to(tl.float32)
    states = (values + tl.load(residual + first + at, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + first + at, states, mask=inside)
    if next_norm is not None:
        values = states.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
        values = values * scale * tl.load(next_norm + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + first + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width", "last_position", "num_columns", "slot_stride", "head_stride"])
def _place_kernel(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    positions,
    places,
    queries,
    keys,
    values,
    width,
    last_position,
    num_columns,
    slot_stride,
    head_stride,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rotate and store one head of one token. Heads are numbered: queries, then keys, then values."""
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    at = tl.arange(0, BLOCK)
    inside = at < half
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM + at
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if head < NUM_HEADS + NUM_KV_HEADS:
        if query_norm is not None:
            norm = query_norm
            if head >= NUM_HEADS:
                norm = key_norm
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / HEAD_DIM + epsilon)
            low = low * scale * tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
            high = high * scale * tl.load(norm + half + at, mask=inside, other=0.0).to(tl.float32)
        angle = tl.minimum(tl.load(positions + token), last_position) * HEAD_DIM + at
        cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        turned = low * cos_low - high * sin_low
        high = high * cos_high + low * sin_high
        low = turned
    if head < NUM_HEADS:
        target = queries + (token * NUM_HEADS + head) * HEAD_DIM + at
    else:
        within = (token // width) * slot_stride + tl.load(places + token) % num_columns * HEAD_DIM + at
        if head < NUM_HEADS + NUM_KV_HEADS:
            target = keys + within + (head - NUM_HEADS) * head_stride
        else:
            target = values + within + (head - NUM_HEADS - NUM_KV_HEADS) * head_stride
    tl.store(target, low.to(queries.dtype.element_ty), mask=inside)
    tl.store(target + half, high.to(queries.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent, by a polynomial near 0, where the quotient of exponentials cancels."""
    square, faded = x * x, tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - faded) / (1.0 + faded)
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, small, large)


@triton.jit(do_not_specialize=["width", "num_tiles", "path_length", "num_splits", "num_columns", "window"])
def _attend_kernel(
    queries,
    keys,
    values,
    positions,
    starts,
    paths,
    sums,
    peaks,
    totals,
    width,
    num_tiles,
    path_length,
    num_splits,
    num_columns,
    window,
    slot_stride,
    head_stride,
    scale,
    cap,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    IS_TREE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attention to one split of one key/value head, for up to 16 queries of a row (of one node in a tree)."""
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    split, kv_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (tile // num_tiles).to(tl.int64)
    tile = tile % num_tiles
    item = tl.arange(0, 16)
    if IS_TREE:
        tiles_per_node: tl.constexpr = (GROUP + 15) // 16
        node = tile // tiles_per_node
        member = tile % tiles_per_node * 16 + item
        column = node + 0 * item
        is_query = member < GROUP
    else:
        node = 0
        member = (tile * 16 + item) % GROUP
        column = (tile * 16 + item) // GROUP
        is_query = column < width
    token = row * width + column
    position = tl.load(positions + token, mask=is_query, other=-1).to(tl.int32)
    last, first = tl.max(position, 0), split * SPLIT
    oldest = tl.min(tl.where(is_query, position, last), 0) - window + 1
    if (first <= last) & (first + SPLIT > oldest):
        place = first + tl.arange(0, SPLIT)
        exists = place <= last
        stored = place
        if IS_TREE:  # in order of position: the valid columns, then those of the nodes on the path to this one
            start = tl.load(starts + row).to(tl.int32)
            depth = place - start
            on_path = tl.load(paths + node * path_length + tl.maximum(depth, 0), mask=exists & (depth >= 0), other=0)
            stored = tl.where(depth >= 0, start + on_path.to(tl.int32), place)
        stored = stored % num_columns
        dim = tl.arange(0, BLOCK_DIM)
        has_dim = dim < HEAD_DIM
        head = token * NUM_HEADS + kv_head * GROUP + member
        query_at = queries + head[:, None] * HEAD_DIM + dim[None, :]
        query = tl.load(query_at, mask=is_query[:, None] & has_dim[None, :], other=0.0)
        head_at, state_at = row * slot_stride + kv_head * head_stride, stored[:, None] * HEAD_DIM + dim[None, :]
        key = tl.load(keys + head_at + state_at, mask=exists[:, None] & has_dim[None, :], other=0.0)
        if _INTERPRETED:
            query, key = query.to(tl.float32), key.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if IS_CAPPED:
            scores = _tanh(scores) * cap
        behind = position[:, None] - place[None, :]
        scores = tl.where((behind >= 0) & (behind < window), scores, float("-inf"))
        peak = tl.max(scores, 1)
        weights = tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        value = tl.load(values + head_at + state_at, mask=exists[:, None] & has_dim[None, :], other=0.0)
        weights_of_values = weights.to(value.dtype)
        if _INTERPRETED:
            weights_of_values, value = weights_of_values.to(tl.float32), value.to(tl.float32)
        attended = tl.dot(weights_of_values, value, input_precision=PRECISION)
        at, is_seen = head * num_splits + split, is_query & (first <= position)
        tl.store(peaks + at, peak, mask=is_seen)
        tl.store(totals + at, tl.sum(weights, 1), mask=is_seen)
        tl.store(sums + at[:, None] * HEAD_DIM + dim[None, :], attended, mask=is_seen[:, None] & has_dim[None, :])


@triton.jit(do_not_specialize=["num_splits", "window"])
def _combine_kernel(
    sums,
    peaks,
    totals,
    positions,
    out,
    num_splits,
    window,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Combine the splits of one head of one token, in order, from its window's first to that of its own position."""
    if OVERLAPS > 1:
        gdc_launch_dependents()
    if OVERLAPS > 0:
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    number = tl.minimum(position // SPLIT + 1, num_splits)
    dim = tl.arange(0, BLOCK_DIM)
    has_dim = dim < HEAD_DIM
    first = (token * NUM_HEADS + head) * num_splits
    attended = tl.zeros((BLOCK_DIM,), tl.float32)
    total, peak = 0.0, float("-inf")
    start = tl.maximum(position - window + 1, 0) // SPLIT
    while start < number:  # the interpreter does not support range() with tensors
        split = start + tl.arange(0, BLOCK_SPLITS)
        is_split = split < number
        highest = tl.load(peaks + first + split, mask=is_split, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(highest, 0))
        weights, faded = tl.exp2(highest - new_peak), tl.exp2(peak - new_peak)
        total = total * faded + tl.sum(weights * tl.load(totals + first + split, mask=is_split, other=0.0), 0)
        at = (first + split)[:, None] * HEAD_DIM + dim[None, :]
        part = tl.load(sums + at, mask=is_split[:, None] & has_dim[None, :], other=0.0)
        attended = attended * faded + tl.sum(weights[:, None] * part, 0)
        peak = new_peak
        start += BLOCK_SPLITS
    at = (token * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(out + at, (attended / total).to(out.dtype.element_ty), mask=has_dim)
