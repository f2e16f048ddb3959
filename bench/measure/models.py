"""Engines with the models of one pair in memory."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import BenchEngine, EngineError, LoadOptions, Setup
from bench.engines.registry import check_vocabulary
from bench.engines.registry import load as load_engine
from bench.measure import machine
from bench.records.schema import Cell
from specdec.conformance.faithfulness import Faithfulness, faithfulness
from specdec.drafts import load_with_drafts
from specdec.models.costs import sample_tokens
from specdec.models.placement import PlacementError
from specdec.runtime.artifacts import LoadError

SAMPLE_LENGTH = 512  # tokens over which a quantized model is compared


@contextmanager
def failing_cell(device: str) -> Iterator[None]:
    """Fail the cell, not the run, where an engine or a GPU fails."""
    try:
        yield
    except EngineError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None  # the message is complete
    except RuntimeError as error:
        if (failure := machine.device_failure(error, device)) is None:
            raise
        raise pytest.fail.Exception(failure, pytrace=False) from None


def quantization_of(cell: Cell, config: BenchConfig) -> str | None:
    """How this library's engine quantizes a cell's weights; None if it does not, and for other engines."""
    return config.quantization if cell.engine == "specdec" and config.quantization != "none" else None


def _explained(error: Exception, pair: Pair) -> str:
    """The message of an error while loading, with the remedy for a pair whose licence has to be accepted."""
    if not (pair.gated and isinstance(error, LoadError)):
        return str(error)
    return (
        f"{error}; if the hub refused it: accept the licence at https://huggingface.co/{pair.target} (and the "
        "draft's), then run hf auth login"
    )


class Models:
    """Loads engines when they are first used, and unloads all of them when another pair is."""

    def __init__(self, config: BenchConfig, device: str) -> None:
        self._config, self._device = config, device
        self._pair: Pair | None = None
        self._engines: dict[str, BenchEngine] = {}
        self._refusals: dict[str, str] = {}  # engine -> why it does not take the pair's draft
        self._faithfulness: Faithfulness | None = None  # of the pair's quantized target

    def engine(self, name: str, pair: Pair) -> BenchEngine:
        """An engine with a pair's models; one that cannot be loaded fails or skips the cell."""
        if pair != self._pair:
            self.close()
            self._pair = pair
        if name not in self._engines:
            with failing_cell(self._device):
                self._engines[name] = self._load(name, pair)
        return self._engines[name]

    def faithfulness(self, pair: Pair) -> Faithfulness:
        """How far the quantized target is from the one that is not, in the same dtype, over a sample text."""
        target: Any = self.engine("specdec", pair)
        if self._faithfulness is None:
            exact, _ = load_with_drafts(
                folder(pair.target),
                [],
                dtype=target.target.dtype,
                device=self._device,
                attention=pair.attention,
                load_format=pair.load_format,
            )
            text = sample_tokens(exact, 1, min(SAMPLE_LENGTH, exact.context_length))
            self._faithfulness = faithfulness(target.target, exact, text)
        return self._faithfulness

    def loaded(self, name: str) -> BenchEngine | None:
        """An engine, if it is in memory."""
        return self._engines.get(name)

    def prepare(self, cells: Collection[Cell], pair: Pair) -> None:
        """Make each engine ready for its own among these cells, and let it release what others needed."""
        for cell in cells:
            self.check_draft(cell.engine, cell.method, pair)
        for name in {*self._engines, *(cell.engine for cell in cells)}:
            setups = {Setup(cell.method, cell.gamma, cell.batch_size) for cell in cells if cell.engine == name}
            with failing_cell(self._device):
                self.engine(name, pair).prepare(setups)
        gc.collect()  # a full collection takes 0.2 s: not within what is timed

    def check_draft(self, name: str, method: str, pair: Pair) -> None:
        """Fail or skip a cell if its method uses the pair's draft and its engine does not take that draft."""
        if refusal := self.why_no_draft(name, method, pair):
            self._refuse(refusal)

    def why_no_draft(self, name: str, method: str, pair: Pair) -> str | None:
        """Why an engine does not take the pair's draft, if a method uses it; None if it does."""
        self.engine(name, pair)
        return self._refusals.get(name) if pair.draft_for(method) == pair.draft else None

    def settle(self) -> None:
        """Wait until no engine keeps the machine busy."""
        for engine in self._engines.values():
            engine.settle()

    def close(self) -> None:
        """Unload all engines."""
        self._refusals.clear()
        self._faithfulness = None
        while self._engines:
            self._engines.popitem()[1].close()

    def _load(self, name: str, pair: Pair) -> BenchEngine:
        """Load an engine, without the pair's draft if it does not take it. A model that cannot be loaded is refused."""
        from specdec.models.causal import UnsupportedModelError  # imports transformers

        pair = self._with_needed_draft(pair)
        try:
            check_vocabulary(pair, name)
        except LoadError as error:
            self._refusals[name] = _explained(error, pair)
            pair = replace(pair, draft=None)
        try:
            return load_engine(name, pair, self._options(pair))
        except (LoadError, UnsupportedModelError, PlacementError) as error:
            message = _explained(error, pair)
        self._refuse(message)  # outside of `except`: the message is complete

    def _refuse(self, message: str) -> NoReturn:
        """Fail the cell if its model was named, else skip it."""
        if {"pairs", "placements"} & self._config.named:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)

    def _with_needed_draft(self, pair: Pair) -> Pair:
        """The pair, without its draft if no method of the campaign uses it: not every engine may take that draft."""
        is_used = any(pair.draft_for(method) == pair.draft for method in self._config.methods)
        return pair if is_used else replace(pair, draft=None)

    def _options(self, pair: Pair) -> LoadOptions:
        config = self._config
        return LoadOptions(
            config.dtype_of(pair),
            self._device,
            config.verification,
            config.synthetic_acceptance_rates,
            config.peers,
            None if config.quantization == "none" else config.quantization,
            tuple((gamma, config.prescribed_rates(gamma)) for gamma in config.gammas if config.prescribes_acceptance),
        )
