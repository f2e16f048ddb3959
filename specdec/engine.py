"""Public entry point: prompts in, completions out."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Generator, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch

from specdec.assembly import EngineOptions, assemble
from specdec.constraints.bans import AtLeast, Without, all_of
from specdec.constraints.llguidance import GrammarCompiler
from specdec.constraints.progress import Constraint
from specdec.drafts import as_language_model, find, load_with_found
from specdec.methods import default_draft
from specdec.models.base import LanguageModel
from specdec.models.files.generation_config import sampling_defaults, warn_of_ignored
from specdec.models.loading import as_device, as_dtype, with_revision
from specdec.models.vocabularies import pieces_of
from specdec.prompts import Message, Prompt, as_messages, as_prompts, as_token_ids, encode_raw, render
from specdec.requests import Chunk, Completion, Generation, Request, sources_of
from specdec.runtime.checks import renamed, require, require_keywords, with_constructor_spelling, with_spelling
from specdec.runtime.exclusive import EngineBusyError as EngineBusyError
from specdec.runtime.exclusive import Exclusive
from specdec.sampling.randomness import own_seed, sample_seed
from specdec.sampling_params import SamplingParams
from specdec.stats import PhaseTimes
from specdec.texts import GrowingText
from specdec.trees.shape import Tree, as_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.drafts import AnyDraft


@with_constructor_spelling
class Engine:
    """Decodes prompts with a target model and one drafting method; the output distribution is the target's own.

    target: a LanguageModel such as CausalLM or Seq2SeqLM (whose encoder reads the prompt), or a loaded transformers
        model, which is wrapped in one of them and put into eval mode.
    tokenizer: of a transformers model; None: prompts are token ids. It also goes with a draft that is a transformers
        model; wrap a draft with another tokenizer as CausalLM(model, its tokenizer).
    method: a name in `specdec.methods.METHODS`, or an extension (docs/extending.md). "autoregressive": no drafts.
        "ngram": prompt lookup. "ngram_store": online n-gram counts. "ngram_table": prompt lookup, else a table counted
        beforehand. "suffix": copies from the request's own text or from finished requests, whichever is likelier to be
        accepted. "draft_model": a smaller language model. "eagle": a head on the target's features. "eagle3": one on
        features of several layers. "mtp": a layer that was trained with the target. "early_exit": the target's own
        first layers, with its norm and head. "hybrid": as "suffix" where a copy is expected to bring more
        tokens than the draft, else a head or a draft model. "tree": a head or a draft model that proposes several
        continuations at once.
    draft: what the method needs besides the target: a LanguageModel, an EagleHead or an NgramTable. A model with
        another tokenizer drafts the tokens that both share, see `models.vocabularies`; these are logged.
    num_speculative_tokens: tokens proposed per step (gamma), at least 1; "autoregressive" proposes none. "auto": as
        many as are worth verifying, possibly none, by costs measured on construction. The distribution stays the same,
        but which sample a seed gives then depends on this machine and on earlier requests, unless verification is
        "coupled". With "tree" it is the number of nodes: the tree of that size with the most expected accepted tokens
        is built from the draft's measured acceptance; "auto" chooses the size, once.
    tree: the shape of the drafts instead, for method "tree": a `specdec.trees.shape.Tree`, rank paths such as
        [(0,), (1,), (0, 0)], or a JSON file with them.
    max_history_bytes: memory for the text of finished requests, the oldest of which is dropped first, at least 0;
        None: 64 MiB with "suffix", 0 with "hybrid". Above 0, which sample a seed gives depends on earlier requests, as
        with "auto"; with 0 a request copies from its own text only.
    exit_layer: number of first layers that draft with "early_exit", below the target's; None: a quarter of them.
    max_batch_size: prompts decoded together.
    verification: "token", "block" or "coupled", the rule that verifies a draft; all are lossless. The rules of
        `specdec.lossy`, such as "lossy:typical", are NOT: they accept more than the target's distribution allows. With
        "coupled" a seed gives the same tokens at any temperature, whatever is proposed, and also if nothing is.
    synthetic_acceptance_rates: to time shapes without their weights: accept draft positions with these probabilities
        instead of verifying. The output is then no longer the target's.
    forced_acceptance: to test the state that is rolled back after a rejection: "all", "none" or "alternating" draft
        tokens are accepted, or as many as listed, in turn for the steps of a prompt, whatever they are. The output is
        then no longer the target's; `specdec.forced` says what still holds.
    draft_sampling: how a draft model or head chooses tokens above temperature 0. "probabilistic": sampled from its
        distribution with the request's sampling parameters, which is accepted most often. "greedy": its most probable
        token, which is verified as a proposal made with certainty. Both are lossless.
    records: whether steps are captured once per shape and replayed as CUDA graphs. None enables it if target and draft
        are on one GPU and their rotary embeddings do not depend on the sequence length (dynamic or longrope).
    Raises ValueError naming the value, the rule and the remedy.
    """

    def __init__(
        self,
        target: LanguageModel | PreTrainedModel,
        *,
        tokenizer: Any = None,
        method: str = "autoregressive",
        draft: AnyDraft | PreTrainedModel | None = None,
        num_speculative_tokens: int | Literal["auto"] = 4,
        max_batch_size: int = 1,
        verification: str = "token",
        synthetic_acceptance_rates: Sequence[float] | None = None,
        records: bool | None = None,
        max_history_bytes: int | None = None,
        exit_layer: int | None = None,
        tree: Tree | Sequence[Sequence[int]] | str | Path | None = None,
        draft_sampling: str = "probabilistic",
        forced_acceptance: str | Sequence[int] | None = None,
    ) -> None:
        options = EngineOptions(
            method,
            num_speculative_tokens,
            max_batch_size,
            verification,
            synthetic_acceptance_rates,
            records,
            max_history_bytes,
            exit_layer,
            None if tree is None else as_tree(tree),
            draft_sampling,
            forced_acceptance,
        )
        _check_loaded("target", target, hasattr(target, "forward"))
        _check_loaded("draft", draft, draft is None or not isinstance(draft, str | Path | bytes | Real))
        model: LanguageModel = as_language_model(target, tokenizer)
        self.target, self.method, self._options = model, method, options
        self.draft: AnyDraft | None = as_language_model(draft, tokenizer if _is_transformers(draft) else None)
        warn_of_ignored(model.generation_config)
        self._decoder, self.tree = assemble(model, self.draft, options)
        self.num_speculative_tokens = self._decoder.num_speculative_tokens
        self._busy, self._num_requests = Lock(), 0
        self._pieces: dict[int, bytes | str] | None = None
        self._grammars: GrammarCompiler | None = None

    @classmethod
    @renamed(quantisation="quantization")
    def load(
        cls,
        target: str | Path,
        *,
        draft: str | Path | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str = "auto",
        attention: str = "auto",
        load_format: str = "auto",
        placement: str = "same",
        quantization: str | None = None,
        draft_quantization: str | None = None,
        tp_plan: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Engine:
        """An engine from model names: a bundled name such as "smollm2-135m", a hub id, a folder or a GGUF file.

        draft: likewise a draft model, or a folder or hub id with a head or a table; None: the draft in this package
            for the target and the method, if the method needs one and there is one.
        dtype: of the weights, "bfloat16", "float16", "float32", "float64" or torch's. device: "auto" is "cuda" where
            there is a GPU, else "cpu". attention: "auto" is "sdpa", and "eager" for architectures that have no other.
        revision: a branch, tag or commit of a target on the hub; of any hub id also "organisation/model@revision".
        placement: over which of the devices that `device` stands for ("cuda": all GPUs) target and draft are spread:
            "same", "separate", "ratio:6:2" or "auto", see `specdec.models.placement`.
        allow_pickle: whether a head's weights may be .bin or .pt files; they are read without running code in them.
        quantization, tp_plan: of the target's weights and a draft model's, see `load_pretrained`.
        draft_quantization: of the draft's weights, a head's too, if it is to differ; "none" for none.
        options: as for the constructor. Arguments are checked before any model is loaded.
        """
        own = {*inspect.signature(cls.load).parameters} - {"options"}
        known = {*inspect.signature(cls).parameters} - {"target", "tokenizer"}
        require_keywords(options, sorted(own | known), "Engine.load or of Engine")
        target, draft = _source("target", target), None if draft is None else _source("draft", draft)
        require(isinstance(placement, str), f'placement={placement!r} must be a string, such as "same"')
        require(isinstance(allow_pickle, bool), f"allow_pickle={allow_pickle!r} must be True or False")
        dtype, device, target = as_dtype(dtype), as_device(device), with_revision(target, revision)
        if options.get("tree") is not None:
            options["tree"] = as_tree(options["tree"])
        checked = EngineOptions(**options)
        draft = draft or default_draft(target, checked.method)
        found = find(draft, load_format, target=target, allow_pickle=allow_pickle) if draft else None
        checked.check_draft_kind(found.kind if found else None)
        model, drafts = load_with_found(
            target,
            {draft: found} if draft and found else {},
            placement,
            dtype=dtype,
            device=device,
            attention=attention,
            load_format=load_format,
            quantization=quantization,
            draft_quantization=draft_quantization,
            tp_plan=tp_plan,
        )
        engine = cls(model, draft=drafts[draft] if draft else None, **options)
        gc.collect()  # loading leaves a full collection due, 0.2 s with transformers in memory: not within a request
        return engine

    @property
    def tokenizer(self) -> Any:
        """The target's transformers tokenizer, or None."""
        return self.target.tokenizer

    def default_sampling(self, **changes: Any) -> SamplingParams:
        """The sampling parameters in the model's generation_config.json, as `transformers.generate` reads them.

        changes: parameters to replace. Without do_sample it is greedy. SamplingParams() does not look at the model.
        """
        return SamplingParams(**sampling_defaults(self.target.generation_config) | changes)

    def __repr__(self) -> str:
        def name(model: Any) -> str:
            config = getattr(model, "config", None)
            source = getattr(config, "_name_or_path", "") or ""
            return f"{type(getattr(model, 'model', model)).__name__}{f' {source!r}' if source else ''}"

        target: Any = self.target
        kind = f"{str(getattr(target, 'dtype', '')).removeprefix('torch.')} on {target.device}".strip()
        parts = [f"{name(target)}, {kind}", f"method={self.method!r}"]
        description = getattr(self.draft, "description", None)  # of a head that was loaded from a folder
        parts += [f"draft={description or name(self.draft)}"] if self.draft is not None else []
        parts += [f"num_speculative_tokens={self.num_speculative_tokens}"] if self.num_speculative_tokens else []
        parts += [f"verification={self._options.verification!r}", f"max_batch_size={self._options.max_batch_size}"]
        parts += [f"draft_sampling={self._options.draft_sampling!r}"] * (self._options.draft_sampling == "greedy")
        if blindly := self._options.accepts_blindly:
            parts += [f"{blindly}={getattr(self._options, blindly)!r}"]
        return f"Engine({', '.join(parts)})"

    @property
    def phase_times(self) -> PhaseTimes:
        """Where the time of the last `generate` went."""
        return self._decoder.times

    @with_spelling
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
            arrive at once.
        Raises ValueError, before any prompt is decoded, for an empty prompt, for one that with max_tokens exceeds the
        context, and for a constraint that does not compile or cannot be met; DeadEndError, a ValueError, for a
        constraint that turns out to allow no further token; EngineBusyError while another call or stream of this
        engine is not finished.
        """
        completions = self.as_completed(prompts, sampling, arrivals_s=arrivals_s)
        return sorted(completions, key=lambda completion: (completion.index, completion.sample))

    @with_spelling
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
            require(
                as_messages(chat) is not None,
                f'messages={chat!r} must be a list such as [{{"role": "user", "content": "Hi"}}], or a list of these',
            )
        return self.generate(chats, sampling)

    @with_spelling
    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrivals_s: Sequence[float] | None = None,
        after: Sequence[int | None] | None = None,
    ) -> Generator[Completion]:
        """As `generate`, yielding each completion when it is finished; closing it drops the prompts that are not.

        after: for each prompt, the index of an earlier one whose completion it follows, as the next turn of a
            conversation does; it arrives `arrivals_s` after that one's last token. None: it follows none.
        Arguments are checked at the call. One stream or call at a time: they share the engine's cache, so that another
        one raises EngineBusyError until this one is finished or closed.
        """
        return Exclusive(self._busy, lambda: self._completing(self._requests(prompts, sampling, arrivals_s, after)))

    def _completing(self, requests: Sequence[Request]) -> Generator[Completion]:
        with closing(self._decoder.advance(requests)) as rows:
            yield from (self._complete(row) for row in rows if row.finish_reason)

    @with_spelling
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[Chunk]:
        """As `generate`, yielding tokens as they are emitted: a prompt's chunks in order, those of others between them.

        Arguments are checked at the call. One stream or call at a time, as for `as_completed`.
        """
        return Exclusive(self._busy, lambda: self._streaming(self._requests(prompts, sampling, None)))

    def _streaming(self, requests: Sequence[Request]) -> Generator[Chunk]:
        lengths: dict[tuple[int, int], int] = {}
        with closing(self._decoder.advance(requests)) as rows:
            yield from (self._chunk(row, lengths) for row in rows)

    def forget(self) -> None:
        """Drop the text of finished requests, so that drafts no longer copy from it; keeps the statistics of "auto".

        Raises EngineBusyError while a call or stream of this engine is not finished.
        """
        with closing(Exclusive(self._busy, lambda: self._completing([]))):
            if self._decoder.proposer:
                self._decoder.proposer.forget()
            if not self._options.is_adaptive:
                self._num_requests = 0  # no remaining state depends on uniforms that were used

    def _chunk(self, row: Generation, lengths: dict[tuple[int, int], int]) -> Chunk:
        """The tokens of a row since its last chunk. lengths: of the text returned so far, by prompt and sample."""
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
        after: Sequence[int | None] | None = None,
    ) -> list[Request]:
        prompts = as_prompts(prompts)
        sampling = SamplingParams() if sampling is None else sampling
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        require(
            isinstance(params, Sequence) and all(isinstance(entry, SamplingParams) for entry in params),
            f"sampling={sampling!r} must be a SamplingParams, or a list of them; use SamplingParams(temperature=0)",
        )
        require(
            len(params) == len(prompts),
            f"{len(params)} sampling parameters must be one, or one for each of the {len(prompts)} prompts",
        )
        arrivals_s = [0.0] * len(prompts) if arrivals_s is None else arrivals_s
        require(
            isinstance(arrivals_s, Sized) and len(arrivals_s) == len(prompts) and all(map(_is_moment, arrivals_s)),
            f"arrivals_s={arrivals_s!r:.60} must be seconds >= 0, one for each of the {len(prompts)} prompts",
        )
        after = [None] * len(prompts) if after is None else after
        require(
            isinstance(after, Sized)
            and len(after) == len(prompts)
            and all(each is None or _is_earlier(each, index, params) for index, each in enumerate(after)),
            f"after={after!r:.60} must be None or the index of an earlier prompt with n=1, one for each of the "
            f"{len(prompts)} prompts",
        )
        requests = zip(prompts, params, arrivals_s, after, strict=True)
        return [
            self._request(index, sample, *request)
            for index, request in enumerate(requests)
            for sample in range(request[1].n)
        ]

    def _request(
        self, index: int, sample: int, prompt: Any, sampling: SamplingParams, arrival_s: float, after: int | None
    ) -> Request:
        tokens = self._encode(prompt, index)
        vocab_size, context = self.target.vocab_size, self.target.context_length
        require(len(tokens) > 0, f"prompt {index} must not be empty: give at least one token")
        require(
            all(0 <= token < vocab_size for token in tokens),
            f"prompt {index} must have token ids in [0, {vocab_size}); was it tokenized for another model?",
        )
        require(
            len(tokens) + sampling.max_tokens <= context,
            f"prompt {index} has {len(tokens)} tokens, which with max_tokens={sampling.max_tokens} exceeds "
            f"the {self.target.context_name} of {context}; shorten the prompt or lower max_tokens",
        )
        out_of_range = [t for t in (*sampling.logit_bias, *sampling.stop_token_ids) if t >= vocab_size]
        require(
            not out_of_range,
            f"logit_bias and stop_token_ids of prompt {index} must be token ids below {vocab_size}, not {out_of_range}",
        )
        stop = frozenset(sampling.stop_token_ids)
        sampling = replace(sampling, seed=sample_seed(sampling.seed, sample))
        if self._options.has_own_seeds:
            sampling = replace(sampling, seed=own_seed(sampling.seed, self._num_requests))
            self._num_requests += 1
        stop = stop if sampling.ignore_eos else stop | self.target.eos_token_ids
        self._check_needs(sampling)
        before = () if self.target.is_encoder_decoder else tokens
        new_text = partial(GrowingText, self.tokenizer, before) if self.tokenizer else None
        constraint = self._constraint(sampling, stop)
        return Request(index, tokens, sampling, stop, arrival_s, constraint, sample, new_text, after)

    def _check_needs(self, sampling: SamplingParams) -> None:
        """Raise ValueError for a parameter that needs something the engine does not have."""
        textual = [name for name in (sampling.constraint, "stop", "bad_words") if name and getattr(sampling, name)]
        if textual:
            require(self.tokenizer is not None, f"{textual[0]} needs a model with a tokenizer; load one with it")
        limiting = [*filter(None, [sampling.constraint]), *(["bad_words"] if sampling.bad_words else [])]
        limiting += ["min_tokens"] if sampling.min_tokens else []
        require(
            not limiting or self._options.accepts_blindly is None,
            f"{' and '.join(limiting)} must be omitted with {self._options.accepts_blindly}, which accepts any token",
        )

    def _constraint(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> Constraint | None:
        """The constraint of a request: grammar, banned words and minimum length combined; None without any."""
        vocab_size, limits = self.target.vocab_size, list[Constraint]()
        if sampling.constraint is not None:
            self._grammars = self._grammars or GrammarCompiler(self.tokenizer, vocab_size)
            limits.append(self._grammars.compile(sampling, stop_token_ids))
        if sampling.bad_words:
            purpose = "bad_words; forbid tokens by logit_bias instead"
            self._pieces = self._pieces or pieces_of(self.tokenizer, vocab_size, purpose)
            limits.append(Without(sampling.bad_words, self._pieces, stop_token_ids, vocab_size))
        if sampling.min_tokens and stop_token_ids:
            limits.append(AtLeast(sampling.min_tokens, stop_token_ids, vocab_size))
        return all_of(limits)

    def _encode(self, prompt: Any, index: int) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return encode_raw(prompt, self.tokenizer)
        messages = as_messages(prompt)
        return render(messages, self.tokenizer) if messages else as_token_ids(prompt, index)

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
            lossy=self._options.lossy,
        )


def _is_moment(seconds: Any) -> bool:
    """Whether `seconds` is a finite number >= 0."""
    return isinstance(seconds, Real) and 0 <= seconds < math.inf  # type: ignore[operator]


def _is_earlier(other: Any, index: int, params: Sequence[SamplingParams]) -> bool:
    """Whether `other` is the index of a prompt before prompt `index` that has one sample."""
    return isinstance(other, Integral) and 0 <= int(other) < index and params[int(other)].n == 1


def _is_transformers(model: Any) -> bool:
    """Whether a model is a transformers model, which the engine wraps."""
    return hasattr(model, "get_input_embeddings")


def _check_loaded(name: str, model: Any, is_loaded: bool) -> None:
    require(is_loaded, f'{name}={model!r} must be a loaded model; to load one by name use Engine.load("smollm2-135m")')


def _source(name: str, source: Any) -> str:
    """A name or a path as text."""
    require(isinstance(source, str | Path), f"{name}={source!r} must be a name or a path; pass models to Engine(...)")
    return str(source)
