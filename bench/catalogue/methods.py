"""The drafting methods of other engines; specdec's own are in `specdec.methods`."""

from __future__ import annotations

from specdec.methods import METHODS

# vLLM's own, by its names; whether the installed version has one is seen when its engine starts
VLLM_DRAFTS = ("eagle3", "medusa", "mlp_speculator", "dflash", "dspark")
VLLM_METHODS = ("ngram_gpu", "mtp", *VLLM_DRAFTS)
LLAMA_METHODS = ("ngram_map_k", "ngram_mod", "ngram_cache")  # llama.cpp's own, by its names with underscores
PEER_METHODS = (*VLLM_METHODS, *LLAMA_METHODS)
_SMOKE_DRAFTS = {"model", "table", "eagle"}  # those of the pair of smoke runs
SMOKE_METHODS = tuple(
    name for name, spec in METHODS.items() if not spec.draft_kinds or not _SMOKE_DRAFTS.isdisjoint(spec.draft_kinds)
)
