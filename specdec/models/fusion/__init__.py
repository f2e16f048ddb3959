"""Fused decoder layers: fewer, larger operations per decode step.

A decode step of a small model is bound by weight bandwidth and by the number of operations, not by arithmetic. So the
query, key and value projections are merged into one, the gate and up projections into another, and grouped query heads
attend to their key/value head without repeating it. With the kernels of `specdec.kernels`, a CPU runs all layers in one
call, and a token's result does not depend on the number of tokens in the batch. Without them, bf16 weights are packed
once into oneDNN's own layout, which is read about twice as fast as the row-major one.

Results equal those of transformers up to rounding.
"""

from specdec.models.fusion.anatomy import FUSABLE
from specdec.models.fusion.decoder import FusedDecoder, fuse, layer_by_layer
from specdec.models.fusion.layers import FusedLayer, Shared, rotate
from specdec.models.fusion.parts import Norm, Projection, weight_bytes
from specdec.models.fusion.rotary import depends_on_length
from specdec.models.fusion.stacks import GpuStack, Stack, stack_of

__all__ = [
    "FUSABLE",
    "FusedDecoder",
    "FusedLayer",
    "GpuStack",
    "Norm",
    "Projection",
    "Shared",
    "Stack",
    "depends_on_length",
    "fuse",
    "layer_by_layer",
    "rotate",
    "stack_of",
    "weight_bytes",
]
