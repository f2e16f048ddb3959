"""The registry of drafting methods, and a user's own method in it: one file, `helpers.guessing`, and one call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from helpers.guessing import GUESS, GuessProposer

from specdec import METHODS, Engine, SamplingParams
from specdec.assembly import VERIFICATIONS, EngineOptions, assemble
from specdec.cli.main import parser
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import HALVES, joint_distribution, table
from specdec.methods import VERIFICATION_NAMES, MethodSpec, register
from specdec.models.markov import MarkovModel
from specdec.requests import Batch
from specdec.sampling.distributions import OneHot
from specdec.verification import Draft

TARGET = MarkovModel(table(0, HALVES))
PROMPT = (0, 1)


class DeclaresOthers(GuessProposer):
    """Declares that other tokens than those that it drew were certain."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        return replace(draft, distribution=OneHot((draft.tokens + 1) % self.vocab_size, self.vocab_size))


BROKEN = MethodSpec("broken_guess", "another distribution than it declares", lambda parts: DeclaresOthers(3))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(GUESS)
    register(BROKEN)
    yield
    del METHODS["guess"], METHODS["broken_guess"]


@pytest.mark.parametrize("method", ["guess", "broken_guess"])
def test_a_registered_method_has_the_exact_joint_distribution(method: str) -> None:
    def make(source, rule, max_batch_size):
        decoder, _ = assemble(TARGET, None, EngineOptions(method, 2, max_batch_size))
        decoder.rule = rule
        decoder.uniforms = decoder.proposer.uniforms = source
        return decoder

    found = distance(exact_distribution(make, PROMPT, 3, (3, 2, 2)), joint_distribution(TARGET, PROMPT, 3))
    assert found > 0.01 if method == "broken_guess" else found < 1e-12


@pytest.mark.parametrize("verification", VERIFICATION_NAMES)
def test_an_engine_decodes_with_a_registered_method(verification: str) -> None:
    engine = Engine(TARGET, method="guess", verification=verification, max_batch_size=2)
    prompts = [[0, 1, 2], [1, 1], [2, 0, 0, 1]]
    completions = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    plain = Engine(TARGET).generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    assert [each.token_ids for each in completions] == [each.token_ids for each in plain]
    assert sum(each.counts.num_accepted for each in completions) > 0


def test_the_command_line_knows_a_registered_method() -> None:
    assert parser().parse_args(["Hello", "--method", "guess"]).method == "guess"


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="method 'guess' must have a name of its own; known: autoregressive, ngram,"):
        register(GUESS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": "auto"}, "'guess' cannot; give a number"),
        ({"exit_layer": 1}, "exit_layer=1 must be left out with method='guess'; use method='early_exit'"),
        ({"max_history_bytes": 1}, "max_history_bytes=1 must be left out with method='guess'; use method='suffix' or"),
        ({"tree": [(0,)]}, "tree: method='guess' does not draft trees"),
        ({"draft": TARGET}, "draft: method='guess' does not use a model"),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(TARGET, method="guess", **options)


def test_every_verification_rule_has_its_name() -> None:
    assert tuple(VERIFICATIONS) == VERIFICATION_NAMES
    assert [rule.needs_noise for rule in VERIFICATIONS.values()] == [False, False, True]


def test_the_registry_needs_no_torch() -> None:
    code = "import sys; from specdec.methods import METHODS; print(len(METHODS), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(len(METHODS) - 2), "False"]
