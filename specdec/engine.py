"""Public entry point: prompts in, completions out."""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch

from specdec.constraints.bans import AtLeast, Without, all_of
from specdec.constraints.llguidance import GrammarCompiler
from specdec.constraints.progress import Constraint
from specdec.decoding import Decoder
from specdec.drafts import (
    NEEDS,
    Kind,
    check_kinds,
    check_same_vocabulary,
    kind_in,
    kind_of,
    load_with_drafts,
    share_vocabulary,
)
from specdec.methods import METHODS, VERIFICATION_NAMES, Method
from specdec.models.base import LanguageModel, is_encoder_decoder
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts, target_costs
from specdec.models.elsewhere import can_be_recorded, seen_from
from specdec.models.loading import as_device, as_dtype, packaged_draft, with_revision
from specdec.models.vocabularies import pieces_of
from specdec.prompts import Message, Prompt, as_messages, as_prompts, as_token_ids, encode_raw, render
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.early_exit import EarlyExitProposer
from specdec.proposers.hybrid import BetterCopies, HybridProposer
from specdec.proposers.ngram import CountIndex, LookupIndex, NgramProposer, TokenIndex
from specdec.proposers.suffix import SuffixProposer
from specdec.proposers.table import Fallback
from specdec.requests import Chunk, Completion, Generation, Request, sources_of
from specdec.runtime.checks import nearest, require, require_choice, require_integer
from specdec.runtime.recording import Recorder
from specdec.sampling.randomness import own_seed, sample_seed
from specdec.sampling_params import SamplingParams
from specdec.stats import PhaseTimes
from specdec.synthetic import SyntheticAcceptance
from specdec.texts import GrowingText
from specdec.trees.optimal import USUAL_RATES, Rates, optimal_tree, tree_that_pays
from specdec.trees.shape import Tree, as_tree
from specdec.trees.verification import verify_coupled_tree, verify_tree
from specdec.verification import VerificationRule, verify_block, verify_coupled, verify_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.drafts import AnyDraft

REMEMBERING = {"suffix": 64 << 20, "hybrid": 0}  # methods that can copy from finished requests, and how many bytes do
VERIFICATIONS: dict[str, VerificationRule] = {
    "token": verify_tokens,
    "block": verify_block,
    "coupled": verify_coupled,
}
assert tuple(VERIFICATIONS) == VERIFICATION_NAMES
TREE_VERIFICATIONS: dict[str, VerificationRule] = {"token": verify_tree, "coupled": verify_coupled_tree}
_TREE_WIDTHS = (1, 2, 3, 5, 7, 9, 12, 13, 16, 20, 24, 25, 32, 36, 48)  # whose costs "auto" measures, before it chooses
T = TypeVar("T")


class EngineBusyError(RuntimeError):
    """An engine is asked to decode while another call of it is not finished."""


class Engine:
    """Decodes prompts with a target model and one method of proposing tokens; the output distribution is the target's
    own.

    target: a LanguageModel such as CausalLM or Seq2SeqLM, a prompt of the latter being what its encoder reads; or a
        loaded transformers model, which is wrapped in one of them and put into eval mode.
    tokenizer: of a transformers model; None: prompts are token ids. A draft that is a transformers model has it, too;
        one with another tokenizer is to be given as CausalLM(model, its tokenizer).
    method: what proposes tokens. "autoregressive": nothing. "ngram": prompt lookup. "ngram_store": online n-gram
        counts. "ngram_table": prompt lookup, else a table counted beforehand. "suffix": the likelier copy of two, from
        the request's own text and from what finished requests said. "draft_model": a smaller language model.
        "eagle": a head on the target's features. "early_exit": the target's own first layers, with its norm and head.
        "hybrid": as "suffix" where that is expected to bring more than the draft, else a head or a draft model.
        "tree": a head or a draft model, which proposes several continuations at once.
    draft: what the method needs besides the target: a LanguageModel, an EagleHead or an NgramTable. A model with
        another tokenizer drafts the tokens that both have, see `models.vocabularies`; which these are is logged.
    num_speculative_tokens: tokens proposed per step (gamma), at least 1; "autoregressive" proposes none. "auto": as
        many as pay by costs that are measured now, none included. The distribution stays the same, but which of its
        samples a seed gives then depends on this machine and on what was decoded before, unless verification is
        "coupled". With "tree" it is the number of nodes, of which the best tree by what was measured of the draft is
        made; "auto" chooses the tree that pays best, once.
    tree: the shape of the drafts instead, for method "tree": a `specdec.trees.shape.Tree`, rank paths such as
        [(0,), (1,), (0, 0)], or a JSON file with them.
    max_history_bytes: memory for what finished requests said, the oldest of which are forgotten first, at least 0;
        None: 64 MiB with "suffix", nothing with "hybrid". It makes the sample that a seed gives depend on what was
        decoded before, as "auto" does; with 0 a request copies from its own text alone.
    exit_layer: with "early_exit" the layers that draft, below the target's number; None: a quarter of them.
    max_batch_size: prompts decoded together.
    verification: "token", "block" or "coupled", the rule that verifies a draft; all are lossless. With "coupled" a seed
        gives the same tokens at any temperature, whatever is proposed, and also if nothing is.
    synthetic_acceptance_rates: to time shapes without their weights: accept draft positions with these probabilities
        instead of verifying. The output is then no longer the target's.
    records: whether steps are recorded once for each shape and replayed (CUDA graphs); None: on a GPU, if target and
        draft are on that one alone and neither has dynamic or "longrope" angles of positions.
    Raises ValueError naming the value, the rule and the remedy.
    """

    def __init__(
        self,
        target: LanguageModel | PreTrainedModel,
        *,
        tokenizer: Any = None,
        method: Method = "autoregressive",
        draft: AnyDraft | PreTrainedModel | None = None,
        num_speculative_tokens: int | Literal["auto"] = 4,
        max_batch_size: int = 1,
        verification: str = "token",
        synthetic_acceptance_rates: Sequence[float] | None = None,
        records: bool | None = None,
        max_history_bytes: int | None = None,
        exit_layer: int | None = None,
        tree: Tree | Sequence[Sequence[int]] | str | Path | None = None,
    ) -> None:
        target, draft = _wrapped(target, tokenizer), _wrapped_draft(draft, tokenizer)
        _check_options(method, max_batch_size, max_history_bytes, exit_layer, verification)
        _check_method(method, kind_of(draft) if draft is not None else None, num_speculative_tokens)
        _check_tree(method, tree, verification, synthetic_acceptance_rates)
        self.target, self.draft, self.method = target, draft, method
        self._tokenizer: Any = getattr(target, "tokenizer", None)
        self._eos_token_ids: frozenset[int] = getattr(target, "eos_token_ids", frozenset())
        _name_ignored(getattr(getattr(target, "model", None), "generation_config", None))
        self._verification, self._max_batch_size = verification, max_batch_size
        self._busy = Lock()
        self._pieces: dict[int, bytes | str] | None = None
        self._context_name: str = getattr(target, "context_name", "model's context")
        self._grammars: GrammarCompiler | None = None
        drawing = _drawing(target, draft) if method != "early_exit" else _early_exit(target, exit_layer)
        recordable = None if can_be_recorded(target, draft) else False
        require(
            not records or recordable is None,
            "records=True must be left out: target and draft must be on one device, and their angles of positions must "
            "not depend on the longest one (dynamic or longrope)",
        )
        records = recordable if records is None else records
        is_adaptive = num_speculative_tokens == "auto" and method not in ("autoregressive", "tree")
        adaptive = _adaptive(target, drawing, max_batch_size, recordable) if is_adaptive else None
        self.tree: Tree | None = None
        if method == "tree":
            self.tree = _tree_for(target, draft, drawing, tree, num_speculative_tokens, max_batch_size, recordable)
        self._suffixes: SuffixProposer | None = None
        if method in REMEMBERING:
            history_bytes = REMEMBERING[method] if max_history_bytes is None else max_history_bytes
            self._suffixes = SuffixProposer(target.vocab_size, target.device, history_bytes, adaptive)
        proposer = _make_proposer(target, method, drawing, adaptive, self._suffixes or draft, self.tree)
        remembers = self._suffixes is not None and self._suffixes.history.max_bytes > 0
        self._has_own_seeds = (remembers or is_adaptive) and verification != "coupled"
        self._num_requests = 0
        most = MAX_DRAFT_LENGTH if num_speculative_tokens == "auto" else num_speculative_tokens
        most = len(self.tree) if self.tree else most
        self.num_speculative_tokens = most if proposer else 0
        self._decoder = Decoder(
            target,
            proposer,
            self.num_speculative_tokens,
            max_batch_size=max_batch_size,
            rule=_rule(verification, synthetic_acceptance_rates, self.tree),
            adaptive=adaptive,
            records=records,
        )

    @classmethod
    def load(
        cls,
        target: str,
        *,
        draft: str | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str = "auto",
        attention: str = "auto",
        load_format: str = "auto",
        placement: str = "same",
        quantisation: str | None = None,
        tp_plan: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Engine:
        """An engine from model names: a bundled name such as "smollm2-135m", a hub id, a folder or a GGUF file.

        draft: likewise a draft model, or a folder with a head or a table; where the method needs one and none is
            named, the one that comes with this package for the target is taken, if there is one.
        dtype: of the weights, "bfloat16", "float16", "float32", "float64" or torch's. device: "auto" is "cuda" where
            there is a GPU, else "cpu". attention: "auto" is "sdpa", and "eager" for architectures that have no other.
        revision: a branch, tag or commit of a target on the hub; of any hub id also "organisation/model@revision".
        placement: over which of the devices that `device` stands for ("cuda": all GPUs) target and draft are spread:
            "same", "separate", "ratio:6:2" or "auto", see `specdec.models.placement`.
        quantisation, tp_plan: of the target's weights and a draft model's, see `load_pretrained`.
        options: as for the constructor. Arguments are checked before any model is loaded.
        """
        known = inspect.signature(cls.__init__).parameters
        for name in options:
            if name not in known or name in ("self", "target", "tokenizer"):
                raise TypeError(f"{name}= must be an option of Engine.load or of Engine{nearest(name, known)}")
        dtype, device, target = as_dtype(dtype), as_device(device), with_revision(target, revision)
        method = options.get("method", "autoregressive")
        checked = ("max_batch_size", "max_history_bytes", "exit_layer", "verification")
        _check_options(method, *(options.get(name, known[name].default) for name in checked))
        draft = draft or packaged_draft(target, method)
        _check_method(method, kind_in(draft) if draft else None, options.get("num_speculative_tokens", 4))
        if options.get("tree") is not None:
            options["tree"] = as_tree(options["tree"])
        _check_tree(
            method,
            options.get("tree"),
            options.get("verification", "token"),
            options.get("synthetic_acceptance_rates"),
        )
        sources = [draft] if draft else []
        model, drafts = load_with_drafts(
            target,
            sources,
            placement,
            dtype=dtype,
            device=device,
            attention=attention,
            load_format=load_format,
            quantisation=quantisation,
            tp_plan=tp_plan,
        )
        engine = cls(model, draft=drafts[draft] if draft else None, **options)
        gc.collect()  # loading leaves a full collection due, 0.2 s with transformers in memory: not within a request
        return engine

    @property
    def tokenizer(self) -> Any:
        """The target's transformers tokenizer, or None."""
        return self._tokenizer

    def default_sampling(self, **changes: Any) -> SamplingParams:
        """What the model's generation_config.json says of sampling, as `transformers.generate` takes it, with changes.

        Without do_sample it is greedy. SamplingParams() does not ask the model.
        """
        config = getattr(getattr(self.target, "model", None), "generation_config", None)
        named = {name: getattr(config, name, None) for name in _OF_GENERATION}
        found = {name: value for name, value in named.items() if value is not None}
        if getattr(config, "do_sample", False):
            found.setdefault("top_k", 50)  # transformers' default
        else:
            found = {"temperature": 0.0, "repetition_penalty": found.get("repetition_penalty", 1.0)}
        return SamplingParams(**found | changes)

    def __repr__(self) -> str:
        def name(model: Any) -> str:
            config = getattr(model, "config", None)
            source = getattr(config, "_name_or_path", "") or ""
            return f"{type(getattr(model, 'model', model)).__name__}{f' {source!r}' if source else ''}"

        target: Any = self.target
        kind = f"{str(getattr(target, 'dtype', '')).removeprefix('torch.')} on {target.device}".strip()
        parts = [f"{name(target)}, {kind}", f"method={self.method!r}"]
        parts += [f"draft={name(self.draft)}"] if self.draft is not None else []
        parts += [f"num_speculative_tokens={self.num_speculative_tokens}"] if self.num_speculative_tokens else []
        parts += [f"verification={self._verification!r}", f"max_batch_size={self._max_batch_size}"]
        return f"Engine({', '.join(parts)})"

    @property
    def phase_times(self) -> PhaseTimes:
        """Where the time of the last `generate` went."""
        return self._decoder.times

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[Completion]:
        """Continue each prompt; completions come in the order of the prompts, and of a prompt's samples.

        prompts: each a text, token ids, or the messages of a chat, which go through the chat template; or one of these
            alone, which is one prompt.
        sampling: one SamplingParams for all prompts or one for each; None is SamplingParams().
        arrivals_s: seconds after the call at which each prompt arrives, to be decoded with those in flight; None: all
            are there at once.
        Raises ValueError for an empty prompt, for one that with max_tokens exceeds the context, and for a constraint
        that does not compile or cannot be met, before decoding any; DeadEndError, a ValueError, for one that turns out
        to lead nowhere; EngineBusyError while another call or stream of this engine is not finished.
        """
        completions = self.as_completed(prompts, sampling, arrivals_s=arrivals_s)
        return sorted(completions, key=lambda completion: (completion.index, completion.sample))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer a chat, or several: as `generate` for messages such as {"role": "user", "content": "Hi"}.

        Raises ValueError for what are no messages, and without a chat template.
        """
        chats = as_prompts(messages)
        for chat in chats:
            require(as_messages(chat) is not None, f"messages={chat!r} must be a list with roles and contents")
        return self.generate(chats, sampling)

    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrivals_s: Sequence[float] | None = None,
    ) -> Generator[Completion]:
        """As `generate`, yielding each completion when it is finished; closing it drops the prompts that are not.

        Arguments are checked at the call. One stream or call at a time: they share the engine's cache, so that another
        one raises EngineBusyError until this one is finished or closed.
        """
        return _Run(self._busy, lambda: self._completing(self._requests(prompts, sampling, arrivals_s)))

    def _completing(self, requests: Sequence[Request]) -> Generator[Completion]:
        with closing(self._decoder.advance(requests)) as rows:
            yield from (self._complete(row) for row in rows if row.finish_reason)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[Chunk]:
        """As `generate`, yielding tokens as they are emitted: a prompt's chunks in order, those of others between them.

        Arguments are checked at the call. One stream or call at a time, as for `as_completed`.
        """
        return _Run(self._busy, lambda: self._streaming(self._requests(prompts, sampling, None)))

    def _streaming(self, requests: Sequence[Request]) -> Generator[Chunk]:
        lengths: dict[tuple[int, int], int] = {}
        with closing(self._decoder.advance(requests)) as rows:
            yield from (self._chunk(row, lengths) for row in rows)

    def forget(self) -> None:
        """Lose what finished requests said, so that none of it is copied; what "auto" has learned stays.

        Raises EngineBusyError while a call or stream of this engine is not finished.
        """
        with closing(_Run(self._busy, lambda: self._completing([]))):
            if self._suffixes:
                self._suffixes.forget()
            if not self._decoder.adaptive:
                self._num_requests = 0  # nothing tells of the uniforms that were used

    def _chunk(self, row: Generation, lengths: dict[tuple[int, int], int]) -> Chunk:
        """What a row has emitted since the last chunk. lengths: of the text given so far, by prompt and sample."""
        key, steps = (row.request.index, row.request.sample), row.steps[-1:]
        sources = sources_of(steps) if steps else ("plain",)
        text = row.visible_text()
        if text is not None:
            text, lengths[key] = text[lengths.get(key, 0) :], max(len(text), lengths.get(key, 0))
        completion = self._complete(row) if row.finish_reason else None
        return Chunk(key[0], tuple(row.tokens[-len(sources) :]), sources, text, completion, key[1])

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        arrivals_s: Sequence[float] | None,
    ) -> list[Request]:
        prompts = as_prompts(prompts)
        sampling = SamplingParams() if sampling is None else sampling
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        require(
            isinstance(params, Sequence) and all(isinstance(each, SamplingParams) for each in params),
            f"sampling={sampling!r} must be a SamplingParams, or a list of them; use SamplingParams(temperature=0)",
        )
        require(
            len(params) == len(prompts),
            f"{len(params)} sampling parameters must be one, or one for each of the {len(prompts)} prompts",
        )
        arrivals_s = [0.0] * len(prompts) if arrivals_s is None else arrivals_s
        require(
            len(arrivals_s) == len(prompts) and all(0 <= each < math.inf for each in arrivals_s),
            f"arrivals_s={list(arrivals_s)[:8]} must be seconds >= 0, one for each of the {len(prompts)} prompts",
        )
        requests = zip(prompts, params, arrivals_s, strict=True)
        return [
            self._request(index, sample, *each) for index, each in enumerate(requests) for sample in range(each[1].n)
        ]

    def _request(self, index: int, sample: int, prompt: Any, sampling: SamplingParams, arrival_s: float) -> Request:
        tokens = self._encode(prompt, index)
        vocab_size, context = self.target.vocab_size, self.target.context_length
        require(len(tokens) > 0, f"prompt {index} must not be empty: give at least one token")
        require(
            all(0 <= token < vocab_size for token in tokens),
            f"prompt {index} has token ids outside [0, {vocab_size}); was it tokenised for another model?",
        )
        require(
            len(tokens) + sampling.max_tokens <= context,
            f"prompt {index} has {len(tokens)} tokens, which with max_tokens={sampling.max_tokens} exceeds the "
            f"{self._context_name} of {context}, up to which it is decoded; shorten the prompt or lower max_tokens",
        )
        out_of_range = [t for t in (*sampling.logit_bias, *sampling.stop_token_ids) if t >= vocab_size]
        require(
            not out_of_range,
            f"logit_bias and stop_token_ids of prompt {index} must be token ids below {vocab_size}, not {out_of_range}",
        )
        stop = frozenset(sampling.stop_token_ids)
        sampling = replace(sampling, seed=sample_seed(sampling.seed, sample))
        if self._has_own_seeds:  # what earlier requests left tells of the uniforms that they met
            sampling = replace(sampling, seed=own_seed(sampling.seed, self._num_requests))
            self._num_requests += 1
        stop = stop if sampling.ignore_eos else stop | self._eos_token_ids
        self._check_needs(sampling)
        before = () if is_encoder_decoder(self.target) else tokens
        new_text = partial(GrowingText, self._tokenizer, before) if self._tokenizer else None
        return Request(index, tokens, sampling, stop, arrival_s, self._constraint(sampling, stop), sample, new_text)

    def _check_needs(self, sampling: SamplingParams) -> None:
        """Raise ValueError if the engine lacks what a parameter needs."""
        of_text = [name for name in (sampling.constraint, "stop", "bad_words") if name and getattr(sampling, name)]
        if of_text:
            require(self._tokenizer is not None, f"{of_text[0]} needs a model with a tokenizer; load one with it")
        limiting = [*filter(None, [sampling.constraint]), *(["bad_words"] if sampling.bad_words else [])]
        limiting += ["min_tokens"] if sampling.min_tokens else []
        require(
            not limiting or not isinstance(self._decoder.rule, SyntheticAcceptance),
            f"{' and '.join(limiting)} must not go with synthetic_acceptance_rates, by which any token is accepted",
        )

    def _constraint(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> Constraint | None:
        """What limits the tokens of a request: a grammar, texts that must not occur, a least number of tokens."""
        vocab_size, limits = self.target.vocab_size, list[Constraint]()
        if sampling.constraint is not None:
            self._grammars = self._grammars or GrammarCompiler(self._tokenizer, vocab_size)
            limits.append(self._grammars.compile(sampling, stop_token_ids))
        if sampling.bad_words:
            self._pieces = self._pieces or pieces_of(self._tokenizer, vocab_size)
            limits.append(Without(sampling.bad_words, self._pieces, stop_token_ids, vocab_size))
        if sampling.min_tokens and stop_token_ids:
            limits.append(AtLeast(sampling.min_tokens, stop_token_ids, vocab_size))
        return all_of(limits)

    def _encode(self, prompt: Any, index: int) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return encode_raw(prompt, self._tokenizer)
        messages = as_messages(prompt)
        return render(messages, self._tokenizer) if messages else as_token_ids(prompt, index)

    def _complete(self, row: Generation) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            index=row.request.index,
            prompt_token_ids=row.request.prompt,
            token_ids=tuple(row.output),
            text=row.visible_text(),
            finish_reason=row.finish_reason,
            logprobs=tuple(row.logprobs) if row.request.sampling.logprobs else None,
            steps=tuple(row.steps),
            ttft_s=row.first_token_s - row.arrival_s,
            latency_s=row.last_token_s - row.arrival_s,
            queue_s=row.admitted_s - row.arrival_s,
            sample=row.request.sample,
            top_logprobs=tuple(row.top_logprobs) if row.request.sampling.top_logprobs else None,
            stop_reason=row.stop_reason,
        )


class _Run(Generator[T]):
    """What one call of an engine yields; it has the engine for itself until it is finished, closed or dropped."""

    def __init__(self, busy: Lock, start: Callable[[], Generator[T]]) -> None:
        self._busy: Lock | None = None
        if not busy.acquire(blocking=False):
            raise EngineBusyError(
                "this engine is decoding for another call, whose stream is not finished or which is in another thread; "
                "finish or close() that one first, give all prompts in one call, or load another engine"
            )
        self._busy = busy
        try:
            self._items = start()
        except BaseException:
            self._release()
            raise

    def send(self, value: Any) -> T:
        try:
            return self._items.send(value)
        except BaseException:
            self.close()
            raise

    def throw(self, *error: Any) -> T:
        try:
            return self._items.throw(*error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._busy:
            self._items.close()
            self._release()

    def __del__(self) -> None:
        self.close()

    def _release(self) -> None:
        busy, self._busy = self._busy, None
        if busy:
            busy.release()


_OF_GENERATION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # that SamplingParams have, too
_NEUTRAL: dict[str, Any] = {  # what else changes what `transformers.generate` says, and where it does not
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_new_tokens": None,
    "min_length": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
}


def _name_ignored(config: Any) -> None:
    """Log what a generation config has that changes greedy output in `transformers.generate`, and not here."""
    found = {name: getattr(config, name, None) for name in _NEUTRAL}
    named = [f"{name}={value!r}" for name, value in found.items() if value not in (None, _NEUTRAL[name], [])]
    if named:
        logging.getLogger("specdec").warning(
            "the model's generation_config has %s, which transformers.generate applies and SamplingParams() does not; "
            "engine.default_sampling() has its temperature, top_k, top_p, min_p and repetition_penalty",
            ", ".join(named),
        )


def _wrapped(model: Any, tokenizer: Any) -> Any:
    """A LanguageModel of a loaded transformers model; anything else as it is."""
    if not hasattr(model, "get_input_embeddings") or hasattr(model, "draft_vocabulary"):
        require(tokenizer is None, f"tokenizer= is of a transformers model; {type(model).__name__} has its own")
        return model
    from specdec.models.causal import CausalLM
    from specdec.models.seq2seq import Seq2SeqLM

    return (Seq2SeqLM if model.config.is_encoder_decoder else CausalLM)(model.eval(), tokenizer)


def _wrapped_draft(draft: Any, tokenizer: Any) -> Any:
    return _wrapped(draft, tokenizer) if hasattr(draft, "get_input_embeddings") else draft


class Drawing(Protocol):
    """Makes a proposer that draws its tokens, as chains or as trees."""

    def __call__(self, adaptive: AdaptiveLength | None, tree: Tree | None = None) -> Proposer: ...


def _make_proposer(
    target: LanguageModel,
    method: Method,
    drawing: Drawing | None,
    adaptive: AdaptiveLength | None,
    source: Any,
    tree: Tree | None = None,
) -> Proposer | None:
    """source: what is copied from besides the request's text: a table or a SuffixProposer, if anything."""

    def ngram(new_index: Callable[[], TokenIndex]) -> NgramProposer:
        return NgramProposer(target.vocab_size, target.device, new_index, adaptive)

    if method == "ngram":
        return ngram(LookupIndex)
    if method == "ngram_store":
        return ngram(CountIndex)
    if method == "ngram_table":
        return ngram(lambda: Fallback(LookupIndex(), source))
    if method == "suffix":
        return cast("SuffixProposer", source)
    if drawing is None:
        return None
    drawn = drawing(adaptive, tree)
    return drawn if method != "hybrid" else HybridProposer(BetterCopies(source, adaptive), drawn)


def _drawing(target: LanguageModel, draft: Any) -> Drawing | None:
    """How the draft's tokens are drawn, if they are. Raises ValueError if the draft cannot speak for the target."""
    if draft is None:
        return None
    kind = kind_of(draft)
    if kind == "model":
        shared = share_vocabulary(target, draft)
        return lambda adaptive, tree=None: DraftModelProposer(
            seen_from(draft, target.device), adaptive=adaptive, shared=shared, tree=tree
        )
    check_kinds(target, kind)
    check_same_vocabulary(target, draft)
    if kind == "table":
        return None
    from specdec.proposers.eagle import EagleProposer

    return lambda adaptive, tree=None: EagleProposer(draft, adaptive=adaptive, tree=tree)


def _early_exit(target: Any, exit_layer: int | None) -> Drawing:
    require(
        hasattr(target, "first_layers"),
        f"target={type(target).__name__} must be a model that can be left behind its first layers, as CausalLM is, for "
        'method="early_exit"',
    )
    first_layers = target.first_layers(max(1, target.num_layers // 4) if exit_layer is None else exit_layer)
    return lambda adaptive, tree=None: EarlyExitProposer(first_layers, adaptive=adaptive)


def _adaptive(target: LanguageModel, drawing: Drawing | None, most_rows: int, records: bool | None) -> AdaptiveLength:
    """By costs measured here; where nothing is drawn, only to verify costs time."""

    def measured(rows: int) -> StepCosts:
        costs_s = target_costs(target, rows, records)
        if drawing is None:
            return StepCosts(costs_s, 0.0)
        one_s, most_s = (_draft_cost(target, drawing(None), rows, records, length) for length in (1, MAX_DRAFT_LENGTH))
        draft_s = max(0.0, (MAX_DRAFT_LENGTH * most_s - one_s) / (MAX_DRAFT_LENGTH - 1))
        return StepCosts(costs_s, draft_s, max(0.0, one_s - draft_s))

    fewer = [] if Recorder(target.device, records).records else [1 << i for i in range((most_rows - 1).bit_length())]
    return AdaptiveLength({rows: measured(rows) for rows in [*fewer, most_rows]})  # a recorded step has all rows


def _rule(verification: str, synthetic_acceptance_rates: Sequence[float] | None, tree: Tree | None) -> VerificationRule:
    if synthetic_acceptance_rates is not None:
        return SyntheticAcceptance(tuple(synthetic_acceptance_rates))
    return (TREE_VERIFICATIONS if tree else VERIFICATIONS)[verification]


def _tree_for(
    target: LanguageModel,
    draft: Any,
    drawing: Drawing | None,
    given: Tree | Sequence[Sequence[int]] | str | Path | None,
    num_nodes: int | Literal["auto"],
    rows: int,
    records: bool | None,
) -> Tree:
    """The tree that is given, else the best one. Raises ValueError if the models cannot score or draw it."""
    _check_scoring(target, draft)
    tree = as_tree(given) if given is not None else _best_tree(target, draft, drawing, num_nodes, rows, records)
    _check_ranks(tree, draft)
    return tree


def _best_tree(
    target: LanguageModel,
    draft: Any,
    drawing: Drawing | None,
    num_nodes: int | Literal["auto"],
    rows: int,
    records: bool | None,
) -> Tree:
    """The best tree of so many nodes by what was measured of the draft; "auto": that pays, by costs measured now."""
    assert drawing
    rates: Rates = getattr(draft, "rates", None) or USUAL_RATES
    acceptance = [level[: _num_draftable(draft)] for level in rates.acceptance]
    if num_nodes != "auto":
        return optimal_tree(acceptance, num_nodes, rates.level_cost)
    tree = tree_that_pays(acceptance, *_tree_costs(target, drawing, rows, records))
    return tree or Tree.chain(1)  # to propose nothing is not this method's


def tree_costs(target: LanguageModel, draft: Any, rows: int = 1) -> tuple[list[float], float]:
    """Measured seconds of a target step over 1, 2, ... tokens in each of so many rows, and of drawing one level."""
    drawing = _drawing(target, draft)
    assert drawing, "a draft that draws"
    return _tree_costs(target, drawing, rows, None if can_be_recorded(target, draft) else False)


def _tree_costs(target: LanguageModel, drawing: Drawing, rows: int, records: bool | None) -> tuple[list[float], float]:
    widths = [width for width in _TREE_WIDTHS if width < target.context_length]
    costs_s = target_costs(target, rows, records, widths)
    step_s = np.interp(range(1, max(widths) + 1), widths, costs_s).tolist()
    return step_s, _draft_cost(target, drawing(None), rows, records)


def _draft_cost(
    target: LanguageModel, proposer: Proposer, rows: int, records: bool | None, length: int = MAX_DRAFT_LENGTH
) -> float:
    """Seconds for each token of drafts of this length in each of so many rows, the least of a few measurements."""
    decoder = Decoder(target, proposer, length, max_batch_size=rows, records=records)
    sampling = SamplingParams(temperature=0, max_tokens=2 * length + 2)
    requests = [Request(index, (0, 0), sampling) for index in range(rows)]
    seconds = []
    for _ in range(5):
        num_drafted = sum(step.num_drafted for row in decoder.run(requests) for step in row.steps)
        seconds.append(decoder.times.draft_s * rows / num_drafted)
    return min(seconds[2:])  # the first times warm up


def _check_options(
    method: str, max_batch_size: Any, max_history_bytes: Any, exit_layer: Any, verification: Any
) -> None:
    """What can be said of an engine's options before any model is there."""
    require_choice("method", method, METHODS)
    require_choice("verification", verification, VERIFICATION_NAMES)
    require_integer("max_batch_size", max_batch_size, 1)
    _check_history(max_history_bytes, method)
    if exit_layer is not None:
        require_integer("exit_layer", exit_layer, 1)
        require(
            method == "early_exit",
            f'exit_layer={exit_layer} must be left out with method={method!r}; use method="early_exit"',
        )


def _check_history(max_history_bytes: int | None, method: str) -> None:
    if max_history_bytes is None:
        return
    require_integer("max_history_bytes", max_history_bytes, 0, "; 0 remembers nothing")
    require(
        method in REMEMBERING,
        f"max_history_bytes={max_history_bytes} must be left out with method={method!r}; use "
        f"method={' or '.join(map(repr, REMEMBERING))}",
    )


def _check_tree(method: str, tree: Any, verification: str, synthetic_acceptance_rates: Any) -> None:
    require(tree is None or method == "tree", f'a tree is given but method={method!r} drafts none; use method="tree"')
    require(
        method != "tree" or verification in TREE_VERIFICATIONS,
        f'verification={verification!r} must be {" or ".join(TREE_VERIFICATIONS)} with method="tree"',
    )
    require(
        method != "tree" or synthetic_acceptance_rates is None,
        'synthetic_acceptance_rates are of chains; leave them out with method="tree"',
    )


def _check_scoring(target: Any, draft: Any) -> None:
    """Raise ValueError if a model that must score trees cannot."""
    for model in (target, draft):
        if hasattr(model, "check_tree"):
            model.check_tree()


def _check_ranks(tree: Tree, draft: Any) -> None:
    num_tokens = _num_draftable(draft)
    require(
        max(tree.ranks) < num_tokens,
        f"a tree with {max(tree.ranks) + 1} siblings must have at most {num_tokens}, the tokens that the draft knows",
    )


def _num_draftable(draft: Any) -> int:
    """Different tokens that a draft can propose."""
    return len(getattr(draft, "draft_vocabulary", range(draft.vocab_size)))


def _check_method(method: str, kind: Kind | None, num_speculative_tokens: int | str) -> None:
    needed = NEEDS.get(method, ())
    require(
        kind is not None or not needed,
        f'method="{method}" needs a draft ({" or ".join(needed)}); name one, or use "ngram"',
    )
    require(
        kind is None or kind in needed,
        f"a draft is given but method={method!r} does not use it, being a {kind}; use "
        f"method={' or '.join(repr(name) for name, kinds in NEEDS.items() if kind in kinds)}",
    )
    is_number = isinstance(num_speculative_tokens, int) and not isinstance(num_speculative_tokens, bool)
    is_length = num_speculative_tokens == "auto" or (is_number and int(num_speculative_tokens) > 0)
    require(
        method == "autoregressive" or is_length,
        f'num_speculative_tokens={num_speculative_tokens!r} must be at least 1, or "auto"; for plain decoding use '
        'method="autoregressive"',
    )
