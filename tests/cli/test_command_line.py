"""`python -m specdec`: what is written where, and how it ends."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.terminal import Terminal

from specdec import Completion, Engine, SamplingParams, Step
from specdec.cli.main import Decoded, comparison, main, summary
from specdec.cli.screen import Paint
from specdec.prompts import encode, encode_bytes, encode_raw

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "bench" / "catalogue" / "models" / "tiny")
# the draft is the target itself, so that every draft token is accepted: 1, then 4 + 1 and 4 + 1
MODELS = ["--target", TINY, "--draft", TINY, "--method", "draft_model", "--load-format", "dummy", "--dtype", "float32"]
COUPLED = ["Hello", *MODELS, "--max-tokens", "11", "--ignore-eos", "--temperature", "1", "--verification", "coupled"]
SHAPE = "-++++*++++*"  # the first token is the prefill's, and plain
ESCAPES = {"\033[32m": "+", "\033[4;35m": "~", "\033[36m": "*", "": "-"}


@pytest.fixture
def plain_text() -> str:
    """The tiny model's output without speculation, token by token: it has no tokenizer."""
    engine = Engine.load(TINY, load_format="dummy", dtype=torch.float32, verification="coupled")
    sampling = SamplingParams(max_tokens=11, ignore_eos=True)
    tokens = engine.generate([encode_bytes("Hello")], sampling)[0].token_ids
    assert len(set(tokens)) > 5
    return "".join(f"{token} " for token in tokens)


def test_marks_are_those_of_the_tokens(capsys: pytest.CaptureFixture[str], plain_text: str) -> None:
    assert main([*COUPLED, "--marks"]) == 0
    out, err = capsys.readouterr()
    assert re.sub(r"\d+ ", "-", re.sub(r"\[(.)\d+ \]", r"\1", out)) == f"{SHAPE}\n"
    assert re.sub(r"\[.(\d+ )\]", r"\1", out) == f"{plain_text}\n"
    assert err.splitlines()[0] == "[+accepted], [~recovered], [*bonus], plain"
    assert "11 tokens: [+8 accepted], [~0 recovered], [*2 bonus], 1 plain\n" in err
    assert "8 of 8 draft tokens accepted (100.0%), 5.00 tokens per target call\n" in err
    assert re.search(r"^\d+\.\d\dx the speed of plain decoding \(one prompt,", err, re.MULTILINE)
    assert err.endswith("same tokens as plain decoding\n")


def test_without_a_terminal_there_is_nothing_but_text(capsys: pytest.CaptureFixture[str], plain_text: str) -> None:
    assert main([*COUPLED, "--no-plain"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{plain_text}\n"
    assert err.startswith("\n11 tokens: 8 accepted, 0 recovered, 2 bonus, 1 plain\n")
    assert not {"\033", "\r"} & {*out, *err}
    assert "plain decoding" not in err


def on_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal gets that is both standard output and standard error."""
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal.stream)
        patched.setattr(sys, "stderr", terminal.stream)
        assert main(arguments) == 0
    shown = terminal.shown().replace("\r\n", "\n")
    terminal.close()
    return shown


def test_on_a_terminal_sources_are_colours(monkeypatch: pytest.MonkeyPatch, plain_text: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = on_a_terminal([*COUPLED, "--no-plain"], monkeypatch)
    said, _, shown = shown.rpartition("\r")  # what it did vanished before the legend
    assert all(f"\r{each}" in said for each in ("importing torch", "loading", "warming up"))
    legend, text = shown.splitlines()[:2]
    assert legend == "\033[32maccepted\033[0m, \033[4;35mrecovered\033[0m, \033[36mbonus\033[0m, plain"
    tokens = re.findall(r"(\033\[[1-9][\d;]*m)?(\d+ )(?:\033\[0m)?", text)
    assert "".join(ESCAPES[escape] for escape, _ in tokens) == SHAPE
    assert "".join(token for _, token in tokens) == plain_text


def test_the_bar_of_plain_decoding_goes_from_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = on_a_terminal(COUPLED, monkeypatch)
    bars = [line for line in shown.split("\r") if "plain decoding for comparison" in line]
    assert bars
    last = shown.rindex("plain decoding for comparison")
    assert re.match(r"\r +\r\d+\.\d\dx the speed of plain decoding", shown[shown.index("\r", last) :])


def test_colors_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, plain_text: str) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = on_a_terminal([*COUPLED, "--no-plain"], monkeypatch)
    assert plain_text in shown
    assert "\033" not in shown


# -- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "encoded"), [([], encode), (["--raw"], encode_raw)])
def test_a_question_goes_through_the_chat_template(
    flags: list[str],
    encoded: Callable,
    default_model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Engine(default_model, method="ngram")
    monkeypatch.setattr(Engine, "load", lambda *args, **options: engine)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One two three one two"))
    assert main(["-", *flags, "--max-tokens", "8", "--no-plain"]) == 0
    prompt = encoded("One two three one two", default_model.tokenizer)
    completion = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8))[0]
    assert capsys.readouterr().out == f"{completion.text}\n"


# -- numbers -------------------------------------------------------------------------------------------------------


def completion(tokens: tuple[int, ...], steps: tuple[Step, ...] = ()) -> Completion:
    return Completion(0, (1,), tokens, None, "length", None, steps, 0.0, 0.0, 0.0)


def test_summary_by_hand() -> None:
    steps = (Step(4, 2, "recovered"), Step(3, 3, "bonus"), Step(0, 0, "bonus"), Step(2, 1, None))
    assert summary(completion(tuple(range(11)), steps), Paint()) == [
        "11 tokens: 6 accepted, 1 recovered, 1 bonus, 2 plain",
        "6 of 9 draft tokens accepted (66.7%), 2.25 tokens per target call",
    ]
    assert summary(completion((5,)), Paint())[1] == "no tokens drafted"


def test_comparison_by_hand() -> None:
    """12 tokens in 2 s are 6 a second, 9 in 3 s are 3: twice as fast, though the outputs have other lengths."""
    speculative, plain = Decoded(completion(tuple(range(12))), 2.0), Decoded(completion(tuple(range(9))), 3.0)
    speed, times, agreement = comparison(speculative, plain, must_agree=True)
    assert speed.startswith("2.00x the speed of plain decoding (one prompt")
    assert times == "2.00 s for 12 tokens, plain decoding 3.00 s for 9"
    assert agreement.startswith("tokens differ from plain decoding from token 10 on")
    assert comparison(speculative, plain, must_agree=False) == [speed, times]
    other = Decoded(completion((0, 1, 7)), 1.0)
    assert "from token 3 on" in comparison(speculative, other, must_agree=True)[-1]
    assert comparison(speculative, speculative, must_agree=True)[-1] == "same tokens as plain decoding"


# -- how it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "prompt=' ' must not be empty; pass a text, or - to read standard input"),
        (["x", "--max-tokens", "0"], "max_tokens=0 must be"),
        (["x", "--temperature", "-1"], "temperature=-1.0 must be finite and >= 0"),
        (["x", "--method", "draft_model", "--target", TINY], 'method="draft_model" needs a draft'),
        (["x", *MODELS, "--gamma", "0"], "num_speculative_tokens=0 must be at least 1"),
        (["x", "--target", "/nowhere/at/all"], "source='/nowhere/at/all' must exist"),
        (["x", "--device", "abacus"], "device='abacus' must be usable here"),
        (["x" * 600, *MODELS], "prompt 0 has 600 tokens, which with max_tokens=128 exceeds"),
        (["é" * 3, *MODELS, "--top-p", "2"], "top_p=2.0 must be in (0, 1]"),
    ],
)
def test_errors_are_reported_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["x", "--method", "egale"], "argument --method: invalid choice: 'egale'"),
        (["x", "--temprature", "1"], "unrecognized arguments: --temprature 1; did you mean '--temperature'?; see"),
        (["x", "--gamma", "many"], "argument --gamma: gamma='many' must be an integer of at least 1, or auto"),
        ([], "the following arguments are required: prompt"),
    ],
)
def test_invalid_option_values_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--method", "egale"], "did you mean 'eagle'"),
        (["x", "--top-p", "2"], "top_p=2.0 must be in (0, 1]"),
        ([" "], "prompt=' ' must not be empty"),
    ],
)
def test_wrong_arguments_are_named_without_torch(arguments: list[str], message: str, tmp_path: Path) -> None:
    """It takes seconds to import: one that cannot be is put in its place."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "specdec", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_a_model_without_a_tokenizer_is_not_fed_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make("llama", tiny.GQA).save_pretrained(tmp_path)
    assert main(["Hello", "--target", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        "error: a text prompt needs a model with a tokenizer; load one with a tokenizer"
    )


def test_a_stream_that_lacks_characters_ends_in_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["Hello", *MODELS, "--ignore-eos", "--max-tokens", "3", "--no-plain"]) == 0
    print(chr(233))
    stdout.seek(0)
    assert stdout.read().splitlines()[-1] == "?"


class Interrupting(io.StringIO):
    """Somebody presses Ctrl-C, once, after the third token."""

    is_pressed = False

    def write(self, text: str) -> int:
        if self.getvalue().count(" ") == 3 and not self.is_pressed:
            self.is_pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_an_interrupt_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plain_text: str
) -> None:
    stdout = Interrupting()
    monkeypatch.setattr(sys, "stdout", stdout)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(COUPLED) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert stdout.getvalue().split() == plain_text.split()[:3]
    assert "tokens:" not in capsys.readouterr().err


def test_a_closed_pipe_ends_it_silently() -> None:
    """As in `| head -c 2`: the reader leaves after the first token."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "specdec", "Hello", *MODELS, "--ignore-eos", "--max-tokens", "500"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(2)
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(), err) == (141, b"")
