"""Requests that arrive after the answers to others: turns of a conversation, and clients that wait for each answer."""

from __future__ import annotations

from collections.abc import Sequence


class Following:
    """Tracks which requests of a load are due, and whether those that count are finished.

    arrivals_s: seconds from the start or, for a request that follows another, from that one's answer. after: index of
    the request that each follows, None for none. until_s: requests that are due later do not count: they only keep the
    load up while those that count are decoded.
    """

    def __init__(self, arrivals_s: Sequence[float], after: Sequence[int | None] | None, until_s: float) -> None:
        after = [None] * len(arrivals_s) if after is None else after
        self._delays_s, self._until_s = arrivals_s, until_s
        self._followers: dict[int, list[int]] = {}
        self._due_s: dict[int, float] = {}
        self._open: set[int] = set()
        for index, (at_s, predecessor) in enumerate(zip(arrivals_s, after, strict=True)):
            if predecessor is None:
                self._arrive(index, at_s)
            else:
                self._followers.setdefault(predecessor, []).append(index)

    @property
    def is_over(self) -> bool:
        """Whether all requests that count are finished or refused."""
        return not self._open

    @property
    def due_s(self) -> dict[int, float]:
        """Seconds from the start at which requests arrive, by index, as far as known."""
        return self._due_s

    def finish(self, index: int, end_s: float) -> list[int]:
        """The requests that follow one that was answered at `end_s`; they are now due."""
        followers = self._followers.pop(index, [])
        for each in followers:
            self._arrive(each, end_s + self._delays_s[each])
        self._open.discard(index)
        return followers

    def refuse(self, index: int) -> None:
        """A request was refused: those that follow it never arrive."""
        self._open.discard(index)

    def arrivals_s(self) -> tuple[float | None, ...]:
        """When each request that counts arrived; None for the others."""
        due_s = (self._due_s.get(index) for index in range(len(self._delays_s)))
        return tuple(each if each is not None and each < self._until_s else None for each in due_s)

    def _arrive(self, index: int, at_s: float) -> None:
        self._due_s[index] = at_s
        if at_s < self._until_s:
            self._open.add(index)
