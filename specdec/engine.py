"""What people call: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch

from specdec.decoding import Decoder
from specdec.models import LanguageModel
from specdec.proposers import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.ngram import CountIndex, LookupIndex, NgramProposer
from specdec.requests import Completion, Generation, Request
from specdec.sampling import SamplingParams
from specdec.stats import PhaseTimes
from specdec.verification import VerificationRule, verify_block, verify_tokens

Method = Literal["autoregressive", "draft_model", "ngram", "ngram_store"]
METHODS: tuple[Method, ...] = get_args(Method)
VERIFICATIONS: dict[str, VerificationRule] = {"token": verify_tokens, "block": verify_block}


class HasVocabulary(Protocol):
    """A model, or what is known of it before its weights are read; a `tokenizer` attribute is looked at if present."""

    @property
    def vocab_size(self) -> int: ...


class Engine:
    """Decodes prompts with a target model and one method of proposing tokens; the output law is the target's own.

    target: a LanguageModel such as CausalLM. draft: the draft model, for method "draft_model" only.
    method: "autoregressive", "draft_model", "ngram" (prompt lookup) or "ngram_store" (online n-gram counts).
    num_speculative_tokens: tokens proposed per step (gamma), at least 1; "autoregressive" proposes none.
    max_batch_size: prompts decoded together.
    verification: "token" or "block", the rule that verifies a draft; both are lossless.
    Raises ValueError naming the value, the rule and the remedy.
    """

    def __init__(
        self,
        target: LanguageModel,
        *,
        method: Method = "autoregressive",
        draft: LanguageModel | None = None,
        num_speculative_tokens: int = 4,
        max_batch_size: int = 1,
        verification: str = "token",
    ) -> None:
        _require(max_batch_size >= 1, f"max_batch_size={max_batch_size} must be at least 1")
        _check_verification(verification)
        self.target, self.draft, self.method = target, draft, method
        self._tokenizer: Any = getattr(target, "tokenizer", None)
        self._eos_token_ids: frozenset[int] = getattr(target, "eos_token_ids", frozenset())
        proposer = _make_proposer(target, draft, method, num_speculative_tokens)
        self.num_speculative_tokens = num_speculative_tokens if proposer else 0
        self._decoder = Decoder(
            target,
            proposer,
            self.num_speculative_tokens,
            max_batch_size=max_batch_size,
            rule=VERIFICATIONS[verification],
        )

    @classmethod
    def load(
        cls,
        target: str,
        *,
        draft: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        attention: str = "sdpa",
        load_format: str = "auto",
        **options: Any,
    ) -> Engine:
        """An engine from model names: a bundled name such as "smollm2-135m", a hub id, a folder or a GGUF file.

        options: as for the constructor. Arguments are checked before any model is loaded.
        """
        method = options.get("method", "autoregressive")
        _check_method(method, draft is not None, options.get("num_speculative_tokens", 4))
        _check_verification(options.get("verification", "token"))
        from specdec.models.causal import CausalLM
        from specdec.models.fusion import fuse
        from specdec.models.loading import load_pretrained, read_vocabulary

        def load(source: str) -> CausalLM:
            model, tokenizer = load_pretrained(
                source, dtype=dtype, device=device, attention=attention, load_format=load_format
            )
            fuse(model)
            return CausalLM(model, tokenizer)

        if draft:
            check_same_vocabulary(read_vocabulary(target, load_format), read_vocabulary(draft, load_format))
        return cls(load(target), draft=load(draft) if draft else None, **options)

    @property
    def phase_times(self) -> PhaseTimes:
        """Where the time of the last `generate` went."""
        return self._decoder.times

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue each prompt, given as text or as token ids; completions come in the order of the prompts.

        sampling: one SamplingParams for all prompts or one for each; None is SamplingParams().
        Raises ValueError for an empty prompt, or one that with max_tokens exceeds the context, before decoding any.
        """
        params = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else sampling
        _require(
            len(params) == len(prompts),
            f"{len(params)} sampling parameters must be one, or one for each of the {len(prompts)} prompts",
        )
        requests = [
            self._request(index, prompt, each) for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        completions = [self._complete(generation) for generation in self._decoder.run(requests)]
        return sorted(completions, key=lambda completion: completion.index)

    def _request(self, index: int, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        tokens = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        vocab_size, context = self.target.vocab_size, self.target.context_length
        _require(len(tokens) > 0, f"prompt {index} must not be empty: give at least one token")
        _require(
            all(0 <= token < vocab_size for token in tokens),
            f"prompt {index} has token ids outside [0, {vocab_size}); was it tokenised for another model?",
        )
        _require(
            len(tokens) + sampling.max_tokens <= context,
            f"prompt {index} has {len(tokens)} tokens, which with max_tokens={sampling.max_tokens} exceeds the "
            f"model's context of {context}; shorten the prompt or lower max_tokens",
        )
        out_of_range = [t for t in (*sampling.logit_bias, *sampling.stop_token_ids) if t >= vocab_size]
        _require(
            not out_of_range,
            f"logit_bias and stop_token_ids of prompt {index} must be token ids below {vocab_size}, not {out_of_range}",
        )
        stop = frozenset(sampling.stop_token_ids)
        return Request(index, tokens, sampling, stop if sampling.ignore_eos else stop | self._eos_token_ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        _require(self._tokenizer is not None, "a text prompt needs a model with a tokenizer; give token ids")
        return tuple(self._tokenizer(text).input_ids)

    def _complete(self, row: Generation) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            index=row.request.index,
            prompt_token_ids=row.request.prompt,
            token_ids=tuple(row.output),
            text=self._tokenizer.decode(row.output, skip_special_tokens=True) if self._tokenizer else None,
            finish_reason=row.finish_reason,
            logprobs=tuple(row.logprobs) if row.request.sampling.logprobs else None,
            steps=tuple(row.steps),
            ttft_s=row.first_token_s - row.arrival_s,
            latency_s=row.last_token_s - row.arrival_s,
        )


def _make_proposer(
    target: LanguageModel, draft: LanguageModel | None, method: Method, num_speculative_tokens: int
) -> Proposer | None:
    _check_method(method, draft is not None, num_speculative_tokens)
    if method == "draft_model":
        assert draft is not None
        check_same_vocabulary(target, draft)
        return DraftModelProposer(draft)
    if method in ("ngram", "ngram_store"):
        return NgramProposer(target.vocab_size, target.device, LookupIndex if method == "ngram" else CountIndex)
    return None


def _check_verification(verification: str) -> None:
    _require(verification in VERIFICATIONS, f"verification={verification!r} must be one of {', '.join(VERIFICATIONS)}")


def _check_method(method: str, has_draft: bool, num_speculative_tokens: int) -> None:
    _require(method in METHODS, f"method={method!r} must be one of {', '.join(METHODS)}")
    _require(has_draft or method != "draft_model", 'method="draft_model" needs a draft; name one, or use "ngram"')
    _require(
        not has_draft or method == "draft_model",
        f'a draft is given but method={method!r} does not use it; use method="draft_model"',
    )
    _require(
        num_speculative_tokens >= 1 or method == "autoregressive",
        f"num_speculative_tokens={num_speculative_tokens} must be at least 1; for plain decoding use "
        'method="autoregressive"',
    )


def check_same_vocabulary(target: HasVocabulary, draft: HasVocabulary) -> None:
    """Raise ValueError unless token ids mean the same to both models."""
    _require(
        target.vocab_size == draft.vocab_size,
        f"the draft's vocabulary of {draft.vocab_size} tokens must be the target's, {target.vocab_size}; "
        "use a draft of the same family",
    )
    tokenizers: list[Any] = [getattr(model, "tokenizer", None) for model in (target, draft)]
    if all(tokenizers):
        ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
        different = min((token for token, _ in ours.items() ^ theirs.items()), default=None)
        _require(
            ours == theirs,
            f"the draft's tokenizer must be the target's, but token {different!r} is "
            f"{ours.get(different)} for the target and {theirs.get(different)} for the draft; "
            "use a draft of the same family",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
