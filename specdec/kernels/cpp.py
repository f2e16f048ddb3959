"""C++ kernels for decoder layers and sampling on CPUs, compiled once per machine into the cache folder.

They require Linux, a C++ compiler and AVX-512 (AVX512-BF16 for bfloat16); without these, torch operations are used.
Only products with quantized weights are compiled for other CPUs, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.quantized import KINDS, Packed
from specdec.runtime.artifacts import LoadError, cache_root, made_once
from specdec.runtime.fallbacks import fall_back

BLOCK = 32  # outputs per block of a projection
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)
ACTIVATIONS = ("silu", "gelu_tanh")  # in the order of decoder_layer.cpp
_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("decoder_layer.cpp", "quantized.cpp", "sampling.cpp"))
_PORTABLE_SOURCES = (_FOLDER / "quantized.cpp",)
_HEADERS = tuple(_FOLDER / name for name in ("quantized.h", "vectors.h"))
_UNUSED = "kernels for this CPU are not used, decoding is slower"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
_AVX2, _AVX512 = ("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


MAX_PARTS = 3  # of a projection, each with weights of its own kind


class Part(Structure):
    """Quantized weights of some outputs. The fields of these structures are documented in decoder_layer.cpp."""

    _fields_ = (("weights", c_void_p), *((name, c_int64) for name in ("kind", "first", "end")))


class Projection(Structure):
    """Packed weights of a projection."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("inputs", "outputs", "num_parts")),
        ("parts", Part * MAX_PARTS),
    )

    @classmethod
    def quantized(cls, parts: Sequence[Packed], bias: int | None) -> Projection:
        """Of quantized weights, one after the other, which it does not keep alive; see `can_join`."""
        described, first = [], 0
        for part in parts:
            end = first + whole_blocks(part.num_outputs) // BLOCK
            described.append(Part(part.weights.data_ptr(), KINDS[part.kind].number, first, end))
            first = end
        outputs = sum(part.num_outputs for part in parts)
        return cls(None, bias, parts[0].num_inputs, outputs, len(parts), (Part * MAX_PARTS)(*described))


class Layer(Structure):
    """A decoder layer's weights and dimensions."""

    _fields_ = (
        *((name, Projection) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm_before_attention", "norm_after_attention")),
        *((name, c_void_p) for name in ("norm_before_mlp", "norm_after_mlp", "query_norm", "key_norm")),
        *((name, c_float) for name in ("epsilon", "scaling", "softcap", "residual_scale")),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "activation", "has_float_norms")),
    )


class Call(Structure):
    """The arrays of one call."""

    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "inputs")),
        *((name, c_void_p) for name in ("angles", "positions", "places", "starts", "paths")),
        ("layers", POINTER(POINTER(Layer))),
        *((name, POINTER(c_void_p)) for name in ("cos", "sin", "keys", "values")),
        *((name, POINTER(c_int64)) for name in ("columns", "windows")),
        ("results", POINTER(c_void_p)),
        *((name, c_int64) for name in ("num_layers", "rows", "width", "longest_path", "num_threads")),
    )


@dataclass(frozen=True, slots=True)
class TreePlaces:
    """Cache columns of a token tree. places: int64 [rows, width], of each token. starts: int64 [rows], of the root.

    paths: int64 [width, n], the columns on the path to each token, including its own; see `trees.columns.tree_paths`.
    """

    places: Tensor
    starts: Tensor
    paths: Tensor


def available(dtype: torch.dtype) -> bool:
    """Whether this machine has kernels for a dtype; the first call compiles them."""
    return dtype in _supported_dtypes() and _library() is not None


def multiplies_quantized() -> bool:
    """Whether this machine has kernels for quantized weights, with or without those for whole layers."""
    return platform.system() == "Linux" and _library() is not None


def supports(tensor: Tensor) -> bool:
    """Whether the kernels support the tensor's device and dtype."""
    return tensor.device.type == "cpu" and available(tensor.dtype)


def whole_blocks(outputs: int) -> int:
    """The number of outputs, rounded up to a multiple of BLOCK."""
    return -(-outputs // BLOCK) * BLOCK


def pack(weight: Tensor) -> Tensor:
    """Pack weights [out, in] in the order that the kernels read: [out / 32, in / s, 32, s], s = 2 in bf16, else 1.

    The last block is padded with zeros; `in` must be even.
    """
    outputs, inputs = weight.shape
    group = 2 if weight.dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(weight.detach(), (0, 0, 0, whole_blocks(outputs) - outputs))
    return padded.view(-1, BLOCK, inputs // group, group).permute(0, 2, 1, 3).contiguous()


def can_join(sizes: Sequence[int]) -> bool:
    """Whether a projection can consist of parts with these numbers of outputs: blocks of outputs are of one kind."""
    return len(sizes) <= MAX_PARTS and not any(size % BLOCK for size in sizes[:-1])


Pointers = Any  # a ctypes array of pointers, one per layer
Sizes = Any  # a ctypes array of int64, one per layer
_UNLIMITED = 1 << 40  # a window that is longer than any sequence


def pointers(arrays: Sequence[Tensor]) -> Pointers:
    """Pointers to the data of tensors; they do not keep the tensors alive."""
    return (c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))


@dataclass(frozen=True, slots=True)
class Angles:
    """Tables of cos and sin [length, head_dim] of each layer, and pointers to them."""

    tables: Sequence[tuple[Tensor, Tensor]]
    cos: Pointers
    sin: Pointers

    @classmethod
    def of(cls, tables: Sequence[tuple[Tensor, Tensor]]) -> Angles:
        """tables: contiguous; they are kept alive."""
        cos, sin = zip(*tables, strict=True)
        return cls(tables, pointers(cos), pointers(sin))

    @property
    def length(self) -> int:
        return len(self.tables[0][0])

    @property
    def dtype(self) -> torch.dtype:
        return self.tables[0][0].dtype


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the layers of a call keep keys and values; the tensors are not kept alive.

    keys, values: pointers to [rows, heads, columns, head_dim]; a token's column is taken modulo `columns`. windows: how
    many positions a token attends to, up to its own.
    """

    keys: Pointers
    values: Pointers
    columns: Sizes
    windows: Sizes

    @classmethod
    def of(cls, blocks: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None]) -> Blocks:
        """blocks: keys and values of each layer. windows: of each layer, None for no limit."""
        keys, values = zip(*blocks, strict=True)
        sizes = c_int64 * len(blocks)
        limits = (_UNLIMITED if window is None else window for window in windows)
        return cls(pointers(keys), pointers(values), sizes(*(each.shape[2] for each in keys)), sizes(*limits))


def run_layers(
    layers: Pointers,
    hidden: Tensor,
    angles: Angles,
    index: Tensor,
    positions: Tensor,
    blocks: Blocks,
    tree: TreePlaces | None,
    after: Sequence[int],
    inputs: Tensor | None = None,
) -> list[Tensor]:
    """Run decoder layers of one shape one after the other on hidden states [rows, width, hidden].

    Returns the hidden states after the first n layers, for each n of `after`.

    layers: pointers to `Layer`s. index: int64 [rows, width], of each token in the tables of `angles`.
    positions: int64 [rows, width]. blocks: written at the positions.
    tree: for a token tree, the columns to write instead; its tokens attend only to their ancestors.
    inputs: [rows, width, n], the input of the first layer's query, key and value projections; None for its normalized
    hidden states.
    """
    rows, width, _ = hidden.shape
    hidden = hidden.contiguous()
    inputs = None if inputs is None else inputs.contiguous()
    states = [torch.empty_like(hidden) for _ in after]
    results = (c_void_p * len(layers))()
    for number, state in zip(after, states, strict=True):
        results[number - 1] = state.data_ptr()
    arrays = [index.contiguous(), positions.contiguous()]
    arrays += [each.contiguous() for each in (tree.places, tree.starts, tree.paths)] if tree else arrays[-1:]
    tokens = [each.data_ptr() for each in arrays] + ([] if tree else [None, None])
    per_layer = (angles.cos, angles.sin, blocks.keys, blocks.values, blocks.columns, blocks.windows, results)
    sizes = (len(layers), rows, width, tree.paths.shape[1] if tree else 0, torch.get_num_threads())
    call = Call(hidden.data_ptr(), None if inputs is None else inputs.data_ptr(), *tokens, layers, *per_layer, *sizes)
    _function("layers", hidden.dtype)(call)
    return states


def keep(blocks: Sequence[Tensor], starts: Tensor, path: Tensor) -> None:
    """`RaggedCache.keep` for blocks [slots, heads, capacity, dim] of the same shape and dtype.

    starts: int64 [rows]. path: int64 [rows, n], path[r, i] >= i and ascending.
    """
    _, heads, capacity, dim = blocks[0].shape
    starts, path = starts.contiguous(), path.contiguous()
    sizes = (len(blocks), len(path), heads, capacity, dim * blocks[0].element_size(), path.shape[1])
    _function("keep")(pointers(blocks), starts.data_ptr(), path.data_ptr(), *sizes)


def run_projection(projection: Projection, inputs: Tensor, outputs: Tensor) -> None:
    """Project inputs [..., in] into outputs [..., whole_blocks(out)], both contiguous."""
    tokens = inputs.numel() // inputs.shape[-1]
    function = _function("project", inputs.dtype)
    function(projection, inputs.data_ptr(), outputs.data_ptr(), tokens, torch.get_num_threads())


def quantized_products(parts: Sequence[Packed], inputs: Tensor) -> Tensor:
    """Products of inputs [..., in] with quantized weights, one part after the other: float32 [..., out]."""
    flat = inputs.float().reshape(-1, inputs.shape[-1]).contiguous()
    widths = [whole_blocks(part.num_outputs) for part in parts]
    outputs = torch.empty(len(flat), sum(widths))
    function, threads = _function("quantized_products"), torch.get_num_threads()
    for part, own in zip(parts, outputs.split(widths, 1), strict=True):
        sizes = (*flat.shape, own.shape[1] // BLOCK, outputs.shape[1])
        weights, kind = part.weights.data_ptr(), KINDS[part.kind].number
        function(weights, kind, flat.data_ptr(), *sizes, own.data_ptr(), threads)
    return outputs[:, : sum(part.num_outputs for part in parts)].view(*inputs.shape[:-1], -1)


def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square normalization over the last dimension, whose size is a multiple of 16.

    weight: of the dtype of the inputs, multiplies after rounding to it; float32 for bfloat16 inputs, before rounding.
    """
    inputs, size = inputs.contiguous(), inputs.shape[-1]
    outputs = torch.empty_like(inputs)
    function = _function("rms_norm" if weight.dtype == inputs.dtype else "rms_norm_once", inputs.dtype)
    function(inputs.data_ptr(), weight.data_ptr(), epsilon, inputs.numel() // size, size, outputs.data_ptr())
    return outputs


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), rounded once; written over x if that is contiguous."""
    x = x.contiguous()
    _function("softcap", x.dtype)(x.data_ptr(), x.numel(), cap)
    return x


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row of logits [..., n], NaN if a logit is, and the index of its first occurrence, int64."""
    logits = logits.contiguous()
    peaks = logits.new_empty(logits.shape[:-1])
    places = torch.empty(peaks.shape, dtype=torch.int64)
    function = _function("largest", logits.dtype)
    function(logits.data_ptr(), peaks.numel(), logits.shape[-1], peaks.data_ptr(), places.data_ptr())
    return peaks, places


def confidence(logits: Tensor) -> Tensor:
    """The largest probability of each row of logits [..., n], float32 [...]."""
    logits = logits.contiguous()
    confidences = torch.empty(logits.shape[:-1])
    function = _function("confidence", logits.dtype)
    function(logits.data_ptr(), confidences.numel(), logits.shape[-1], confidences.data_ptr())
    return confidences


def softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Distributions float32 [..., vocab] of logits at temperatures [...]; rows without a distribution are all NaN."""
    logits, temperatures = logits.contiguous(), temperatures.float().contiguous()
    probs = torch.empty(logits.shape, dtype=torch.float32)
    arguments = (logits.data_ptr(), temperatures.numel(), logits.shape[-1], temperatures.data_ptr(), probs.data_ptr())
    _function("softmax", logits.dtype)(*arguments)
    return probs


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """`distributions.Dense.draw`: tokens int64 [...] from probs float32 [..., vocab] and uniforms float64 [...]."""
    probs, uniforms = probs.contiguous(), uniforms.contiguous()
    tokens = torch.empty(uniforms.shape, dtype=torch.int64)
    sizes = (tokens.numel(), probs.shape[-1])
    _function("draw")(probs.data_ptr(), *sizes, uniforms.data_ptr(), tokens.data_ptr())
    return tokens


def race(probs: Tensor, uniforms: Tensor) -> Tensor:
    """`distributions.race`: tokens int64 [...] from probs float32 and uniforms float64, both [..., vocab]."""
    probs, uniforms = probs.contiguous(), uniforms.contiguous()
    tokens = torch.empty(probs.shape[:-1], dtype=torch.int64)
    sizes = (tokens.numel(), probs.shape[-1])
    _function("race")(probs.data_ptr(), *sizes, uniforms.data_ptr(), tokens.data_ptr())
    return tokens


def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """`sampling.randomness.uniforms` (Philox 4x32-10), without copies of what broadcasts along the last axis."""
    words = (positions, origins, roles, seeds)
    shape = torch.broadcast_tensors(*words)[0].shape  # torch.broadcast_shapes is Python and takes three times as long
    drawn = torch.empty(shape, dtype=torch.float64)
    size = shape[-1] if shape else 1
    laid_out, strides = zip(*(_laid_out(word, shape) for word in words), strict=True)
    pointers_to = (c_void_p * 4)(*(word.data_ptr() for word in laid_out))
    strides_of = (c_int64 * 8)(*(stride for pair in strides for stride in pair))
    _function("uniforms")(pointers_to, strides_of, drawn.numel() // max(size, 1), size, drawn.data_ptr())
    return drawn


def _laid_out(word: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, int]]:
    """An int64 tensor that broadcasts to `shape`, and its strides along the flattened leading axes and the last one."""
    size = word.shape[-1] if word.ndim else 1
    if word.numel() == size:
        return word.contiguous(), (0, int(size > 1))
    return word.expand(*shape[:-1], size).contiguous(), (size, int(size > 1))


@cache
def _supported_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes for which this CPU has the necessary instructions."""
    on_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    if not on_linux or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ()
    return (torch.float32, torch.bfloat16) if torch.cpu._is_avx512_bf16_supported() else (torch.float32,)


def _instructions() -> tuple[str, ...]:
    """Compiler flags for the instructions of this CPU that the kernels are written for."""
    if not _supported_dtypes():
        return _AVX2 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ()
    bf16 = ("-mavx512bf16",) if torch.bfloat16 in _supported_dtypes() else ()
    return *_AVX512, *bf16, *(("-mavx512vnni",) if torch.cpu._is_vnni_supported() else ())


@cache
def _library() -> Any:
    """The compiled kernels, or None with one warning if they cannot be compiled."""
    used = _SOURCES if _supported_dtypes() else _PORTABLE_SOURCES
    return compiled("kernels", used, _HEADERS, [*_FLAGS, *_instructions()], _UNUSED)


def compiled(name: str, sources: Sequence[Path], headers: Sequence[Path], flags: Sequence[str], unused: str) -> Any:
    """A shared library, compiled into the cache folder `name` once per machine.

    None without a compiler, or if it fails, with one warning. unused: what that means, for the warning.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        fall_back(unused, "no C++ compiler was found (install g++, or name one in CXX)")
        return None
    contents = [path.read_bytes() for path in (*sources, *headers)]
    digest = hashlib.sha256(b"".join(contents) + " ".join(flags).encode()).hexdigest()

    def make(staging: Path) -> dict[str, Any]:
        (staging / "made").mkdir()
        objects = [str(staging / source.with_suffix(".o").name) for source in sources]
        for source, made in zip(sources, objects, strict=True):
            _run([compiler, *flags, "-c", str(source), "-o", made])
        # link torch's OpenMP runtime: two runtimes in a process would compete for the cores
        runtimes = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")] or ["-lgomp"]
        _run([compiler, "-shared", *objects, *runtimes, "-o", str(staging / "made" / "kernels.so")])
        return {"source_sha256": digest, "command": [Path(compiler).name, *flags]}

    try:
        folder = made_once(
            cache_root() / f"{name}-{digest[:8]}",
            make,
            disk_bytes=10**7,
            rule="kernels must be compiled once",
            what="compiling kernels, once",
        )
        return ctypes.CDLL(str(folder / "kernels.so"))
    except (LoadError, OSError) as error:
        fall_back(unused, error)
        return None


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


_ARGUMENTS = {
    "layers": (POINTER(Call),),
    "keep": (POINTER(c_void_p), c_void_p, c_void_p, *(c_int64,) * 6),
    "quantized_products": (c_void_p, c_int64, c_void_p, *(c_int64,) * 4, c_void_p, c_int64),
    "project": (POINTER(Projection), c_void_p, c_void_p, c_int64, c_int64),
    "rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "rms_norm_once": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "softcap": (c_void_p, c_int64, c_float),
    "largest": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "confidence": (c_void_p, c_int64, c_int64, c_void_p),
    "softmax": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "draw": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "race": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "uniforms": (POINTER(c_void_p), POINTER(c_int64), c_int64, c_int64, c_void_p),
}


@cache
def _function(name: str, dtype: torch.dtype | None = None) -> Any:
    function = getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}" if dtype else name)
    function.restype, function.argtypes = None, _ARGUMENTS[name]
    return function
