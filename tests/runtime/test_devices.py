"""A GPU computes what the CPU computes: uniforms bit for bit, distributions up to rounding, and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny

from specdec import Engine, SamplingParams
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse
from specdec.runtime.devices import fetch_later, upload
from specdec.runtime.timing import Stopwatch
from specdec.sampling.randomness import Role, uniforms
from specdec.sampling.state import SamplingState

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_k=40),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.02, top_p=0.99),
    SamplingParams(repetition_penalty=1.2, logit_bias={5: -1.0}),
]


def test_uploads_keep_shape_and_type() -> None:
    assert upload([[1, 2], [3, 4]], CPU).tolist() == [[1, 2], [3, 4]]
    assert upload([], CPU).dtype == torch.int64
    assert upload([0.5], CPU, torch.float32).dtype == torch.float32
    assert fetch_later(torch.ones(2)).tolist() == [1, 1]


def test_a_stopwatch_adds_up_by_name() -> None:
    watch = Stopwatch(CPU)
    for name in ("draft_s", "scoring_s", "draft_s"):
        with watch.phase(name):
            sum(range(1000))
    seconds = watch.seconds()
    assert set(seconds) == {"draft_s", "scoring_s"}
    assert min(seconds.values()) > 0
    assert watch.seconds() == seconds


@needs_gpu
def test_uniforms_are_the_same_bits() -> None:
    seeds, positions = torch.tensor([[-1], [0], [2**62]]), torch.arange(100)
    drawn = [
        uniforms(*(x.to(device) for x in (seeds, positions, torch.full_like(positions, Role.ACCEPT), positions // 3)))
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(drawn[0], drawn[1].cpu())


@needs_gpu
@pytest.mark.parametrize("params", PARAMS)
def test_distributions_are_the_same_up_to_rounding(params: SamplingParams) -> None:
    logits = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.rand(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drafted = torch.tensor([[5, 6], [7, 5]])
    distributions = [
        SamplingState([params] * 2, [[1, 5]] * 2, [[2], [3]], 5000, torch.device(device)).distribution(
            logits.to(device), drafted.to(device)
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(distributions[0].dense(), distributions[1].dense().cpu(), rtol=1e-4, atol=1e-6)
    assert (distributions[0].draw(draws) == distributions[1].draw(draws.cuda()).cpu()).float().mean() > 0.9


@needs_gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_greedy_tokens_are_those_of_the_cpu(kind: str) -> None:
    """In float32, recorded and compiled, three slots for four prompts, copies included."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = [tiny.reference(tiny.make(kind, tiny.SUPPORTED[kind]), prompt) for prompt in tiny.PROMPTS]
    for method in ("autoregressive", "ngram"):
        model = tiny.make(kind, tiny.SUPPORTED[kind]).to("cuda")
        fuse(model)
        engine = Engine(CausalLM(model), method=method, max_batch_size=3)
        for _ in range(2):
            completions = engine.generate(tiny.PROMPTS, replace(tiny.GREEDY, seed=1))
            assert [list(c.token_ids) for c in completions] == expected


@needs_gpu
@pytest.mark.parametrize("method", ["autoregressive", "ngram", "draft_model", "eagle", "hybrid"])
def test_the_default_pair_emits_the_same_tokens_on_a_gpu(method: str) -> None:
    """In float32, greedily; every draft's counts too."""
    sampling, prompts = SamplingParams(temperature=0, max_tokens=32), ["def fibonacci(n):", "The capital of France is"]
    on_gpu, on_cpu = (
        Engine.load("smollm2-135m", method=method, dtype=torch.float32, device=device).generate(prompts, sampling)
        for device in ("cuda", "cpu")
    )
    assert [c.token_ids for c in on_gpu] == [c.token_ids for c in on_cpu]
    assert [c.steps for c in on_gpu] == [c.steps for c in on_cpu]
