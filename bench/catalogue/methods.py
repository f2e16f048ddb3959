"""The drafting methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


METHODS = (
    *("autoregressive", "ngram", "ngram_store", "ngram_table", "suffix"),
    *("draft_model", "eagle", "early_exit", "hybrid", "tree"),
)


# vLLM's own, by its names; whether the installed version has one is seen when its engine starts
VLLM_DRAFTS = ("eagle3", "medusa", "mlp_speculator", "dflash", "dspark")
VLLM_METHODS = ("ngram_gpu", "mtp", *VLLM_DRAFTS)
