"""Prescribed acceptance lengths: rates of least variance, InferenceX's files, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.campaign.config import BenchConfig
from bench.campaign.golden import AcceptanceLength, acceptance_length
from bench.engines.base import LoadOptions, Setup
from bench.engines.vllm import _speculative
from specdec import AcceptanceCounts, Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.stats import least_variance_rates

MakeConfig = Callable[..., BenchConfig]
NAME = "synthetic_acceptance_length"
GOLDEN = """\
# Source GitHub Actions run: https://example.org/1
_metadata:
  draft-model: somebody/head
model-x:
  thinking_on:
    1: 1.78
    2: 2.38
  thinking_off:
    2: 2.52
    1: 1.84
"""


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "x_eagle3.yaml"
    path.write_text(GOLDEN)
    return path


def test_the_rates_of_vllm() -> None:
    """From the documentation of its users: 3.78 with seven drafts is two positions always, the third with 0.78."""
    assert least_variance_rates(3.78, 7) == pytest.approx((1, 1, 0.78, 0, 0, 0, 0))
    assert least_variance_rates(2.87, 2) == pytest.approx((1, 0.87))
    assert least_variance_rates(1, 3) == (0, 0, 0)
    assert least_variance_rates(4, 3) == (1, 1, 1)
    assert least_variance_rates(1, 0) == ()
    for length in (0.9, 4.1, float("nan")):
        with pytest.raises(ValueError, match=rf"length={length} must lie in .* = \[1, 4\]"):
            least_variance_rates(length, 3)


@given(st.integers(0, 40))
def test_no_rates_of_this_length_vary_less(tenths: int) -> None:
    """Against every falling list of four rates in steps of a tenth with the same sum; variance by summing by parts."""

    def variance(rates: tuple[int, ...]) -> int:
        """A hundred times that of the number of accepted tokens, which has the tail probabilities `rates` / 10."""
        return 10 * sum((2 * place + 1) * rate for place, rate in enumerate(rates)) - sum(rates) ** 2

    least = tuple(round(10 * rate) for rate in least_variance_rates(1 + tenths / 10, 4))
    assert sum(least) == tenths
    falling = (rates for rates in product(range(11), repeat=4) if sorted(rates, reverse=True) == [*rates])
    others = [rates for rates in falling if sum(rates) == tenths]
    assert variance(least) == min(map(variance, others))


def test_an_engine_has_the_length_it_is_given() -> None:
    """Counts of a real run: a step accepts one or two tokens of four, on average 1.25, so it is 2.25 tokens long."""
    target, draft = grid_pair(3)
    rates = least_variance_rates(2.25, 4)
    engine = Engine(
        target, draft=draft, method="draft_model", num_speculative_tokens=4, synthetic_acceptance_rates=rates
    )
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    counts = AcceptanceCounts.total(each.counts for each in engine.generate([[0]], sampling))
    assert counts.acceptance_histogram[3:] == [0, 0]
    assert counts.acceptance_histogram[0] <= 1  # the last step, which max_tokens cuts
    assert counts.mean_acceptance_length == pytest.approx(2.25, abs=0.2)  # six standard errors of 178 steps


def test_a_number_holds_for_every_gamma() -> None:
    length = acceptance_length(NAME, "2.87")
    assert length == AcceptanceLength(2.87)
    assert length.rates(4) == pytest.approx((1, 0.87, 0, 0))
    assert length.rates(0) == ()
    with pytest.raises(ValueError, match=r"synthetic_acceptance_length=2.87 must lie in \[1, gamma \+ 1\] = \[1, 2\]"):
        length.at(1)
    with pytest.raises(ValueError, match="gammas=auto must be numbers with synthetic_acceptance_length"):
        length.at("auto")


def test_a_golden_file_has_a_length_for_each_gamma(golden: Path) -> None:
    length = acceptance_length(NAME, f"{golden}:thinking_off")
    assert length == AcceptanceLength(None, ((1, 1.84), (2, 2.52)), "x_eagle3.yaml:thinking_off")
    assert [length.at(gamma) for gamma in (1, 2)] == [1.84, 2.52]
    with pytest.raises(ValueError, match=r"gammas=4 must be among those of x_eagle3\.yaml:thinking_off; use"):
        length.at(4)


def test_a_file_with_one_mode_needs_no_mode(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("qwen:\n  thinking_on:\n    3: 2.52\n")
    assert acceptance_length(NAME, str(path)).by_gamma == ((3, 2.52),)


@pytest.mark.parametrize("text", ["0.9", "nan", "inf", "long"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"{NAME}={text} must be a number >= 1 of tokens per target call, or"):
        acceptance_length(NAME, text)


BAD_FILES = ("", "- 1", "a: 1", "a: {b: {1: 0.5}}", "a: {b: {x: 1.5}}", "a: {b: {1: high}}", "a: {b: {}}", "a: [")


@pytest.mark.parametrize("content", [*BAD_FILES, "a: {b: {1: 2}}\nc: {b: {1: 2}}"])
def test_a_file_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml must (hold one model|be a readable YAML file)"):
        acceptance_length(NAME, str(path))


def test_missing_files_and_modes_are_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.yaml must be a readable YAML file"):
        acceptance_length(NAME, str(tmp_path / "no.yaml"))
    for text in (f"{golden}", f"{golden}:thinking"):
        with pytest.raises(ValueError, match="must name a mode of the file, thinking_on or thinking_off"):
            acceptance_length(NAME, text)


def test_a_run_has_the_rates_of_each_gamma(make_config: MakeConfig, golden: Path) -> None:
    length = acceptance_length(NAME, f"{golden}:thinking_on")
    config = make_config(gammas=(1, 2), synthetic_acceptance_length=length)
    assert config.prescribes_acceptance
    assert [config.prescribed_rates(gamma) for gamma in (0, 1, 2)] == [
        *((), pytest.approx((0.78,)), pytest.approx((1, 0.38))),
    ]
    pairs = tuple((gamma, config.prescribed_rates(gamma)) for gamma in (1, 2))
    options = LoadOptions("float32", "cpu", rates_by_gamma=pairs)
    speculative = _speculative(config.pairs[0], options, Setup("ngram", 2, 1))
    assert speculative is not None
    assert speculative["synthetic_acceptance_rates"] == pytest.approx([1, 0.38])
    assert speculative["rejection_sample_method"] == "synthetic"


def test_where_the_output_counts_it_is_refused(make_config: MakeConfig) -> None:
    length = AcceptanceLength(2.0)
    for changes in ({"synthetic_acceptance_rates": (0.5,)}, {"synthetic_acceptance_length": length}):
        with pytest.raises(ValueError, match="allow_code_execution must be left out with prescribed acceptance"):
            make_config(allow_code_execution=True, **changes)
    with pytest.raises(ValueError, match="synthetic_acceptance_length must be left out beside"):
        make_config(synthetic_acceptance_length=length, synthetic_acceptance_rates=(0.5,))
    with pytest.raises(ValueError, match=r"must lie in \[1, gamma \+ 1\]"):
        make_config(synthetic_acceptance_length=AcceptanceLength(3.5), gammas=(2,))
