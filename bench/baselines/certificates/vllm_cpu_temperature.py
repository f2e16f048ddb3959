"""vLLM 0.32.0, CPU build without Triton's CPU backend: the temperatures of drafted tokens are never written.

`expand_batch_to_tokens` gives each drafted token its request's temperature, in memory that is fresh from the allocator.
The override of its kernel (`vllm.utils.cpu_triton_utils._expand_kernel_impl`) turns the output, float32, into int64,
which is a copy; the C++ kernel writes into the copy, and nobody copies it back. Logits are then divided by what the
memory held before. top_k and top_p of drafted tokens go the same way; greedy decoding does not come here.
"""

import torch
from vllm.platforms import current_platform

current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()

from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens  # noqa: E402  (binds the kernels above)

temperatures, ends = torch.tensor([1.0, 0.5]), torch.tensor([4, 8], dtype=torch.int32)
print("expected", [1.0] * 4 + [0.5] * 4)
for _ in range(3):
    print("vLLM    ", expand_batch_to_tokens(temperatures, ends, 8).tolist())
