"""Fused decoder layers: fewer, larger operations per decode step.

A decode step of a small model is bound by weight bandwidth and by the number of operations, not by arithmetic. So the
query, key and value projections are merged into one, the gate and up projections into another, and grouped query heads
attend to their key/value head without repeating it. With the kernels of `specdec.kernels`, a CPU runs all layers in one
call, and a token's result does not depend on the number of tokens in the batch. Without them, bf16 weights are packed
once into oneDNN's own layout, which is read about twice as fast as the row-major one.

Results equal those of transformers up to rounding.
"""

from specdec.models.fusion.anatomy import FUSABLE as FUSABLE
from specdec.models.fusion.decoder import FusedDecoder as FusedDecoder
from specdec.models.fusion.decoder import fuse as fuse
from specdec.models.fusion.decoder import layer_by_layer as layer_by_layer
from specdec.models.fusion.layers import FusedLayer as FusedLayer
from specdec.models.fusion.layers import Shared as Shared
from specdec.models.fusion.layers import rotate as rotate
from specdec.models.fusion.parts import Norm as Norm
from specdec.models.fusion.parts import Projection as Projection
from specdec.models.fusion.parts import QuantizedLinear as QuantizedLinear
from specdec.models.fusion.parts import weight_bytes as weight_bytes
from specdec.models.fusion.rotary import depends_on_length as depends_on_length
from specdec.models.fusion.stacks import GpuStack as GpuStack
from specdec.models.fusion.stacks import Stack as Stack
from specdec.models.fusion.stacks import stack_of as stack_of
