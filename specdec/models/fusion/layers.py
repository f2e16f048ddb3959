"""A fused decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from specdec.kernels import cpp
from specdec.kernels.pages import LargePages
from specdec.models.fusion.anatomy import Anatomy
from specdec.models.fusion.parts import Norm, Projection, pointer
from specdec.models.state.ragged import RaggedCache


class Shared:
    """State shared by the layers of a model: the attention mask of the current call. memory: of their weights."""

    def __init__(self) -> None:
        self.memory = LargePages()
        self._mask: Tensor | None = None

    def repeated(self, mask: Tensor, times: int) -> Tensor:
        """Repeat the mask [rows, 1, width, extent] for the query heads of a group: [rows, 1, times * width, extent]."""
        if mask is not self._mask:
            self._mask, self._repeated = mask, mask.repeat(1, 1, times, 1)
        return self._repeated


class FusedLayer(nn.Module):
    """A decoder layer of the Llama and Gemma families, with the interface of transformers.

    layer: the transformers layer that provides the weights. shared: one object for all layers of a model.
    kernel: the descriptor for the kernels of its device, or None where torch operations are used.
    """

    def __init__(self, layer: Any, shared: Shared) -> None:
        super().__init__()
        anatomy = Anatomy.of(layer)
        self.shared, self.index, self.layer_type = shared, anatomy.index, anatomy.layer_type
        self.num_heads, self.num_kv_heads, self.head_dim = anatomy.num_heads, anatomy.num_kv_heads, anatomy.head_dim
        self.scaling, self.softcap, self.residual_scale = anatomy.scaling, anatomy.softcap, anatomy.residual_scale
        qkv, output, gate_up, down = anatomy.qkv, (anatomy.output,), anatomy.gate_up, (anatomy.down,)
        self.qkv, self.output, self.gate_up, self.down = (
            Projection(*linears, memory=shared.memory) for linears in (qkv, output, gate_up, down)
        )
        norms = anatomy.norms
        self.q_norm, self.k_norm = Norm(norms.queries), Norm(norms.keys)
        self.norm_before_attention, self.norm_after_attention = (
            Norm(norms.before_attention),
            Norm(norms.after_attention),
        )
        self.norm_before_mlp, self.norm_after_mlp = Norm(norms.before_mlp), Norm(norms.after_mlp)
        self.activation, self.activation_name = anatomy.activation, anatomy.activation_name
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
        hidden_states = self._added(hidden_states, self.output, attended, self.norm_after_attention)
        gate, up = self.gate_up(self.norm_before_mlp(hidden_states)).chunk(2, -1)
        return self._added(hidden_states, self.down, self.activation(gate) * up, self.norm_after_mlp)

    def _added(self, residual: Tensor, projection: Projection, inputs: Tensor, norm: Norm) -> Tensor:
        """residual + the normalized and scaled projection of the inputs."""
        if norm.weight is None and self.residual_scale == 1.0:
            return projection.add_to(residual, inputs)
        added: Tensor = residual + norm(projection(inputs)) * self.residual_scale
        return added

    def _describe_for_gpu(self) -> Any:
        """The layer's descriptor for the Triton kernels; None if they do not support it."""
        from specdec.kernels import triton_layers

        if self.activation_name is None or self._epsilon is None or self.head_dim % 2:
            return None
        if self.norm_before_mlp.weight is None:
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
            epsilon=self._epsilon,
            scaling=self.scaling,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_after_attention=self.norm_after_attention.weight,
            norm_after_mlp=self.norm_after_mlp.weight,
            softcap=self.softcap,
            residual_scale=self.residual_scale,
            activation=self.activation_name,
            is_interleaved=is_interleaved,
        )

    def _describe_for_cpu(self) -> cpp.Layer | None:
        """The layer's descriptor for the C++ kernels; None if they do not support it."""
        projections = [projection.kernel for projection in (self.qkv, self.output, self.gate_up, self.down)]
        sizes = (self.qkv.num_inputs, self.qkv.num_outputs, self.down.num_inputs)
        if (
            None in projections
            or any(size % cpp.BLOCK for size in sizes)
            or self.head_dim not in cpp.HEAD_DIMS
            or self.activation_name not in cpp.ACTIVATIONS
            or self._epsilon is None
        ):
            return None
        return cpp.Layer(
            *projections,
            *(pointer(norm.weight) for norm in self._norms),
            self._epsilon,
            self.scaling,
            self.softcap or 0.0,
            self.residual_scale,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            cpp.ACTIVATIONS.index(self.activation_name),
            any(norm.rounds_once for norm in self._norms),
        )

    @property
    def _norms(self) -> tuple[Norm, ...]:
        """In the order of the C++ kernels' descriptor."""
        around_attention = (self.norm_before_attention, self.norm_after_attention)
        return (*around_attention, self.norm_before_mlp, self.norm_after_mlp, self.q_norm, self.k_norm)

    @property
    def _epsilon(self) -> float | None:
        """That of all norms; None if they differ, which the kernels do not support."""
        epsilons = {norm.epsilon for norm in self._norms if norm.weight is not None}
        return epsilons.pop() if len(epsilons) == 1 else None

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        rows, _, width, _ = queries.shape
        # the query heads of a group become additional query rows of their key/value head, which is not repeated
        groups = self.num_heads // self.num_kv_heads
        queries = queries.reshape(rows, self.num_kv_heads, groups * width, self.head_dim)
        if mask is None:
            ones = torch.ones(width, keys.shape[2], dtype=torch.bool, device=keys.device)
            mask = ones.tril(keys.shape[2] - width)[None, None]
        mask = self.shared.repeated(mask, groups)
        if self.softcap is None:
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scaling)
        else:
            attended = capped_attention(queries, keys, values, mask, self.scaling, self.softcap)
        # reshape, not view: the layout of the result depends on which attention kernel torch selects
        return attended.reshape(rows, self.num_heads, width, self.head_dim).transpose(1, 2).reshape(rows, width, -1)


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention [..., width, head_dim] with scores softcap * tanh(score / softcap), as in Gemma 2.

    mask: broadcasts to the scores [..., width, extent]; added, or bool and True where attended.
    """
    scores = torch.matmul(queries, keys.transpose(-1, -2)) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [rows, heads, width, head_dim]; cos, sin: [rows, width, head_dim]."""
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos.unsqueeze(1), rotated, sin.unsqueeze(1))
