"""Row invariance: kernels are bit-equal, PyTorch's operations differ by rounding, and planted bugs are called bugs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import architectures, row_models
from helpers.row_models import WIDE, WINDOWED, ShiftedPosition, SmallError, StaleRow, build, fused, subject, unfused

from specdec.conformance.__main__ import main
from specdec.conformance.rows.arrangements import PLAIN, WHOLE, Arrangement, Text, arrangements
from specdec.conformance.rows.comparison import FirstDifference, deviations, largest, measure_noise
from specdec.conformance.rows.flips import Changes, flip_chance, margin_quantiles
from specdec.conformance.rows.report import Record, markdown, meets, table
from specdec.conformance.rows.run import Subject, compare
from specdec.conformance.rows.scorers import ModelScorer, TransformersScorer, in_float64
from specdec.kernels import cpp
from specdec.models.fusion import FusedDecoder

needs_kernels = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)
DTYPES = (torch.bfloat16, torch.float32)
TRIED = arrangements(num_speculative_tokens=4, num_rows=3, chunk=7)
TEXTS = row_models.texts(3, 20, 20)
ACROSS_THE_WRAP = row_models.texts(2, 135, 20)  # the ring of a window of 16 has 144 columns


def verdicts(record: Record) -> dict[str, str]:
    """The verdict of each arrangement by its name."""
    return {row["name"]: row["verdict"] for row in record["arrangements"]}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "options"), [("llama", WIDE), ("gemma3_text", WINDOWED)])
def test_kernels_are_bit_equal(kind: str, options: dict, dtype: torch.dtype) -> None:
    """Under every arrangement, across the wrap of a ring if there is one."""
    made = build(kind, options)
    assert isinstance(fused(made(dtype)).model.base_model, FusedDecoder)
    texts = ACROSS_THE_WRAP if options is WINDOWED else TEXTS
    record = compare(subject(made, fused), texts, TRIED, dtype)
    assert verdicts(record) == dict.fromkeys([each.name for each in (PLAIN, *TRIED)], "bit-equal")
    assert all(row["first"] is None and row["max_gap"] == 0 for row in record["arrangements"])
    assert record["verdict"] == "bit-equal"


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_operations_differ_by_rounding(dtype: torch.dtype) -> None:
    """In this library's cache and in transformers' own."""
    made = build("llama", WIDE)
    own = compare(subject(made, unfused), TEXTS, TRIED, dtype)
    assert own["verdict"] == "rounding"
    assert {row["name"] for row in own["arrangements"]} == {each.name for each in (PLAIN, *TRIED)}
    found = compare(of_transformers(made), TEXTS, TRIED, dtype)
    assert found["verdict"] == "rounding"
    gaps = [row["max_gap"] for row in own["arrangements"] + found["arrangements"]]
    assert 0 < max(gaps) < (0.5 if dtype == torch.bfloat16 else 1e-4)


def of_transformers(made: row_models.Build) -> Subject:
    def exact(dtype: torch.dtype) -> TransformersScorer:
        return TransformersScorer(in_float64(made(dtype)))

    return Subject(lambda dtype: TransformersScorer(made(dtype)), lambda dtype: TransformersScorer(made(dtype)), exact)


ARCHITECTURES = [
    *(("mamba2", torch.float32), ("falcon_h1", torch.float32), ("qwen3_5_text", torch.bfloat16)),
    *(("gemma3_text", torch.bfloat16), ("gpt2", torch.bfloat16), ("mixtral", torch.float32)),
]


@pytest.mark.parametrize(("kind", "dtype"), ARCHITECTURES)
def test_no_false_alarm_about_other_architectures(kind: str, dtype: torch.dtype) -> None:
    """Recurrent, hybrid, windowed, with learned positions, with experts."""

    def made(dtype: torch.dtype) -> torch.nn.Module:
        return architectures.make(architectures.config(kind)).to(dtype)

    assert compare(subject(made, unfused), TEXTS, TRIED, dtype)["verdict"] in ("bit-equal", "rounding")


WITH_REJECTIONS = {each.name for each in TRIED if each.num_rejected or each.slot == "reused"}
CACHED = {each.name for each in (PLAIN, *TRIED)}
TREES = {each.name for each in TRIED if each.num_siblings}
STEPS_OF_5 = {each.name for each in TRIED if each.width + each.num_rejected == 5}
# the planted bug, the arrangements that it is in, and those where it may be
BUGS = {
    "window off by one": (row_models.wider_window, CACHED, CACHED),
    "stale cache row": (StaleRow, {"width 5, none accepted", "width 5, 2 accepted"}, WITH_REJECTIONS),
    "accepted nodes of a tree not moved": (row_models.unmoved_nodes, TREES, TREES),
    "position off by one at width k + 1": (ShiftedPosition, STEPS_OF_5, STEPS_OF_5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [unfused, pytest.param(fused, marks=needs_kernels)])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_bugs(bug: str, wrap: row_models.Wrap, dtype: torch.dtype) -> None:
    """In the arrangements that have them, and in no other."""
    plant, wrong, possible = BUGS[bug]
    record = compare(subject(build("gemma3_text", WINDOWED), wrap, plant), TEXTS, TRIED, dtype)
    found = {name for name, verdict in verdicts(record).items() if verdict == "bug"}
    assert wrong <= found <= possible
    assert record["verdict"] == "bug"
    assert not meets(record["verdict"], "rounding")


def test_a_bug_below_the_rounding_of_16_bits_is_found_in_float32() -> None:
    """It does not shrink with the precision. Without the float32 run it passes as rounding."""
    faulty = subject(build("llama", WIDE), unfused, SmallError)
    assert compare(faulty, TEXTS, TRIED, torch.bfloat16)["verdict"] == "bug"
    assert compare(faulty, TEXTS, TRIED, torch.bfloat16, in_float32=False)["verdict"] == "rounding"


class Table:
    """A scorer that knows the logits of each text, and is wrong in one bit of one arrangement."""

    vocab_size = 8

    def __init__(self, wrong: Arrangement, value: float) -> None:
        self.wrong, self.value = wrong, value

    def supports(self, arrangement: Arrangement) -> bool:
        return arrangement in (PLAIN, self.wrong)

    def score(self, texts: Sequence[Text], arrangement: Arrangement) -> torch.Tensor:
        first = texts[0].prompt[0]
        logits = torch.arange(48.0).reshape(6, 8) + first
        logits[3, 5] = -0.0
        if arrangement == self.wrong and first == 2:
            logits[3, 5:] = torch.tensor([self.value, 7.0, 8.0])
        return logits


@pytest.mark.parametrize("value", [0.0, 1e-45, float("nan")])
def test_the_first_difference_is_where_the_first_bit_differs(value: float) -> None:
    """-0.0 and 0.0 are equal numbers with different bits."""
    texts = [Text([first], [0] * 6) for first in (1, 2, 2)]
    scorer = Table(WHOLE, value)
    exact = [scorer.score([text], PLAIN) for text in texts]
    found = deviations(scorer, texts, (WHOLE, Arrangement("not supported", width=2)), exact)
    assert found.keys() == {PLAIN, WHOLE}
    first = found[WHOLE].first
    assert first is not None
    assert (first.text, first.position, first.token) == (1, 3, 5)
    assert str((first.plain, first.other)) == str((-0.0, float(torch.tensor(value))))
    assert (found[WHOLE].num_positions, found[WHOLE].num_differing) == (18, 2)
    assert found[PLAIN].first is None
    assert isinstance(first, FirstDifference)


def test_nan_is_an_infinite_gap_and_equal_infinities_are_none() -> None:
    one = torch.tensor([1.0, -torch.inf, 2.0])
    assert largest(one, torch.tensor([1.0, -torch.inf, 2.5])) == 0.5
    assert largest(one, torch.tensor([torch.nan, -torch.inf, 2.0])) == torch.inf
    assert largest(one, torch.tensor([1.0, 0.0, 2.0])) == torch.inf


def test_a_scorer_must_decode_plainly() -> None:
    scorer = Table(WHOLE, 0.0)
    scorer.supports = lambda arrangement: False
    with pytest.raises(ValueError, match="must support plain decoding"):
        deviations(scorer, TEXTS, TRIED, [])


def test_noise_is_at_least_that_of_the_last_bit() -> None:
    """float64 against itself differs by nothing."""
    scorer = TransformersScorer(build("llama", WIDE)(torch.float64))
    exact = [scorer.score([text], WHOLE) for text in TEXTS]
    noise = measure_noise(scorer, TEXTS, exact, torch.float64).noise
    assert noise >= torch.finfo(torch.float64).eps * max(float(each.abs().max()) for each in exact)


def test_arrangements_are_those_of_speculative_steps() -> None:
    calls = {(each.width, each.num_rejected) for each in arrangements(1, 2, 1)} - {(1, 0)}
    assert calls == {(2, 0), (1, 1)}
    widths = {each.width + each.num_rejected for each in arrangements(7, 2, 1) if not each.num_siblings}
    assert widths == {1, 8}


# ---- flips


def test_a_flip_is_a_change_that_exceeds_the_margin() -> None:
    plain = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5], [1.0, 1.0, 0.0]])
    other = torch.tensor([[2.0, 2.5, 0.0], [0.0, 2.0, 1.0], [1.0, 0.5, 0.0]])
    changes = Changes.between(plain, other)
    assert changes.margins.tolist() == [2.0, 0.5, 0.0]
    assert changes.changes.tolist() == [-2.5, 0.5, 0.5]
    assert changes.num_flips == 1
    # of the nine pairs, the change of -2.5 exceeds each of the margins
    found = flip_chance([changes])
    assert (found.rate, found.low, found.high) == (3 / 9, 3 / 9, 3 / 9)
    assert (found.num_flips, found.num_positions) == (1, 3)


def test_ties_count_as_a_half() -> None:
    assert flip_chance([Changes(np.array([1.0]), np.array([-1.0]), 0)]).rate == 0.5
    assert flip_chance([Changes(np.array([0.0]), np.array([0.0]), 0)]).rate == 0.0


def test_the_chance_of_a_flip_and_its_interval_hold_the_true_one() -> None:
    """Margins are exponential and changes normal, so the true chance is known; few texts see hardly any flip."""
    generator, scale = np.random.default_rng(0), 0.01
    true = float(np.maximum(0, -generator.normal(0, scale, 1_000_000)).mean())  # P(margin < x) is nearly x
    covered, num_runs = 0, 60
    for run in range(num_runs):
        drawn = [(generator.exponential(1.0, 40), generator.normal(0, scale, 40)) for _ in range(12)]
        changes = [Changes(margin, change, int((margin + change < 0).sum())) for margin, change in drawn]
        found = flip_chance(changes, seed=run)
        covered += found.low <= true <= found.high
    assert covered >= 0.75 * num_runs  # the bootstrap of twelve texts covers somewhat less than it declares
    assert true == pytest.approx(scale / np.sqrt(2 * np.pi), rel=0.01)


def test_margins_are_quantiles_over_all_texts() -> None:
    logits = [torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[2.0, 8.0, 0.0], [1.0, 1.0, 0.0]])]
    assert margin_quantiles(logits)[0.5] == 4.0


# ---- the command


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    lines = (json.dumps({"prompt": f"{number} times the quick brown fox"}) for number in range(40))
    path.write_text("\n".join(lines))
    return path


TINY = "bench/catalogue/models/tiny/config.json"


def run(prompts: Path, *options: str) -> int:
    given = ("--target", TINY, "--load-format", "dummy", "--prompts", str(prompts))
    return main(["rows", *given, "--num-texts", "2", "--num-tokens", "6", *options])


def test_the_command_reports_and_meets_what_is_required(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert run(prompts, "--no-kernels", "--json", str(file)) == 0
    record = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert table(record) in printed
    assert f"Verdict: **{record['verdict']}**" in printed
    assert (record["verdict"], record["num_texts"], record["num_tokens"]) == ("rounding", 2, 6)
    assert record["implementation"] == "specdec without kernels"
    assert "chance of" in printed
    assert run(prompts, "--no-kernels", "--require", "bit-equal") == 1


def faulty(dtype: str) -> ModelScorer:
    """The command's model with a bug, as an engine of one's own."""
    from specdec.models.loading import load_pretrained

    model, _ = load_pretrained(TINY, dtype=getattr(torch, dtype), load_format="dummy")
    return ModelScorer(ShiftedPosition(unfused(model)))


def test_the_command_tests_ones_own_engine(
    prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my_engine", sys.modules[__name__])
    assert run(prompts, "--implementation", "my_engine:faulty") == 1
    assert "Verdict: **bug**. The error of width 5, all accepted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gamma", "0"), "--gamma=0 must be at least 1"),
        (("--num-texts", "1"), "--num-texts=1 must be at least 2"),
        (("--json", "no/such/rows.json"), "--json=no/such/rows.json must be in a folder that exists"),
        (("--num-texts", "41"), "num_texts=41 must be at most the number of prompts"),
        (("--implementation", "nothing_here:make"), "needs module 'nothing_here'"),
    ],
)
def test_wrong_options_are_errors(
    prompts: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, *options) == 2
    assert message in capsys.readouterr().err


def test_option_errors_need_no_torch() -> None:
    code = (
        "import sys; from specdec.conformance.__main__ import main\n"
        "sys.modules['torch'] = None\n"
        "try: main(['rows', '--implementation', 'nothing'])\n"
        "except SystemExit as error: sys.exit(error.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench" / "baselines" / "rows").glob("*.json"))


def test_the_page_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "row-invariance.md").read_text()
    assert FILES
    for path in FILES:
        assert markdown(json.loads(path.read_text())) in page, f"paste the result of {path.name} into the page"


def test_the_committed_results_are_what_the_library_promises() -> None:
    """With kernels bit-equal in both dtypes, without them rounding."""
    for record in (json.loads(path.read_text()) for path in FILES):
        assert record["verdict"] == ("bit-equal" if record["implementation"] == "specdec with kernels" else "rounding")
