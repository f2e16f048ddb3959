"""Names of number formats and of ways to load weights. Nothing here needs torch."""

from __future__ import annotations

DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = {"bitsandbytes-4bit": "bitsandbytes", "torchao-int8": "torchao"}  # name -> package
OWN_QUANTIZATIONS = ("auto", "int8", "int4", "q8_0", "q4_1", "q4_0")  # for this package's kernels
