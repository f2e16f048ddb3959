"""transformers: `generate`, plain, with prompt lookup, or with an assistant model.

transformers returns no acceptance statistics, so they are observed: a forward hook on the target receives each draft,
and the streamer receives the tokens emitted by each target call. The first call scores the prompt; it counts as a
decode step if it includes a draft.

Sampling with an assistant is measured as implemented: transformers 5.23 applies temperature and top-p twice to the
assistant, so that even a model that assists itself has rejections (except at T = 1 without top-p).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from bench.catalogue.pairs import Pair, folder
from bench.engines.base import LoadOptions, PromptResult, Run, Setup
from bench.records.schema import Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.drafts import place_models
from specdec.models.causal import eos_token_ids
from specdec.models.files.formats import OWN_QUANTIZATIONS, QUANTIZATIONS
from specdec.models.loading import load_pretrained
from specdec.models.seq2seq import start_token


class TransformersEngine:
    """Runs `generate` on one prompt at a time, with weights as transformers loads them."""

    version = transformers.__version__

    def __init__(self, target: Any, draft: Any, tokenizer: Any) -> None:
        self._target, self._draft, self.tokenizer = target, draft, tokenizer
        self.dtype, self.stop_token_ids = str(target.dtype).removeprefix("torch."), eos_token_ids(target)

    def prepare(self, setups: Collection[Setup]) -> None:
        """Nothing to do: all setups share the models."""

    def settle(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to stop."""

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        ((prompt,), (params,)) = prompts, sampling
        tokens = torch.tensor([list(prompt)], device=self._target.device)
        stop_token_ids = [] if params.ignore_eos else sorted(self.stop_token_ids)
        config = _generation_config(params, stop_token_ids)
        arguments: dict[str, Any] = {"assistant_model": self._draft} if method == "draft_model" else {}
        if method == "ngram":
            config.prompt_lookup_num_tokens = gamma
        start, num_before = _before_output(self._target, len(prompt))
        config.decoder_start_token_id = start
        torch.manual_seed(params.seed)
        with _own_configs(self._target, self._draft, gamma, start), Observer(self._target, num_before) as observer:
            output = self._target.generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=observer, **arguments
            )
        return Run((_result(output[0, num_before:].tolist(), observer, stop_token_ids),))


def load(pair: Pair, options: LoadOptions) -> TransformersEngine:
    """Load the pair's models as transformers does; the draft is a separate instance even if it is the target.

    Raises ValueError for a quantization that only specdec's kernels can compute.
    """
    if options.quantization in OWN_QUANTIZATIONS:
        raise ValueError(
            f"quantization={options.quantization!r} must be one that transformers has; use "
            f"{' or '.join(QUANTIZATIONS)}, or leave the engine transformers out"
        )
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, options.dtype),
        "device": options.device,
        "attention": pair.attention,
        "load_format": pair.load_format,
        "quantization": options.quantization,
    }
    drafts = [folder(pair.draft)] if pair.draft else []
    device, draft_devices = place_models(folder(pair.target), drafts, pair.placement, arguments)
    target, tokenizer = load_pretrained(folder(pair.target), **arguments | {"device": device})
    loaded = [load_pretrained(each, **arguments | {"device": draft_devices[each]})[0] for each in drafts]
    return TransformersEngine(target, loaded[0] if loaded else None, tokenizer)


class Observer(BaseStreamer):  # type: ignore[misc]
    """Observes one `generate` call: the times of its tokens and the acceptance of its drafts.

    prompt_length: tokens before the output; for an encoder-decoder, the decoder's start token.
    counts: acceptance counters by specdec's definitions, without accepted tokens that truncation removed.
    times_s: time of each target call that emitted tokens. emitted: the token ids. step_tokens: tokens of each step.
    """

    def __init__(self, model: nn.Module, prompt_length: int) -> None:
        self._model, self._prompt_length = model, prompt_length
        self.counts, self.emitted = AcceptanceCounts(), list[int]()
        self.step_tokens: list[int] = []
        self.times_s: list[float] = []
        self._draft: Tensor | None = None
        self._is_prompt = True

    def __enter__(self) -> Observer:
        self._hook = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.start_s = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Record the draft: the tokens after the prompt, or later after the single uncached token."""
        tokens = kwargs["decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"]
        self._draft = tokens[0, 1 if self.times_s else self._prompt_length :]

    def put(self, value: Tensor) -> None:
        """Record the tokens emitted by a target call; the first call receives the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times_s.append(time.perf_counter())
        emitted, draft = value.flatten().tolist(), [] if self._draft is None else self._draft.tolist()
        if draft or self.emitted:
            self.counts.add_step(len(draft), _num_equal(draft, emitted), len(emitted))
            self.step_tokens.append(len(emitted))
        self.emitted += emitted

    def end(self) -> None:
        """Nothing is left to do when `generate` ends."""


def _before_output(target: Any, num_prompt: int) -> tuple[int | None, int]:
    """The token that a decoder starts from, None if it goes on from a prompt, and how many stand before the output."""
    if not target.config.is_encoder_decoder:
        return None, num_prompt
    return start_token(target), 1


def _result(emitted: list[int], observer: Observer, stop_token_ids: Sequence[int]) -> PromptResult:
    assert observer.emitted == emitted, "the streamer must be given every emitted token"
    ttft_s, latency_s = (observer.times_s[index] - observer.start_s for index in (0, -1))
    finish_reason = "stop" if emitted[-1] in stop_token_ids else "length"
    steps = tuple(observer.step_tokens)
    return PromptResult(tuple(emitted), ttft_s, latency_s, observer.counts, finish_reason, step_tokens=steps)


def _num_equal(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """Accepted tokens: the common prefix. A recovered token always differs from the one that it replaces."""
    pairs = enumerate(zip(draft, emitted, strict=False))
    return next((index for index, (drafted, token) in pairs if drafted != token), min(len(draft), len(emitted)))


def _generation_config(params: SamplingParams, stop_token_ids: list[int]) -> GenerationConfig:
    """The generation config with the same distribution and stop rules as specdec."""
    distribution: dict[str, Any] = {"do_sample": False}
    if params.temperature > 0:
        distribution = {
            "do_sample": True,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
        }
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        eos_token_id=stop_token_ids or None,
        pad_token_id=stop_token_ids[0] if stop_token_ids else 0,
        use_cache=True,
        **distribution,
    )


@contextmanager
def _own_configs(target: Any, draft: Any, gamma: Gamma, start: int | None) -> Iterator[None]:
    """Replace both models' generation configs, whose defaults would change the distribution, and restore them."""
    constant = GenerationConfig(
        num_assistant_tokens=gamma,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
        decoder_start_token_id=start,
    )
    replaced = [(model, model.generation_config) for model in (target, draft) if model is not None]
    target.generation_config = GenerationConfig()
    if draft is not None:
        draft.generation_config = constant
    try:
        yield
    finally:
        for model, found in replaced:
            model.generation_config = found
