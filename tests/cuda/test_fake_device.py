"""The decode loop over fake CUDA tensors: what is captured never touches the host, and a step waits for it once.

`tox -e cuda-fake` runs these tests with torch's CUDA build; no GPU is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.fake_cuda import DEVICE, Watch, fake_gpu
from transformers import AutoConfig, AutoModelForCausalLM

from specdec import Engine, SamplingParams
from specdec.heads.eagle import EagleHead, new_head
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse
from specdec.requests import Completion, Request
from specdec.runtime.recording import Recorder
from specdec.trees.columns import Branches

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="needs the CUDA build of torch: tox -e cuda-fake",
)


@pytest.fixture(params=[False, True], ids=["torch", "triton"])
def triton(request: pytest.FixtureRequest) -> bool:
    """Whether what is computed goes through the Triton kernels or through torch."""
    return bool(request.param)


SHAPE = tiny.GQA | {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 6,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
TREE = [(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]
CHAINS = ("autoregressive", "ngram", "suffix", "draft_model", "eagle", "hybrid", "early_exit")
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 1}
STATELESS = [
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
    {"logprobs": True, "top_logprobs": 3},
    {"logprobs": True, "temperature": 0},
]
STATEFUL = [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5, "frequency_penalty": 0.5}, {"logit_bias": {5: 1.0}}]


def model(kind: str = "llama", shape: dict[str, Any] = SHAPE, layers: int = 2, dtype: torch.dtype = torch.bfloat16):
    attention = "eager" if kind in ("gpt_neo", "mpt") else "sdpa"
    config = AutoConfig.for_model(kind, **shape | {"num_hidden_layers": layers})
    with DEVICE:
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return made.eval().requires_grad_(False)


def head(target: Any) -> EagleHead:
    torch.set_default_dtype(target.dtype)
    try:
        with DEVICE:
            made = new_head(target, torch.arange(0, 512, 2)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    made.fuse()
    return made


def engine(method: str, dtype: torch.dtype = torch.bfloat16, batch: int = 1, **options: Any) -> Engine:
    target = model(dtype=dtype)
    if method != "autoregressive":
        options["num_speculative_tokens"] = 3
    if method in ("eagle", "hybrid", "tree"):
        options["draft"] = head(target)
    if method == "draft_model":
        draft = model(layers=1, dtype=dtype)
        fuse(draft)
        options["draft"] = CausalLM(draft)
    if method == "tree":
        options["tree"] = TREE
    fuse(target)
    return Engine(CausalLM(target), method=method, max_batch_size=batch, **options)


def steady(watch: Watch, engine: Engine, batch: int = 1, **params: Any) -> list[Completion]:
    """Generate until all is captured, and then once more, which is all that the watch then tells of."""
    prompts, sampling = [[5, 6, 7, 5, 6, 7, 5, 6]] * batch, SamplingParams(max_tokens=16, ignore_eos=True, **params)
    for _ in range(2):
        engine.generate(prompts, sampling)
    assert watch.num_captures > 0
    assert watch.in_captures == []
    watch.clear()
    completions = engine.generate(prompts, sampling)
    assert watch.num_captures == 0
    assert watch.of_kind("data-dependent shape", "mask as an index") == []
    return completions


def check_waits(watch: Watch, completions: list[Completion], extra: int = 0) -> None:
    """The host waits once a step, and for each prompt's first token."""
    num_steps = max(len(completion.steps) for completion in completions)
    assert len(watch.of_kind("read", "wait")) == num_steps + len(completions) + extra
    assert watch.num_replays > num_steps


def check_lean(watch: Watch, engine: Engine, batch: int = 1, uploads: int = 0, **params: Any) -> None:
    """A further step is one graph, one event, one download and so many uploads: nothing else is launched."""
    prompts, counts = [[5, 6, 7, 5, 6, 7, 5, 6]] * batch, []
    for max_tokens in (16, 24):
        watch.clear()
        completions = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params))
        kinds = [len(watch.of_kind(kind)) for kind in ("wait", "download", "read", "upload", "blocking upload")]
        counts.append([max(len(each.steps) for each in completions), watch.num_replays, *kinds, watch.num_kernels])
    more = [after - before for before, after in zip(*counts, strict=True)]
    num_steps = more[0]
    assert num_steps > 0
    assert more[:-1] == [num_steps] * 4 + [0, uploads * num_steps, 0]
    assert more[-1] == uploads * num_steps  # an upload counts as a kernel: it copies into a buffer
    assert counts[0][-1] > 0  # of the prompt, and of entering the rows


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", CHAINS)
def test_a_step_of_chains_waits_once_and_uploads_without_waiting(
    method: str, params: dict[str, Any], triton: bool
) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine(method), **params))
        assert watch.of_kind("blocking upload", "host index") == []


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, STATELESS[3]], ids=["greedy", "sampled", "truncated"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["autoregressive", "draft_model", "eagle", "early_exit", "tree"])
def test_a_step_is_one_graph_and_no_upload(method: str, batch: int, params: dict[str, Any]) -> None:
    """Where the GPU's clock can be read, which takes Triton."""
    with fake_gpu(triton=True) as watch:
        made = engine(method, batch=batch)
        steady(watch, made, batch=batch, **params)
        check_lean(watch, made, batch=batch, **params)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, STATELESS[3]], ids=["greedy", "sampled", "truncated"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["ngram", "suffix", "hybrid"])
def test_a_step_of_copies_is_one_graph_and_one_upload(method: str, batch: int, params: dict[str, Any]) -> None:
    """Where all rows copy: every token that is read is 1, so each text repeats."""
    with fake_gpu(triton=True) as watch:
        made = engine(method, batch=batch)
        steady(watch, made, batch=batch, **params)
        check_lean(watch, made, batch=batch, uploads=1, **params)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_step_of_trees_waits_once(params: dict[str, Any], triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine("tree"), **params))


@pytest.mark.parametrize(
    ("method", "verification"),
    [("eagle", "block"), ("eagle", "coupled"), ("draft_model", "coupled"), ("autoregressive", "coupled")],
)
def test_other_rules(method: str, verification: str, triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine(method, verification=verification), **SAMPLED))
        assert watch.of_kind("blocking upload", "host index") == []


def test_coupled_trees(triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine("tree", verification="coupled"), **SAMPLED))


@pytest.mark.parametrize("params", STATELESS, ids=lambda params: "-".join(params))
@pytest.mark.parametrize("method", ["autoregressive", "eagle"])
def test_sampling_parameters(method: str, params: dict[str, Any], triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        completions = steady(watch, engine(method), **params)
        num_logprobs = sum(len(each.steps) + 1 for each in completions) if "logprobs" in params else 0
        check_waits(watch, completions, num_logprobs * (3 if "top_logprobs" in params else 1))


@pytest.mark.parametrize("params", STATEFUL, ids=lambda params: "-".join(params))
@pytest.mark.parametrize("method", ["autoregressive", "ngram", "draft_model", "eagle", "tree"])
def test_parameters_that_look_at_the_text(method: str, params: dict[str, Any], triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine(method), **params))


class Anything:
    """A constraint that allows every token."""

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> torch.Tensor:
        return torch.ones(512, dtype=torch.bool)

    def advance(self, state: int, token: int) -> int:
        return 0


@pytest.mark.parametrize("method", ["autoregressive", "ngram", "draft_model", "eagle", "tree"])
def test_constrained_rows(method: str, triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        decoder = engine(method)._decoder
        request = Request(0, (5, 6, 7, 5, 6, 7), SamplingParams(max_tokens=12), frozenset(), constraint=Anything())
        for _ in range(3):
            (row,) = decoder.run([request])
        assert len(row.output) == 12
        assert watch.in_captures == []
        assert watch.of_kind("data-dependent shape", "mask as an index") == []


@pytest.mark.parametrize("method", ["autoregressive", "draft_model", "eagle", "tree"])
def test_several_rows(method: str, triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        check_waits(watch, steady(watch, engine(method, batch=3), batch=3, **SAMPLED))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_recorded_step_keeps_hidden_states_of_layers(kind: str, triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        target = model(kind, SHAPE if kind == "llama" else tiny.SUPPORTED[kind])
        fuse(target)
        lm, recorder = CausalLM(target), Recorder(DEVICE)
        cache = lm.allocate(2, 1024, features=(2, 0, FINAL, 1))
        tokens, starts = (torch.ones(shape, dtype=torch.int64, device=DEVICE) for shape in ((2, 4), (2,)))
        watch.clear()
        for branches in (None, Branches.after_root((-1, 0, -1))):
            for _ in range(3):
                recorder(lm.forward_at, tokens, starts, cache, 256, 0, None, branches)
        assert (watch.num_captures, watch.num_replays) == (2, 2)
        assert watch.in_captures == []
        assert watch.of_kind("read", "wait", "data-dependent shape", "mask as an index", "host index") == []


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_way_attention_is_laid_out(backend: str, dtype: torch.dtype) -> None:
    """Kernels differ in the strides of what they return; with groups of heads, which are then taken apart."""
    with fake_gpu(backend) as watch:
        check_waits(watch, steady(watch, engine("eagle", dtype), **GREEDY))


# the others are not captured: Mixtral asks which experts are needed, GPT-Neo uploads a constant in each layer
@pytest.mark.parametrize("kind", sorted(tiny.SUPPORTED.keys() - {"mixtral", "gpt_neo"}))
def test_other_architectures(kind: str, triton: bool) -> None:
    with fake_gpu(triton=triton) as watch:
        longer = {name: 4096 for name in ("max_position_embeddings", "max_seq_len") if name in tiny.SUPPORTED[kind]}
        target = model(kind, tiny.SUPPORTED[kind] | longer)
        fuse(target)
        check_waits(watch, steady(watch, Engine(CausalLM(target), method="ngram"), **GREEDY))
