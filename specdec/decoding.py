"""The decode loop: prefill, propose, score, verify, commit.

Autoregressive decoding is this loop with empty drafts. Rows are ragged: each accepts its own number of tokens and stops
independently, and its slot is reused by the next waiting request.

Invariant between steps: a row's target cache holds all of its tokens except the last. A step feeds that token and the
draft, so position i of the logits gives the distribution for draft token i.

If a whole step can be captured as a CUDA graph, the state of its rows stays on the device (`specdec.device_rows`), and
the next step is launched before the outcome of this one is read, so the device does not wait for the host. A row that
turns out to have ended then ran one step too many, and that step's outcome is dropped. Otherwise the host reads each
step's outcome before it launches the next. If such a step can be captured except for its draft, the device gets one
transfer and one graph: what the host knows, with the tokens that a `CopyingProposer` copied, and everything after the
draft.

A draft may be a tree: its nodes are fed as one row and attend only to their ancestors, and the logits after a node give
the distribution of its children. The cache entries of the accepted path are then moved to consecutive positions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from specdec.device_rows import DeviceRows, RowState
from specdec.kernels import gpu
from specdec.models.base import Cache, FixedShapeModel, LanguageModel, TreeCache, prefill, score
from specdec.outcomes import Packed, Transfer, add_logprobs, check_distributions, step_record, unpacked
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import CopyingProposer, FixedProposer, Proposer
from specdec.requests import Arrivals, Batch, Generation, Request
from specdec.runtime.devices import Mailbox, upload
from specdec.runtime.recording import InPlace, Recorder
from specdec.runtime.timing import Stopwatch, now_s, sleep_until
from specdec.sampling.randomness import Role, UniformSource, noise, on_branch, uniforms
from specdec.sampling.state import RowParams, SamplingState
from specdec.sampling_params import SamplingParams
from specdec.stats import PhaseTimes
from specdec.trees.columns import Branches, nodes_within
from specdec.trees.shape import Tree
from specdec.verification import Draft, Verification, VerificationRule, verify_tokens

_IDLE = SamplingParams(temperature=0)  # parameters of an idle slot


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step.

    batch: its rows at launch. outcome, widths: of a `Packed`. tree: the shape of its drafts, if they are trees. logits:
    the target's, if the host needs them.
    """

    batch: Batch
    outcome: Transfer
    widths: tuple[int, ...]
    tree: Tree | None = None
    logits: Tensor | None = None


class Decoder:
    """Runs requests through one target model and one proposer.

    target: the model whose distribution is sampled. proposer: None decodes autoregressively.
    num_speculative_tokens, max_batch_size: maximum tokens proposed per step, and rows decoded together.
    rule: the verification rule. uniforms: the source of randomness. adaptive: ends drafts that are no longer worth
    extending; learns from each step's outcome. records: whether steps are captured and replayed, see `Recorder`; None
    enables it on a GPU. greedy_drafts: see `RowParams`.
    """

    runs_ahead = True  # set to False by subclasses that override parts of a step

    def __init__(
        self,
        target: LanguageModel,
        proposer: Proposer | None = None,
        num_speculative_tokens: int = 0,
        *,
        max_batch_size: int = 1,
        rule: VerificationRule = verify_tokens,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
        records: bool | None = None,
        greedy_drafts: bool = False,
    ) -> None:
        self.target, self.proposer, self.num_speculative_tokens = target, proposer, num_speculative_tokens
        self.max_batch_size = max_batch_size
        self.rule, self.uniforms, self.adaptive, self.greedy_drafts = rule, uniforms, adaptive, greedy_drafts
        self.recorder = Recorder(target.device, records)
        self._clock = gpu.clock(target.device) if self.recorder.records else None
        longest = self._tree.depth if self._tree else num_speculative_tokens
        self._device_rows = DeviceRows(max_batch_size, longest + 1, target.device)
        self._mailbox = Mailbox(target.device)
        self._stopwatch, self._total_s, self._recorded_s = Stopwatch(target.device), 0.0, 0.0
        self._cache: Cache | None = None
        self._prompts: dict[int, tuple[int, Tensor]] = {}  # slot -> request whose prompt it holds, and its last logits

    @property
    def proposer(self) -> Proposer | None:
        """The proposer; its kind is determined when it is set, not in each step."""
        return self._proposer

    @proposer.setter
    def proposer(self, proposer: Proposer | None) -> None:
        self._proposer = proposer
        self._copying = proposer if isinstance(proposer, CopyingProposer) else None
        self._fixed = proposer if isinstance(proposer, FixedProposer) else None
        self._tree = self._fixed.tree if self._fixed else None  # of the drafts of recorded steps

    @property
    def times(self) -> PhaseTimes:
        """The phase times of the current or last run."""
        recording_s = self.recorder.seconds - self._recorded_s
        return PhaseTimes(**self._stopwatch.seconds(), total_s=self._total_s, recording_s=recording_s)

    def run(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Decode all requests, yielding each as it finishes. Requests get slots in order of arrival.

        Raises NonFiniteLogitsError naming the request, the position and the step.
        """
        return (row for row in self.advance(requests) if row.finish_reason)

    def advance(self, requests: Sequence[Request]) -> Generator[Generation]:
        """As `run`, but yields a row whenever it has emitted tokens, finally with a finish reason."""
        start_s = time.perf_counter()
        self._stopwatch, self._total_s, self._recorded_s = Stopwatch(self.target.device), 0.0, self.recorder.seconds
        cache = self._reserve(requests)
        self._prompts.clear()
        waiting = Arrivals(requests, start_s)
        slots: list[Generation | None] = [None] * self.max_batch_size
        batch: Batch | None = None
        flights: deque[Flight] = deque()  # launched steps with unread outcomes
        try:
            while waiting.next_s is not None or any(slots):
                yield from self._admit(waiting, slots, cache)
                if not any(slots):
                    sleep_until(waiting.next_s or 0.0)
                    continue
                batch = self._form_batch(slots, cache, batch)
                if not flights or _may_follow(batch, len(flights)):
                    flights.append(self._step(batch, cache, len(flights)))
                    if len(flights) <= batch.lag:
                        continue
                for row in self._settle(flights.popleft(), slots):
                    if row.finish_reason:
                        waiting.finish(row)
                    yield row
        finally:  # also if the caller stops early
            self._total_s = now_s(self.target.device) - start_s

    def _settle(self, flight: Flight, slots: list[Generation | None]) -> Iterator[Generation]:
        """Read a step's outcome, free the slots of finished rows, and yield the rows that have emitted tokens."""
        if flight.batch.lag and self._fixed:
            for slot, row in enumerate(flight.batch.rows):
                if row and slots[slot] is row:
                    self._fixed.drafted(slot, row, len(row.tokens))
        decided = self._commit(flight)
        if self.adaptive:
            self.adaptive.observe(decided)
        for slot, row in enumerate(flight.batch.rows):
            if row and slots[slot] is row:
                slots[slot] = None if row.finish_reason else row
                yield row

    def _reserve(self, requests: Sequence[Request]) -> Cache:
        """A cache for the longest request plus a draft."""
        longest = max((len(r.prompt) + r.sampling.max_tokens for r in requests), default=0)
        capacity = longest + self.num_speculative_tokens
        if self._cache is None or self._cache.capacity < capacity:
            features = self.proposer.feature_layers if self.proposer else ()
            self.recorder.forget()
            self._cache = None  # free the memory before allocating
            capacity = self.recorder.capacity(capacity)
            self._cache = self.target.allocate(
                self.max_batch_size, capacity, features=features, max_rollback=self.num_speculative_tokens
            )
        return self._cache

    def _admit(self, waiting: Arrivals, slots: list[Generation | None], cache: Cache) -> Iterator[Generation]:
        """Give free slots to requests that have arrived, and yield them with their first tokens."""
        for slot in range(len(slots)):
            while slots[slot] is None and (next_s := waiting.next_s) is not None and next_s <= time.perf_counter():
                row = waiting.pop()
                row.admitted_s = time.perf_counter()
                self._prefill(row, cache, slot)
                slots[slot] = None if row.finish_reason else row
                if row.finish_reason:
                    waiting.finish(row)
                yield row

    def _form_batch(self, slots: list[Generation | None], cache: Cache, previous: Batch | None) -> Batch:
        """The rows up to the last busy slot, or all slots if shapes are recorded; the previous batch if unchanged."""
        num_rows = max(slot for slot, row in enumerate(slots) if row) + 1
        if self.recorder.records:
            num_rows = self.max_batch_size
        if previous and previous.rows == slots[:num_rows]:
            return previous
        return self._batch_of(slots[:num_rows], cache)

    def _batch_of(self, rows: list[Generation | None], cache: Cache) -> Batch:
        sampling = SamplingState(
            [row.request.sampling if row else _IDLE for row in rows],
            [row.request.prompt if row else () for row in rows],
            [row.output if row else () for row in rows],
            self.target.vocab_size,
            self.target.device,
            coupled=self.rule.needs_noise,
            greedy_drafts=self.greedy_drafts,
            constrained=[row.progress if row else None for row in rows],
        )
        return Batch(
            rows,
            sampling,
            self.max_batch_size,
            cache.capacity,
            cache.features,
            self.recorder,
            self.num_speculative_tokens,
            cache,
            lag=int(self._can_run_ahead(rows, sampling)),
        )

    def _can_run_ahead(self, rows: Sequence[Generation | None], sampling: SamplingState) -> bool:
        """Whether whole steps of these rows can be recorded, with their drafts."""
        return (
            self._is_recordable(rows, sampling)
            and self.adaptive is None
            and (self.proposer is None or (self._fixed is not None and self._fixed.is_fixed))
        )

    def _is_recordable(self, rows: Sequence[Generation | None], sampling: SamplingState) -> bool:
        """Whether what follows a draft can be one recording: it depends only on tensors, and no logits are read."""
        return (
            self.runs_ahead
            and self._clock is not None
            and sampling.is_stateless
            and not any(row.request.sampling.logprobs for row in rows if row)
        )

    @torch.inference_mode()
    def _prefill(self, row: Generation, cache: Cache, slot: int) -> None:
        """Score the prompt and emit the first token: a step with an empty draft, not counted as a decode step."""
        batch = self._batch_of([row], cache)
        with self._stopwatch.phase("prefill_s"):
            logits = self._read(row, cache, slot)
        draft = Draft.empty(1, self.target.vocab_size, self.target.device)
        with self._stopwatch.phase("verification_s"):
            packed = Packed.of(draft, *self._verify(batch, logits, draft))
        self._commit(Flight(batch, packed.columns, packed.widths, logits=logits))
        row.steps.clear()

    def _read(self, row: Generation, cache: Cache, slot: int) -> Tensor:
        """Prefill a slot with a row's prompt, once for all of its samples; returns the last logits, [1, 1, vocab]."""
        request, num_prompt = row.request, len(row.tokens)
        holders = (
            holder
            for holder, (index, _) in self._prompts.items()
            if index == request.index and request.sample and cache.holds(holder, num_prompt)
        )
        source = next(holders, None)
        if source is None:
            cache.num_cached[slot] = 0
            logits = prefill(self.target, row.tokens, cache, slot, self.recorder)
        else:
            cache.copy_slot(source, slot, num_prompt)
            logits = self._prompts[source][1]
        self._prompts.pop(slot, None)
        if request.sampling.n > 1:
            self._prompts[slot] = (request.index, logits.clone())  # recorded calls reuse the memory of their outputs
        return logits

    @torch.inference_mode()
    def _step(self, batch: Batch, cache: Cache, num_unread: int) -> Flight:
        """Launch one target call for the whole batch. num_unread: launched steps with unread outcomes."""
        for slot, row in enumerate(batch.rows):
            if row is None:  # the step overwrites the prompt in this slot
                self._prompts.pop(slot, None)
        if batch.lag:
            return self._launch(batch, cache, num_unread)
        self._device_rows.forget()
        if self._is_recordable(batch.rows, batch.sampling):
            return self._launch_scoring(batch, cache)
        with self._stopwatch.phase("draft_s"):
            draft = self._propose(batch)
        with self._stopwatch.phase("scoring_s"):
            logits = self._score(batch, draft, cache)
        with self._stopwatch.phase("verification_s"):
            outcome, finite = self._verify(batch, logits, draft)
            if outcome.path is not None:
                self.recorder(self._compact, cache, upload(batch.num_tokens(), self.target.device), outcome.path)
        packed = Packed.of(draft, outcome, finite)
        return Flight(batch, packed.columns, packed.widths, draft.tree, logits)

    def _launch(self, batch: Batch, cache: Cache, num_unread: int) -> Flight:
        """Launch a step as a single recording, which reads and updates the state of its rows on the device."""
        proposer = self._fixed
        state = self._device_rows.enter(batch.rows, partial(proposer.enter if proposer else _newest, batch))
        width = self.num_speculative_tokens + 1
        inputs = proposer.inputs(batch) if proposer else ()
        starts = [length - 1 for length in batch.num_tokens()]
        extent = cast("Any", cache).reserve(0, starts, (num_unread + 1) * width + 1)
        params = self.recorder.place(batch.sampling.rows)
        packed = self.recorder(self._whole_step, state, params, extent, cache, *inputs)
        return Flight(batch, self._mailbox.send(packed.columns), packed.widths, self._tree)

    def _whole_step(
        self, packed: InPlace[Tensor], params: InPlace[RowParams], extent: int, cache: Cache, *inputs: Any
    ) -> Packed:
        """A whole step as a pure function of tensors, which updates the packed row state in place.

        extent: an upper bound on the tokens of a row with its draft. inputs: of the proposer.
        """
        state, rows, now_ns = RowState.unpack(packed.value), params.value, cast("Any", self._clock)
        moments = [now_ns()]
        draft = self._draft_from(state, rows, extent, inputs)
        moments.append(now_ns() if self.proposer else moments[0])
        outcome, finite, scored_ns = self._score_and_decide(state.newest, draft, rows, state.num_tokens, cache, extent)
        moments.append(scored_ns)
        packed.value.copy_(self._after(state, draft, outcome).packed())
        moments.append(now_ns())
        return Packed.of(draft, outcome, finite, moments)

    def _launch_scoring(self, batch: Batch, cache: Cache) -> Flight:
        """Launch a step whose draft the host takes part in: one transfer, and one recording after the draft."""
        with self._stopwatch.phase("draft_s"):
            guesses, draft = self._guess(batch)
        width = batch.width(max(map(len, guesses)))
        num_tokens, newest = batch.num_tokens(), batch.last_tokens()
        columns = [
            [number, token, len(guess), *guess, *[0] * (width - len(guess))]
            for number, token, guess in zip(num_tokens, newest, guesses, strict=True)
        ]
        starts = cache.num_cached[: len(columns)] = [number - 1 for number in num_tokens]
        extent = cast("Any", cache).reserve(0, starts, 1 + (draft.tokens.shape[1] if draft else width))
        inputs, params = self.recorder.upload(columns), self.recorder.place(batch.sampling.rows)
        packed = self.recorder(self._after_draft, inputs, draft, params, extent, cache)
        return Flight(batch, self._mailbox.send(packed.columns), packed.widths, draft.tree if draft else None)

    def _after_draft(
        self, inputs: InPlace[Tensor], draft: Draft | None, params: InPlace[RowParams], extent: int, cache: Cache
    ) -> Packed:
        """Scoring and verification as a pure function of tensors.

        inputs: int64 [rows, 3 + n], each row's number of tokens, its newest token, and the number of tokens copied,
        followed by them. draft: None if these are the draft. extent: an upper bound on the tokens of a row with its
        draft.
        """
        rows, now_ns = params.value, cast("Any", self._clock)
        num_tokens, newest, num_copied = inputs.value[:, :3].unbind(1)
        draft = draft or Draft.deterministic(inputs.value[:, 3:], num_copied, rows.vocab_size)
        start_ns = now_ns()
        outcome, finite, scored_ns = self._score_and_decide(newest.unsqueeze(1), draft, rows, num_tokens, cache, extent)
        return Packed.of(draft, outcome, finite, [start_ns, start_ns, scored_ns, now_ns()])

    def _score_and_decide(
        self, newest: Tensor, draft: Draft, rows: RowParams, num_tokens: Tensor, cache: Cache, extent: int
    ) -> tuple[Verification, Tensor, Tensor]:
        """Score and verify a draft, and compact a tree's cache, as a pure function of tensors.

        newest: int64 [rows, 1]. num_tokens: int64 [rows]. Also returns whether the target's distributions are valid,
        bool [rows, k + 1], and the device clock after scoring, int64 [1].
        """
        logits = self._logits_at(newest, draft, num_tokens - 1, cache, extent)
        scored_ns = cast("Any", self._clock)()
        outcome, finite = self._decide(logits, draft, rows, num_tokens)
        if outcome.path is not None:
            self._compact(cache, num_tokens, outcome.path)
        return outcome, finite, scored_ns

    def _logits_at(self, newest: Tensor, draft: Draft, starts: Tensor, cache: Cache, extent: int) -> Tensor:
        """`_score` as a pure function of tensors. newest: int64 [rows, 1], at positions starts, int64 [rows]."""
        branches = Branches.after_root(draft.tree.parents) if draft.tree else None
        tokens = torch.cat([newest, draft.tokens], 1)
        return cast("FixedShapeModel", self.target).forward_at(tokens, starts, cache, extent, branches=branches)

    def _draft_from(self, state: RowState, rows: RowParams, extent: int, inputs: tuple[Any, ...]) -> Draft:
        proposer, num_tokens, tree = self._fixed, self.num_speculative_tokens, self._tree
        if proposer is None:
            return Draft.empty(len(state.num_tokens), rows.vocab_size, state.num_tokens.device)
        tokens, distribution, finite = proposer.draft_from(state, rows, num_tokens, extent, *inputs)
        limits = state.limits(tree.depth if tree else num_tokens, proposer.context_length)
        num_proposed = nodes_within(tree, limits.device)[limits] if tree else limits
        return Draft(tokens, num_proposed, distribution, tree, finite)

    def _after(self, state: RowState, draft: Draft, outcome: Verification) -> RowState:
        num_pending = torch.ones_like(outcome.accepted)
        if self._fixed:
            num_pending = self._fixed.num_pending(outcome.accepted, self.num_speculative_tokens)
        tokens = draft.tokens if outcome.path is None else draft.tokens.gather(1, outcome.path)
        return state.after(tokens, outcome.accepted, outcome.next_token, num_pending)

    def _propose(self, batch: Batch) -> Draft:
        limits = self._limits(batch)
        if self.proposer is None or not any(limits):
            return Draft.empty(len(batch.rows), self.target.vocab_size, self.target.device)
        return self.proposer.propose(batch, limits)

    def _guess(self, batch: Batch) -> tuple[Sequence[Sequence[int]], Draft | None]:
        """Copied tokens of each row, and the draft; None if it is no more than these tokens."""
        limits, none = self._limits(batch), [()] * len(batch.rows)
        if self.proposer is None or not any(limits):
            return none, None
        if self._copying:
            guesses = self._copying.guess(batch, limits)
            return guesses, self._copying.complete(batch, limits, guesses)
        draft = self.proposer.propose(batch, limits)
        return none, draft if draft.tokens.shape[1] else None

    def _limits(self, batch: Batch) -> list[int]:
        """Maximum draft length of each row: one that may emit n more tokens drafts at most n - 1."""
        return [min(self.num_speculative_tokens, row.num_remaining - 1) if row else 0 for row in batch.rows]

    def _score(self, batch: Batch, draft: Draft, cache: Cache) -> Tensor:
        """Logits after each row's newest token and after each of its draft, [rows, k + 1, vocab]."""
        cache.num_cached[: len(batch.rows)] = [length - 1 for length in batch.num_tokens()]
        tokens = torch.cat([upload(batch.last_tokens(), self.target.device).unsqueeze(1), draft.tokens], 1)
        branches = None if draft.tree is None else Branches.after_root(draft.tree.parents)
        return score(self.target, tokens, cache, self.recorder, branches)

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        """Verify the draft; also returns whether the target's distributions are valid, bool [rows, k + 1]."""
        origins = upload(batch.num_tokens(), self.target.device)
        if batch.sampling.is_stateless:
            inputs = replace(draft, finite=None)  # verification does not need it as an input of the recording
            return self.recorder(self._decide, logits, inputs, batch.sampling.rows, origins)
        distribution, finite = batch.sampling.distribution(logits, draft.tokens, lineage=_lineage(draft))
        return self.rule(distribution, draft, *self._draws(batch.sampling.rows, origins, draft)), finite

    def _decide(self, logits: Tensor, draft: Draft, rows: RowParams, origins: Tensor) -> tuple[Verification, Tensor]:
        """`_verify` as a pure function of tensors."""
        distribution, finite = rows.distribution(logits)
        return self.rule(distribution, draft, *self._draws(rows, origins, draft)), finite

    def _draws(self, rows: RowParams, origins: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
        """Acceptance uniforms [rows, k], and uniforms for the last token [rows, depth + 1].

        origins: positions of the drafts. For coupled rows, the last token has noise [rows, depth + 1, vocab], which
        also decides acceptance.
        """
        num_rows, width = draft.tokens.shape
        offsets, roles, depths = _draws_of_a_step(width, draft.tree, origins.device)
        if rows.all_greedy and not self.rule.always_draws:
            # all distributions are one-hot, so uniforms have no effect
            zeros = torch.zeros(num_rows, len(offsets), dtype=torch.float64, device=origins.device)
            return zeros[:, :width], zeros[:, width:]
        origins = origins.unsqueeze(1)
        if rows.coupled:
            draws = noise(rows.seeds, origins + offsets[width:], rows.vocab_size, self.uniforms)
            return draws[:, :1, 0].expand(-1, width), draws
        # the token after a fully accepted draft is a bonus
        roles = roles + (roles == Role.RECOVER) * (offsets >= depths[draft.num_proposed].unsqueeze(1))
        draws = self.uniforms(rows.seeds.unsqueeze(1), origins + offsets, roles, origins)
        return draws[:, :width], draws[:, width:]

    def _compact(self, cache: Cache, origins: Tensor, path: Tensor) -> None:
        """Move the cache entries of accepted tree nodes, path int64 [rows, depth], to consecutive positions."""
        cast("TreeCache", cache).keep(origins, path)

    def _commit(self, flight: Flight) -> list[tuple[int, int]]:
        """Append the emitted tokens of a step to its rows, and record the step. The only device-to-host transfer.

        Returns (drafted, accepted) tokens of each busy row, before truncation.
        """
        decided, batch = [], flight.batch
        outcomes = [unpacked(columns, flight.widths) for columns in flight.outcome.tolist()]
        self._add_phases(outcomes[0].moments_ns)
        for index, (row, outcome) in enumerate(zip(batch.rows, outcomes, strict=True)):
            if row is None or row.finish_reason:
                continue
            check_distributions(row, index, outcome, flight.tree)
            num_drafted, num_accepted, next_token = outcome.counts
            decided.append((num_drafted, num_accepted))
            accepted = (outcome.path if flight.tree else range(len(outcome.tokens)))[:num_accepted]
            emitted = [*(outcome.tokens[index] for index in accepted), next_token]
            num_kept = row.emit(emitted)
            if row.request.sampling.logprobs:
                assert flight.logits is not None
                add_logprobs(row, flight.logits[index], [0, *(node + 1 for node in accepted)], emitted[:num_kept])
            batch.sampling.observe(index, emitted[:num_kept])
            row.steps.append(step_record(num_drafted, accepted, num_kept, flight.tree))
            row.last_token_s = time.perf_counter()
            row.first_token_s = row.first_token_s or row.last_token_s
        return decided

    def _add_phases(self, moments_ns: Sequence[int]) -> None:
        """Add the times between moments: before the draft, after it, after scoring, after verification."""
        for name, (start_ns, end_ns) in zip(
            ("draft_s", "scoring_s", "verification_s"), pairwise(moments_ns), strict=False
        ):
            self._stopwatch.add(name, (end_ns - start_ns) / 1e9)


def _may_follow(batch: Batch, num_unread: int) -> bool:
    """Whether to launch a step before num_unread outcomes are read: if a row is expected to continue.

    A step of only finished rows is wasted, and costs more than letting the device wait for the host.
    """
    return batch.lag >= num_unread and any(row and row.num_remaining > num_unread * _pace(row) for row in batch.rows)


def _pace(row: Generation) -> float:
    """Mean number of tokens emitted per step of the row."""
    return (len(row.tokens) - len(row.request.prompt) - 1) / len(row.steps) if row.steps else 1.0


def _newest(batch: Batch, slot: int) -> list[int]:
    """The last token of the row in a busy slot."""
    row = batch.rows[slot]
    assert row
    return row.tokens[-1:]


@cache  # unbounded: recordings hold the addresses of these tensors
def _draws_of_a_step(width: int, tree: Tree | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(position offsets, roles, depths) of the uniforms of a step with `width` draft tokens, int64.

    The first two are [width + depth + 1], for acceptance and for the last token; nodes of a level share a position,
    each on its own branch. depths: [width + 1], number of levels if the first 0, 1, ..., width tokens are proposed.
    """
    widths = tree.widths if tree else (1,) * width
    depths = [0, *(depth for depth, size in enumerate(widths, 1) for _ in range(size))]
    branches = [branch for size in widths for branch in range(size)]
    offsets = [*(depth - 1 for depth in depths[1:]), *range(len(widths) + 1)]
    roles = [*(on_branch(Role.ACCEPT, branch) for branch in branches), *[Role.RECOVER] * (len(widths) + 1)]
    return torch.tensor(offsets, device=device), torch.tensor(roles, device=device), torch.tensor(depths, device=device)


def _lineage(draft: Draft) -> list[list[int]] | None:
    """For a tree, the draft nodes on the path to each position of the logits."""
    return [draft.tree.lineage(node) for node in range(-1, len(draft.tree))] if draft.tree else None
