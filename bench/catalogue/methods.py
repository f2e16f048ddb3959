"""The drafting methods of other engines; specdec's own are in `specdec.methods`."""

from __future__ import annotations

# vLLM's own, by its names; whether the installed version has one is seen when its engine starts
VLLM_DRAFTS = ("eagle3", "medusa", "mlp_speculator", "dflash", "dspark")
VLLM_METHODS = ("ngram_gpu", "mtp", *VLLM_DRAFTS)
