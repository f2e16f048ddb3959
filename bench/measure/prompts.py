"""The prompts of a run: reading and sampling them, encoding them, and choosing those of a cell."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest

from bench.campaign.config import THINKING, BenchConfig
from bench.catalogue.pairs import Pair
from bench.measure.quality import sandbox
from bench.records.schema import Cell
from bench.workloads import random_tokens, registry
from bench.workloads.base import Cases, Lengths, Malformed, Prompt, UnavailableError, UnitTest, bucket, turns_of
from specdec.prompts import encode, encode_bytes, encode_raw, render

MAX_PROMPTS = 1000  # of a load by default; they are asked again if there are more requests
Batch = list[tuple[int, ...]]  # prompts as token ids
Answer = Callable[[tuple[int, ...]], str]  # of the target to a prompt
Encoded = tuple[Prompt, tuple[int, ...]]  # a prompt and its token ids


class Prompts:
    """The sampled prompts of each workload, read on construction.

    by_workload: by label, the prompts or the reason why a default workload is unavailable. malformed: by label, the
    skipped rows. num_requests: requests at the highest rate; unused without a rate.
    Raises ValueError if a workload has too few prompts, or if code must be executed and there is no sandbox.
    """

    def __init__(self, config: BenchConfig, num_requests: int = 0) -> None:
        self._config, self._num_requests = config, num_requests
        self.malformed = {registry.label(name): Malformed(config.malformed) for name in config.workloads}
        self.by_workload = {registry.label(name): self._read(name) for name in config.workloads}
        self._answers: dict[tuple[str, tuple[int, ...]], str] = {}  # by pair and conversation before them
        self._check_code_execution()

    def available(self) -> Iterator[list[Prompt]]:
        """The prompts of each available workload."""
        return (prompts for prompts in self.by_workload.values() if not isinstance(prompts, str))

    def why_unavailable(self, cell: Cell) -> str | None:
        """Why a cell's workload is unavailable; None if it is available."""
        prompts = self.by_workload[self._bucket(cell)[0]]
        return prompts if isinstance(prompts, str) else None

    def sha256(self) -> str:
        """A digest of all prompts."""
        prompts = (prompt for prompts in self.available() for prompt in prompts)
        texts = (text for each in prompts for text in (repr(each), *each.earlier, *map(str, each.messages)))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def rows_left_out(self, cell: Cell) -> dict[str, int]:
        """Record fields: the number of malformed rows of the cell's workload, and of rows without a prompt."""
        read = self.malformed[self._bucket(cell)[0]]
        return {"num_rows_skipped": len(read.skipped), "num_rows_passed_over": len(read.passed_over)}

    def chosen(self, cell: Cell, pair: Pair, tokenizer: Any, answer: Answer | None = None) -> list[Encoded]:
        """The cell's prompts of the requested lengths, with their token ids.

        tokenizer: the reference engine's. answer: what the target answers, for later turns of conversations.
        Fails the cell if there are too few, or if one exceeds the pair's context.
        """
        workload, lengths = self._bucket(cell)
        prompts = self.by_workload[workload]
        assert not isinstance(prompts, str), "a skipped cell is not measured"
        encoded = ((prompt, self._encoded(prompt, tokenizer, pair, answer)) for prompt in prompts)
        chosen = list(encoded) if lengths is None else self._of_length(cell, encoded, lengths)
        self._check_context(cell, pair, chosen)
        return chosen

    def _encoded(self, prompt: Prompt, tokenizer: Any, pair: Pair, answer: Answer | None) -> tuple[int, ...]:
        if not prompt.earlier:
            return encoded_prompt(prompt, tokenizer, self._config, pair)
        if self._config.prompt_format == "raw" or not getattr(tokenizer, "chat_template", None):
            pytest.fail(
                "turns=all must have a chat template and prompt_format=instruct; use --turns first", pytrace=False
            )
        assert answer, "a conversation needs the target's answers"
        arguments, messages = self._config.template_arguments, list[dict[str, str]]()
        for text in prompt.earlier:
            messages.append({"role": "user", "content": text})
            asked = render(messages, tokenizer, arguments)
            key = (pair.name, asked)
            self._answers[key] = self._answers.get(key) or answer(asked)
            messages.append({"role": "assistant", "content": self._answers[key]})
        return render([*messages, {"role": "user", "content": prompt.text}], tokenizer, arguments)

    def _of_length(self, cell: Cell, encoded: Iterator[Encoded], lengths: Lengths) -> list[Encoded]:
        """The first prompts of the requested lengths."""
        shortest, longest = lengths
        num_prompts = self._config.num_prompts
        fitting = ((prompt, tokens) for prompt, tokens in encoded if shortest <= len(tokens) <= longest)
        chosen = list(islice(fitting, num_prompts))
        if len(chosen) < num_prompts:
            pytest.fail(
                f"prompt_lengths={shortest}:{longest} must hold for at least num_prompts={num_prompts} of the prompts "
                f"of workload={cell.workload}, but does for {len(chosen)}; widen it, or lower --num-prompts",
                pytrace=False,
            )
        return chosen

    def _check_context(self, cell: Cell, pair: Pair, chosen: list[Encoded]) -> None:
        max_tokens = max(prompt.max_tokens or self._config.max_tokens for prompt, _ in chosen)
        longest = max(len(tokens) for _, tokens in chosen)
        if pair.context is not None and longest + max_tokens > pair.context:
            pytest.fail(
                f"workload={cell.workload} has a prompt of {longest} tokens, which with max_tokens="
                f"{max_tokens} must fit into the context of pair={pair.name}, {pair.context}; "
                "lower --max-tokens or choose another workload",
                pytrace=False,
            )

    def _bucket(self, cell: Cell) -> tuple[str, Lengths | None]:
        """The label of a cell's workload, and the lengths of its prompts."""
        return bucket(cell.workload, self._config.prompt_lengths)

    def _read(self, workload: str) -> list[Prompt] | str:
        """The sampled prompts, or the reason why a default workload is unavailable."""
        config = self._config
        try:
            prompts = registry.read(workload, config.data_dir, self.malformed[registry.label(workload)])
        except UnavailableError as error:
            if "workloads" in config.named:
                raise
            return str(error)
        is_trace = any(prompt.arrival_s is not None for prompt in prompts)
        if is_trace and not config.rates:
            raise ValueError(f"workloads={workload} is a trace and must be replayed at a rate; give one with --rate")
        num_prompts = len(prompts) if is_trace else self._num_prompts(len(prompts))
        if not (1 if config.is_load else max(config.batch_sizes)) <= num_prompts <= len(prompts):
            raise ValueError(
                f"num_prompts={num_prompts} must be at most {len(prompts)}, the prompts of workload {workload}, "
                "and at least the batch size; lower --num-prompts or --batch-sizes"
            )
        # selecting by length needs a tokenizer: until one is loaded, keep all prompts in random order
        if is_trace:
            return prompts  # in their order
        sampled = registry.sample(prompts, len(prompts) if config.prompt_lengths else num_prompts, config.seed)
        return [turn for prompt in sampled for turn in turns_of(prompt)] if config.turns == "all" else sampled

    def _num_prompts(self, num_available: int) -> int:
        """The requested number of prompts, else the default or, with a rate, one per request, as far as available."""
        config = self._config
        if "num_prompts" in config.named:
            return config.num_prompts
        if not config.is_load or config.turns == "all":  # the answers between turns take time
            return min(config.num_prompts, num_available)
        return min(self._num_requests or MAX_PROMPTS, MAX_PROMPTS, num_available)

    def _check_code_execution(self) -> None:
        """Raise ValueError if code must be executed and there is no sandbox."""
        truths = (prompt.truth for prompts in self.available() for prompt in prompts)
        has_code = any(isinstance(truth, UnitTest | Cases) for truth in truths)
        if self._config.allow_code_execution and has_code and (reason := sandbox.why_not()):
            raise ValueError(
                f"allow_code_execution=1 must have a working sandbox, but {reason}; run as root or enable user "
                "namespaces, in a container use --cap-add SYS_ADMIN, or omit the option"
            )


def source_of(encoded: Sequence[Encoded]) -> dict[str, str]:
    """Record field: whether prompts are texts."""
    return {"prompt_source": "random tokens" if any(prompt.drawn for prompt, _ in encoded) else "text"}


def encoded_prompt(prompt: Prompt, tokenizer: Any, config: BenchConfig, pair: Pair) -> tuple[int, ...]:
    """A prompt's token ids in the requested format; its bytes for random weights without a tokenizer.

    Fails the cell if there is no tokenizer, or if prompt_format=instruct was requested without a chat template.
    """
    if prompt.drawn:
        return random_tokens.draw(prompt.drawn, random_tokens.vocabulary(tokenizer))
    is_raw = config.prompt_format == "raw"
    if not is_raw and "prompt_format" in config.named and not getattr(tokenizer, "chat_template", None):
        pytest.fail("prompt_format=instruct must have a tokenizer with a chat template; use raw", pytrace=False)
    if prompt.messages:
        return _encoded_messages(prompt, tokenizer, config)
    text = (prompt.raw or prompt.text) if is_raw else prompt.text
    if tokenizer is None and pair.load_format == "dummy":
        return encode_bytes(text)
    if tokenizer is None:
        pytest.fail(f"pair={pair.name} must have a tokenizer to read prompts; name a target with one", pytrace=False)
    if is_raw:
        return encode_raw(text, tokenizer)
    _check_thinking(tokenizer, config)
    return encode(text, tokenizer, config.template_arguments)


def _encoded_messages(prompt: Prompt, tokenizer: Any, config: BenchConfig) -> tuple[int, ...]:
    """A conversation by the tokenizer's chat template. Fails the cell without one."""
    if config.prompt_format == "raw" or not getattr(tokenizer, "chat_template", None):
        pytest.fail(
            "messages must have a chat template and prompt_format=instruct; use prompts without roles", pytrace=False
        )
    _check_thinking(tokenizer, config)
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    return render(messages, tokenizer, config.template_arguments)


def _check_thinking(tokenizer: Any, config: BenchConfig) -> None:
    """Fail the cell if thinking was turned on or off and the chat template does not know it."""
    if config.thinking == "default":
        return
    probe = [encode("a", tokenizer, dict.fromkeys(THINKING, value)) for value in (True, False)]
    if probe[0] == probe[1]:
        pytest.fail(
            f"thinking={config.thinking} must be known to the chat template, but it has neither "
            f"{' nor '.join(THINKING)}; use --chat-template-arguments with its own variable",
            pytrace=False,
        )
