"""Fused decoder layers: fewer, larger operations per decode step.

A decode step of a small model is bound by weight bandwidth and by the number of operations, not by arithmetic. So the
query, key and value projections are merged into one, the gate and up projections into another, and grouped query heads
attend to their key/value head without repeating it. With the kernels of `specdec.kernels`, a CPU runs all layers in one
call, and a token's result does not depend on the number of tokens in the batch. Without them, bf16 weights are packed
once into oneDNN's own layout, which is read about twice as fast as the row-major one.

Results equal those of transformers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, pointer
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from specdec.kernels import cpp, gpu
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.state.ragged import RaggedCache
from specdec.trees.columns import tree_paths

FUSABLE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_BODIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def fuse(model: Any) -> int:
    """Replace the decoder layers and head of a transformers model by fused ones, in place; returns their number.

    Layers of unsupported architectures are left unchanged. A fused model can no longer be saved or trained. The
    original weights of each layer are freed before the next layer is fused.
    """
    shared, body = Shared(), model.base_model
    num_replaced = _fuse_below(model, model, body, shared)
    layers = getattr(body, "layers", [])
    if type(body).__name__ in _BODIES and all(isinstance(layer, FusedLayer) and layer.kernel for layer in layers):
        setattr(model, model.base_model_prefix, FusedDecoder(body))
    return num_replaced


def _fuse_below(parent: Any, model: Any, body: Any, shared: Shared) -> int:
    """Fuse the descendants of a module of the model; returns the number of layers and heads replaced."""
    num_replaced = 0
    for name in [name for name, _ in parent.named_children()]:  # names: a list of the layers would keep their weights
        child = getattr(parent, name)
        if type(child).__name__ in FUSABLE:
            setattr(parent, name, FusedLayer(child, shared))
            num_replaced += 1
        elif type(child) is nn.Linear and parent is model:
            setattr(parent, name, Projection(child))
            num_replaced += 1
        elif type(child).__name__ in _NORMS and parent is body:
            setattr(parent, name, Norm(child))
        else:
            num_replaced += _fuse_below(child, model, body, shared)
    return num_replaced


def depends_on_length(rotary: Any) -> bool:
    """Whether a transformers rotary embedding selects its angles by the largest position of a call.

    It then reads that position back from the device, so calls cannot be captured as CUDA graphs.
    """
    kinds = getattr(rotary, "rope_type", "default")
    by_layer = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in kind or kind == "longrope" for kind in by_layer)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own weights, fused or not; shared weights count once."""
    values = [value for module in modules for value in (*vars(module).values(), *module.parameters(recurse=False))]
    weights = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


class FusedDecoder(nn.Module):
    """Runs all layers of a model in one call; replaces the transformers model without its head.

    body: the transformers model, after its layers were fused. Called as a module, this object delegates to it.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.layers = body, body.layers
        self._stack = stack_of(list(body.layers), body.rotary_emb)

    def forward(self, **options: Any) -> Any:
        return self.body(**options)

    @property
    def widths(self) -> dict[int, int]:
        """The width of each hidden state, by its index as in `FeatureLayers`."""
        return dict.fromkeys(range(FINAL, len(self.layers) + 1), self.body.embed_tokens.weight.shape[1])

    def hidden_states(self, tokens: Tensor, cache: RaggedCache, layers: FeatureLayers = ()) -> dict[int, Tensor]:
        """Hidden states [rows, width, hidden] by index: those of `layers`, and FINAL.

        tokens: int64 [rows, width], in the open window of the cache.
        """
        hidden, num_layers = embedding(tokens, self.body.embed_tokens.weight), len(self.layers)
        after = sorted({num_layers, *(layer for layer in layers if layer > 0)})
        if self._stack.supports(tokens.shape[1]) and not any(cache.local):
            states = self._stack.states(hidden, cache, after)
        else:
            states = layer_by_layer(self.layers, self.body.rotary_emb, hidden, cache, after)
        by_index = {0: hidden, **dict(zip(after, states, strict=True))}
        return by_index | {FINAL: self.body.norm(by_index[num_layers])}


def layer_by_layer(
    layers: Iterable[nn.Module], rotary: Any, hidden: Tensor, cache: RaggedCache, after: Sequence[int]
) -> list[Tensor]:
    """Run the layers without kernels on hidden states [rows, width, hidden] in the cache's open window.

    Returns the hidden states after the first n layers for each n of `after`, ascending.
    """
    angles, states = rotary(hidden, cache.window.positions), []
    for number, (layer, local) in enumerate(zip(layers, cache.local, strict=False), 1):
        mask = cache.mask(hidden.dtype, local)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
        if number in after:
            states.append(hidden)
    return states


def stack_of(layers: Sequence[FusedLayer], rotary: Any) -> Stack | GpuStack:
    """The fused layers, all with a kernel, as one call of the kernels of their device."""
    return Stack(layers, rotary) if isinstance(layers[0].kernel, cpp.Layer) else GpuStack(layers, rotary)


class GpuStack:
    """Consecutive fused layers of the same shape, run by `specdec.kernels.triton_layers`.

    rotary: the transformers rotary embedding.
    """

    def __init__(self, layers: Sequence[FusedLayer], rotary: Any) -> None:
        from specdec.kernels import triton_layers

        self._run, self._max_width = triton_layers.run_layers, triton_layers.MAX_WIDTH
        self._places = triton_layers.Places
        self._layers, self._rotary = layers, rotary
        self._kernels: list[Any] = [layer.kernel for layer in layers]
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}  # kept alive: captured graphs read them at their addresses

    def supports(self, width: int) -> bool:
        """Whether the kernels can process `width` tokens per row."""
        return width <= self._max_width and not depends_on_length(self._rotary)

    def __call__(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Run all layers on hidden states [rows, width, hidden] in the open window of the cache."""
        return self.states(hidden, cache, [len(self._layers)])[0]

    def states(self, hidden: Tensor, cache: RaggedCache, after: Sequence[int]) -> list[Tensor]:
        """The same, with the hidden states after the first n layers for each n of `after`, ascending."""
        window, first = cache.window, self._layers[0]
        shape = (first.num_kv_heads, first.head_dim, hidden.dtype)
        blocks = [cache.blocks(layer.index, *shape) for layer in self._layers]
        tree = None if window.branches is None else tree_paths(window.branches, hidden.device)
        at = self._places(
            window.positions.contiguous(), window.places.contiguous(), window.starts.contiguous(), tree, window.extent
        )
        return self._run(self._kernels, hidden, self._angles_up_to(cache.capacity, hidden), blocks, at, after)

    def _angles_up_to(self, capacity: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of cos and sin [capacity, head_dim]."""
        if capacity not in self._angles:
            positions = torch.arange(capacity, device=hidden.device).unsqueeze(0)
            cos, sin = self._rotary(hidden, positions)
            self._angles[capacity] = (cos[0].contiguous(), sin[0].contiguous())
        return self._angles[capacity]


class Stack:
    """Consecutive fused layers of the same shape, run by `specdec.kernels.cpp`.

    rotary: the transformers rotary embedding.
    """

    def __init__(self, layers: Sequence[FusedLayer], rotary: Any) -> None:
        self._indices, self._rotary = [layer.index for layer in layers], rotary
        self._angles_depend_on_length = depends_on_length(rotary)
        self._angles: tuple[Tensor, Tensor] | None = None
        self._cache: Callable[[], RaggedCache | None] = lambda: None  # the cache that `_cached_blocks` point into
        self._cached_blocks: tuple[cpp.Pointers, cpp.Pointers] | None = None
        self._kernels = [layer.kernel for layer in layers if layer.kernel]
        self._num_kv_heads, self._head_dim = layers[0].num_kv_heads, layers[0].head_dim
        self._pointers = (POINTER(cpp.Layer) * len(layers))(*map(pointer, self._kernels))

    def supports(self, width: int) -> bool:
        """Whether the kernels can process `width` tokens per row."""
        return True

    def __call__(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Run all layers on hidden states [rows, width, hidden] in the open window of the cache."""
        return self.states(hidden, cache, [len(self._kernels)])[0]

    def both_ways(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """The same, but each token attends to all tokens of the window, not only to those before it."""
        angles, blocks, window = self._angles_of(hidden, cache), self._blocks(cache, hidden.dtype), cache.window
        width, seen = hidden.shape[1], window.positions[:, -1:].expand_as(window.positions)
        everything = torch.arange(width).expand(width, width)  # to the kernels, a tree whose paths hold all columns
        tree = cpp.TreePlaces(window.places, window.starts, everything)
        after = [len(self._kernels)]
        return cpp.run_layers(self._pointers, hidden, angles, seen, blocks, cache.capacity, tree, after)[0]

    def states(
        self, hidden: Tensor, cache: RaggedCache, after: Sequence[int], inputs: Tensor | None = None
    ) -> list[Tensor]:
        """The same, with the hidden states after the first n layers for each n of `after`, ascending.

        inputs: what the first layer's attention reads, see `cpp.run_layers`.
        """
        angles, blocks, window = self._angles_of(hidden, cache), self._blocks(cache, hidden.dtype), cache.window
        tree = None
        if window.branches is not None:
            tree = cpp.TreePlaces(window.places, window.starts, tree_paths(window.branches, hidden.device))
        at = (window.positions, blocks, cache.capacity, tree, after, inputs)
        return cpp.run_layers(self._pointers, hidden, angles, *at)

    def _angles_of(self, hidden: Tensor, cache: RaggedCache) -> tuple[Tensor, Tensor, Tensor]:
        """Tables of cos and sin [n, head_dim] and each token's index into them, int64 [rows, width].

        The tables hold all positions, because recomputing the angles takes a dozen operations.
        """
        positions = cache.window.positions
        if self._angles_depend_on_length:
            cos, sin = (table.expand(*positions.shape, -1).flatten(0, 1) for table in self._rotary(hidden, positions))
            return cos, sin, torch.arange(positions.numel(), device=hidden.device)
        if self._angles is None or len(self._angles[0]) < cache.window.extent or self._angles[0].dtype != hidden.dtype:
            longest = max(2 * cache.window.extent, 512)
            cos, sin = self._rotary(hidden, torch.arange(longest, device=hidden.device).unsqueeze(0))
            self._angles = (cos[0].contiguous(), sin[0].contiguous())
        return *self._angles, positions

    def _blocks(self, cache: RaggedCache, dtype: torch.dtype) -> tuple[cpp.Pointers, cpp.Pointers]:
        """Pointers to the open window's rows; for decode steps, which start at the first slot, looked up only once."""
        if self._cached_blocks and self._cache() is cache and cache.window.slots.start == 0:
            return self._cached_blocks
        arrays = [cache.blocks(index, self._num_kv_heads, self._head_dim, dtype) for index in self._indices]
        keys, values = zip(*arrays, strict=True)
        blocks = (cpp.pointers(keys), cpp.pointers(values))
        if cache.window.slots.start == 0:
            self._cache, self._cached_blocks = ref(cache), blocks
        return blocks


class Projection(nn.Module):
    """One or several `nn.Linear` with the same input, merged into one: float [..., in] -> [..., sum of out].

    kernel: the descriptor for the C++ kernels, or None where another implementation is used.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight = _joined([layer.weight for layer in linears])
        on_cpu = weight.device.type == "cpu"
        self.bias = None if linears[0].bias is None else _joined([layer.bias for layer in linears])
        self.num_outputs, self.num_inputs = weight.shape
        self.kernel: cpp.Projection | None = None
        self.is_packed = False
        self.weight: Tensor = weight
        self.on_gpu = gpu.on_gpu(weight)
        self.interleaved_dim: int | None = None
        if self.on_gpu:
            self.weight = weight.contiguous()
        elif cpp.supports(weight) and self.num_inputs % 2 == 0:
            self.weight = cpp.pack(weight)
            if self.bias is not None:
                self.bias = nn.functional.pad(self.bias, (0, cpp.whole_blocks(self.num_outputs) - self.num_outputs))
            self.kernel = cpp.Projection(self.weight.data_ptr(), _pointer(self.bias), self.num_inputs, self.num_outputs)
        elif on_cpu and weight.dtype == torch.bfloat16 and _packs_bf16():
            rows = 8  # the number of rows that the layout is optimized for; any number works
            self.is_packed = True
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def interleave(self, head_dim: int) -> None:
        """Interleave the outputs as the Triton rotary kernels expect; `forward` still returns them in order."""
        from specdec.kernels import triton_layers

        self.interleaved_dim = head_dim
        self.weight = triton_layers.interleaved(self.weight, head_dim)
        self.bias = None if self.bias is None else triton_layers.interleaved(self.bias, head_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self._outputs(inputs)
        if self.interleaved_dim is None:
            return outputs
        from specdec.kernels import triton_layers

        return triton_layers.deinterleaved(outputs, self.interleaved_dim)

    def _outputs(self, inputs: Tensor) -> Tensor:
        if self.on_gpu:
            from specdec.kernels import triton_layers

            if inputs.shape[-2] <= triton_layers.MAX_WIDTH:
                product = triton_layers.product(
                    inputs.reshape(-1, self.num_inputs).contiguous(), self.weight, self.bias
                )
                return product.view(*inputs.shape[:-1], self.num_outputs)
        if self.kernel is not None:
            outputs: Tensor = inputs.new_empty(*inputs.shape[:-1], cpp.whole_blocks(self.num_outputs))
            cpp.run_projection(self.kernel, inputs.contiguous(), outputs)
            return outputs[..., : self.num_outputs]
        if self.is_packed:
            outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return outputs
        return linear(inputs, self.weight, self.bias)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """residual + projection of the inputs."""
        if self.is_packed:
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self.weight, self.bias, "add")
            return outputs
        return residual + self.forward(inputs)


class Norm(nn.Module):
    """Root mean square normalization. norm: the transformers module, or `nn.Identity` for no normalization."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor | None = None
        self.has_kernel = False
        if type(norm) is not nn.Identity:
            self.weight, self.epsilon = norm.weight.detach(), float(norm.variance_epsilon)
            self.on_gpu = gpu.on_gpu(self.weight)
            self.has_kernel = not self.on_gpu and cpp.supports(self.weight) and len(self.weight) % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        if self.on_gpu:
            from specdec.kernels import triton_layers

            return triton_layers.rms_norm(x, self.weight, self.epsilon)
        if self.has_kernel and x.dtype == self.weight.dtype:
            return cpp.rms_norm(x, self.weight, self.epsilon)
        # for a few rows, twice as fast as torch's composite implementation
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square().div_(x.shape[-1]).add_(self.epsilon))
        return (x * scale).to(x.dtype) * self.weight


class Shared:
    """State shared by the layers of a model: the attention mask of the current call."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def repeated(self, mask: Tensor, times: int) -> Tensor:
        """Repeat the mask [rows, 1, width, extent] for the query heads of a group: [rows, 1, times * width, extent]."""
        if mask is not self._mask:
            self._mask, self._repeated = mask, mask.repeat(1, 1, times, 1)
        return self._repeated


class FusedLayer(nn.Module):
    """A decoder layer of the Llama family, with the interface of transformers.

    layer: the transformers layer that provides the weights. shared: one object for all layers of a model.
    kernel: the descriptor for the kernels of its device, or None where torch operations are used.
    """

    def __init__(self, layer: Any, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = Projection(attention.o_proj)
        self.gate_up, self.down = Projection(mlp.gate_proj, mlp.up_proj), Projection(mlp.down_proj)
        self.q_norm, self.k_norm = (
            Norm(getattr(attention, name, None) or nn.Identity()) for name in ("q_norm", "k_norm")
        )
        self.activation = silu if mlp.act_fn.__class__.__name__.startswith("SiLU") else mlp.act_fn
        self.norm_before_attention, self.norm_before_mlp = (
            Norm(layer.input_layernorm),
            Norm(layer.post_attention_layernorm),
        )
        self.kernel: Any = self._describe_for_gpu() if self.qkv.on_gpu else self._describe_for_cpu()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: RaggedCache | None = None,
        inputs: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the transformers layer. inputs: what attention reads instead of the hidden states."""
        assert position_embeddings is not None
        queries, keys, values = self.before_attention(hidden_states if inputs is None else inputs, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.index)
        attended = self._attend(queries, keys, values, attention_mask)
        return self.after_attention(hidden_states, attended)

    def before_attention(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [rows, heads, width, head_dim]; queries and keys are rotated."""
        qkv = self.qkv(self.norm_before_attention(hidden_states))
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim).transpose(1, 2)
        if self.q_norm.weight is not None:
            queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
            heads = torch.cat([self.q_norm(queries), self.k_norm(keys), values], 1)
        num_rotated = self.num_heads + self.num_kv_heads
        rotated, values = rotate(heads[:, :num_rotated], cos, sin), heads[:, num_rotated:]
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :], values

    def after_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and the attention output, [rows, width, heads * head_dim]."""
        hidden_states = self.output.add_to(hidden_states, attended)
        gate, up = self.gate_up(self.norm_before_mlp(hidden_states)).chunk(2, -1)
        return self.down.add_to(hidden_states, self.activation(gate) * up)

    def _describe_for_gpu(self) -> Any:
        """The layer's descriptor for the Triton kernels; None if they do not support it."""
        from specdec.kernels import triton_layers

        norms = [self.norm_before_attention, self.norm_before_mlp, self.q_norm, self.k_norm]
        epsilons = {norm.epsilon for norm in norms if norm.weight is not None}
        if (
            self.activation is not silu
            or len(epsilons) != 1
            or self.head_dim % 2
            or self.norm_before_mlp.weight is None
        ):
            return None

        def weight_and_bias(projection: Projection) -> tuple[Tensor, Tensor | None]:
            return projection.weight, projection.bias

        has_norms = self.q_norm.weight is not None
        if is_interleaved := triton_layers.supports_interleaving(self.head_dim, has_norms=has_norms):
            self.qkv.interleave(self.head_dim)
        return triton_layers.Layer(
            qkv=weight_and_bias(self.qkv),
            output=weight_and_bias(self.output),
            gate_up=weight_and_bias(self.gate_up),
            down=weight_and_bias(self.down),
            norm_before_attention=self.norm_before_attention.weight,
            norm_before_mlp=self.norm_before_mlp.weight,
            query_norm=self.q_norm.weight,
            key_norm=self.k_norm.weight,
            epsilon=epsilons.pop(),
            scaling=self.scaling,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            is_interleaved=is_interleaved,
        )

    def _describe_for_cpu(self) -> cpp.Layer | None:
        """The layer's descriptor for the C++ kernels; None if they do not support it."""
        projections = [projection.kernel for projection in (self.qkv, self.output, self.gate_up, self.down)]
        sizes = (self.qkv.num_inputs, self.qkv.num_outputs, self.down.num_inputs)
        norms = [self.norm_before_attention, self.norm_before_mlp, self.q_norm, self.k_norm]
        epsilons = {norm.epsilon for norm in norms if norm.weight is not None}
        if (
            None in projections
            or any(size % cpp.BLOCK for size in sizes)
            or self.head_dim not in cpp.HEAD_DIMS
            or self.activation is not silu
            or len(epsilons) != 1
        ):
            return None
        return cpp.Layer(
            *projections,
            *(_pointer(norm.weight) for norm in norms),
            epsilons.pop(),
            self.scaling,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        )

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        rows, _, width, _ = queries.shape
        # the query heads of a group become additional query rows of their key/value head, which is not repeated
        groups = self.num_heads // self.num_kv_heads
        queries = queries.reshape(rows, self.num_kv_heads, groups * width, self.head_dim)
        if mask is None:
            ones = torch.ones(width, keys.shape[2], dtype=torch.bool, device=keys.device)
            mask = ones.tril(keys.shape[2] - width)[None, None]
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.shared.repeated(mask, groups), scale=self.scaling
        )
        # reshape, not view: the layout of the result depends on which attention kernel torch selects
        return attended.reshape(rows, self.num_heads, width, self.head_dim).transpose(1, 2).reshape(rows, width, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [rows, heads, width, head_dim]; cos, sin: [rows, width, head_dim]."""
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos.unsqueeze(1), rotated, sin.unsqueeze(1))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors]) if len(tensors) > 1 else tensors[0].detach()


def _packs_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
