"""The real model on real prompts, in float32: speculative, autoregressive and transformers agree token for token."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from specdec import AcceptanceCounts, Engine, SamplingParams
from specdec.kernels import cpp
from specdec.models.causal import CausalLM

MAX_TOKENS = 20
QUESTIONS = [
    "Write a Python function that returns the n-th Fibonacci number.",
    "Repeat after me, word for word: the cat sat on the mat, and the dog barked at the cat until the cat left the mat.",
    "If a train travels 60 miles in 1.5 hours, what is its average speed? Think step by step.",
    "List three rules for naming variables.",
]
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def prompts(default_model: CausalLM) -> list[list[int]]:
    tokenizer = default_model.tokenizer
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def reference(default_model: CausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """The output of `transformers.generate`."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = default_model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def damaged(target: CausalLM) -> CausalLM:
    """A deliberately bad draft: the target without its last 28 layers."""
    from transformers import AutoModelForCausalLM

    config = type(target.config).from_dict(target.config.to_dict() | {"num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(config, dtype=target.dtype).eval()
    model.load_state_dict(target.model.state_dict(), strict=False)
    return CausalLM(model, target.tokenizer)


@pytest.mark.parametrize(
    ("method", "max_batch_size"), [("autoregressive", 1), ("autoregressive", 3), ("ngram", 1), ("ngram_store", 3)]
)
def test_greedy_equals_transformers(
    method: str, max_batch_size: int, default_model: CausalLM, prompts: list, reference: list
) -> None:
    """One at a time, or four prompts in three slots, one of which is refilled."""
    completions = Engine(default_model, method=method, max_batch_size=max_batch_size).generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in completions] == reference
    if method != "autoregressive":
        assert sum(c.counts.num_accepted for c in completions) > 0


@pytest.mark.parametrize("method", ["ngram", "ngram_table", "suffix", "draft_model", "eagle", "hybrid", "tree"])
def test_greedy_equals_transformers_with_an_engine_loaded_by_name(method: str, prompts: list, reference: list) -> None:
    """`Engine.load` fuses layers and finds the pair's own drafts; in float32 the tokens stay the same."""
    engine = Engine.load("smollm2-135m", dtype=torch.float32, method=method, num_speculative_tokens=3, max_batch_size=2)
    completions = engine.generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in completions] == reference
    counts = AcceptanceCounts.total(c.counts for c in completions)
    assert counts.num_accepted > 0
    if method in ("eagle", "draft_model", "hybrid", "tree"):  # trained for this target, and fed the right features
        assert counts.acceptance_rate_at[0] > 0.25


def test_the_first_layers_draft_and_change_nothing(default_model: CausalLM, prompts: list, reference: list) -> None:
    """Most of the layers, so that something is accepted: this model was not trained to be left early."""
    options = {"exit_layer": 27, "num_speculative_tokens": 2, "max_batch_size": 2}
    completions = Engine(default_model, method="early_exit", **options).generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in completions] == reference
    assert sum(c.counts.num_accepted for c in completions) > 0


@pytest.mark.skipif(not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16")
def test_tree_output_in_bf16_equals_plain_decoding(prompts: list) -> None:
    """Near ties included: a node's logits are the same bits, of a head's tree and of a draft model's."""
    tree = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    plain = None
    for draft in ("smollm2-135m-eagle", "smollm2-135m-draft"):
        engine = Engine.load("smollm2-135m", method="tree", draft=draft, tree=tree, max_batch_size=2)
        assert (getattr(engine.draft, "rates", None) is not None) == draft.endswith("eagle")  # measured of the head
        completions = engine.generate(prompts, GREEDY)
        plain = plain or [c.token_ids for c in Engine(engine.target).generate(prompts, GREEDY)]
        assert [c.token_ids for c in completions] == plain
        counts = AcceptanceCounts.total(c.counts for c in completions)
        assert counts.num_accepted > 0.2 * counts.num_steps


def test_self_draft_is_accepted_always(default_model: CausalLM, prompts: list, reference: list) -> None:
    engine = Engine(default_model, method="draft_model", draft=default_model, num_speculative_tokens=3)
    completions = engine.generate(prompts[:2], GREEDY)
    assert [list(c.token_ids) for c in completions] == reference[:2]
    for completion in completions:
        lost_to_truncation = sum(step.last is None for step in completion.steps)
        assert completion.counts.num_drafted - completion.counts.num_accepted <= 3 * lost_to_truncation


def test_a_bad_draft_changes_nothing(default_model: CausalLM, prompts: list, reference: list) -> None:
    engine = Engine(
        default_model, method="draft_model", draft=damaged(default_model), num_speculative_tokens=2, max_batch_size=2
    )
    completions = engine.generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in completions] == reference
    drafted = sum(c.counts.num_drafted for c in completions)
    assert sum(c.counts.num_accepted for c in completions) < 0.2 * drafted


def test_coupled_sampling_is_the_same_with_any_draft(default_pair: tuple[CausalLM, dict], prompts: list) -> None:
    """Equality above temperature 0: any draft gives the tokens of plain decoding with the same noise."""
    params = [SamplingParams(temperature=t, top_p=p, max_tokens=MAX_TOKENS) for t, p in ((1, 1), (0.7, 0.9))] * 2
    (target, drafts), outputs = default_pair, {}
    for method in ("autoregressive", "eagle", "hybrid", "draft_model"):
        options = {"verification": "coupled", "num_speculative_tokens": 3, "max_batch_size": 2}
        completions = Engine(target, method=method, draft=drafts.get(method), **options).generate(prompts, params)
        outputs[method] = [c.token_ids for c in completions]
        assert method == "autoregressive" or sum(c.counts.num_accepted for c in completions) > 0
    assert [method for method in outputs if outputs[method] != outputs["autoregressive"]] == []


def test_text_in_text_out(default_model: CausalLM) -> None:
    completion = Engine(default_model).generate(
        ["The capital of France is"], SamplingParams(temperature=0, max_tokens=5)
    )[0]
    assert "Paris" in completion.text


def test_sampled_rows_do_not_depend_on_their_batch(default_model: CausalLM, prompts: list) -> None:
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.3, max_tokens=10, seed=i) for i in range(3)
    ]
    alone = [
        Engine(default_model, method="ngram").generate([prompt], each)[0].token_ids
        for prompt, each in zip(prompts[:3], params, strict=True)
    ]
    together = Engine(default_model, method="ngram", max_batch_size=3).generate(prompts[:3], params)
    assert [c.token_ids for c in together] == alone


MEASURE_MEMORY = """
import resource, torch
from specdec import Engine, SamplingParams

def megabytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

engine = Engine.load("smollm2-135m", method="ngram", max_batch_size=4)
params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True)
prompts = [list(range(100, 1500)), [5] * 900, [7, 8] * 300, [9]]
engine.generate([[1]], SamplingParams(max_tokens=2))  # first-use allocations of the libraries
before = megabytes("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # forget the peak so far
engine.generate(prompts, params)
cache = 30 * 2 * 4 * 3 * (1400 + 12 + 4) * 64 * 2 / 2**20
print(megabytes("VmHWM") - before - cache)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to reset peak memory")
def test_decoding_needs_its_caches_and_less_than_300_mb() -> None:
    """bf16, four rows, a prompt of 1400 tokens: the peak above what the loaded weights take."""
    output = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True, check=True).stdout
    assert float(output) < 300
