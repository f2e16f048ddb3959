"""MATH-500, AIME, MBPP and LiveCodeBench: what their readers take, and how outputs are scored. All rows are our own."""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import catalogue
from bench.measure.paired import CANDIDATE
from bench.measure.quality import sandbox, scores
from bench.workloads import registry
from bench.workloads.base import Cases, Formula, Malformed, Number, Prompt, UnavailableError, UnitTest
from bench.workloads.scoring import formulas
from bench.workloads.scoring.extraction import code_of
from bench.workloads.scoring.formulas import last_boxed
from bench.workloads.scoring.harness import same

runs_code = pytest.mark.skipif(sandbox.why_not() is not None, reason="no namespaces to run code in")


def write_rows(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(truth: Any, text: str) -> float:
    return scores.score(Prompt("?", truth=truth), text)


# -- formulas --------------------------------------------------------------------------------------------------

HALF = {"problem": "What is 1 - 1/2?", "answer": "\\frac{1}{2}", "subject": "Algebra", "solution": "..."}


def test_math_500_has_a_formula(tmp_path: Path) -> None:
    write_rows(tmp_path / "MATH-500" / "test.jsonl", HALF, {**HALF, "subject": "Geometry"})
    prompts = registry.read("math500", tmp_path)
    assert [(prompt.category, prompt.truth) for prompt in prompts] == [
        ("Algebra", Formula("\\frac{1}{2}")),
        ("Geometry", Formula("\\frac{1}{2}")),
    ]
    assert prompts[0].text.startswith("What is 1 - 1/2?\n\nReason step by step")
    assert "\\boxed{}" in prompts[0].text
    write_rows(tmp_path / "MATH-500" / "test.jsonl", {"problem": "?"})
    with pytest.raises(ValueError, match=r"test\.jsonl:1: answer=None must be a non-empty string"):
        registry.read("math500", tmp_path)


EQUAL = [
    (r"\frac{1}{2}", r"So it is $\boxed{0.5}$."),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    (r"2\sqrt{3}", r"first \boxed{1}, but then \boxed{\sqrt{12}}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    ("p - q", r"\boxed{-q + p}"),
    ("(-\\infty, 2)", r"\boxed{(-\infty,2)}"),
    (r"10\%", r"\boxed{10}"),
    (r"90^\circ", r"\boxed{90}"),
    ("10080", r"\boxed{10,080}"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
    ("3 + 2i", r"\boxed{2i+3}"),
]
UNEQUAL = [
    (r"\frac{1}{2}", r"\boxed{2}"),
    ("4", r"\boxed{5}, although 4 was near"),
    ("(2, \\infty)", r"\boxed{[2, \infty)}"),
    ("x + 1", r"\boxed{x}"),
    ("4", ""),
    ("4", r"\boxed{"),
    ("4", "\\boxed{\\frac{" * 50),
    ("4", "\x00\udfff"),
    (r"\text{even}", r"\boxed{\text{odd}}"),
]


@pytest.mark.parametrize(
    ("expected", "text", "is_equal"), [(*row, True) for row in EQUAL] + [(*row, False) for row in UNEQUAL]
)
def test_formulas_are_compared_by_their_value(expected: str, text: str, is_equal: bool) -> None:
    pytest.importorskip("math_verify")
    assert score(Formula(expected), text) == is_equal


def test_the_last_box_counts() -> None:
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}} or \boxed{3") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"\fbox{2} \boxed 3") is None


def test_without_math_verify_there_is_no_score_but_a_reason(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == formulas.PACKAGE else found(name))
    prompts = [Prompt("?", truth=Formula("4"))]
    record = scores.of_run(make_config(), catalogue()["smollm2-135m"], prompts, {CANDIDATE: []}, None)
    assert record["quality_metric"] == "exact_match"
    assert record["quality"] is None
    assert "pip install math-verify" in record["quality_reason"]


# -- integers --------------------------------------------------------------------------------------------------


def test_aime_has_integers_by_year(tmp_path: Path) -> None:
    write_rows(tmp_path / "aime2024.jsonl", {"problem": "?", "answer": "073", "year": 2024})
    write_rows(tmp_path / "aime_2025" / "test.jsonl", {"question": "??", "answer": 5})
    prompts = registry.read("aime", tmp_path)
    assert [(prompt.category, prompt.truth) for prompt in prompts] == [("2024", Number("73")), ("test", Number("5"))]
    assert registry.read("aime:2024", tmp_path) == prompts[:1]
    assert score(prompts[0].truth, "thus $\\boxed{073}$") == score(prompts[0].truth, "the answer is 73.") == 1
    assert score(prompts[0].truth, "\\boxed{730}") == score(prompts[0].truth, "73 or \\boxed{74}") == 0
    for answer in (1000, -1, "7.5", "x", None):
        write_rows(tmp_path / "aime2024.jsonl", {"problem": "?", "answer": answer})
        with pytest.raises(ValueError, match=r"aime2024\.jsonl:1: answer=.* must be an integer from 0 to 999"):
            registry.read("aime", tmp_path)


@pytest.mark.parametrize("name", ["math500", "aime", "mbpp", "livecodebench"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=rf"workloads={name} must have .*file .* name its folder with --data-dir"
    ):
        registry.read(name, tmp_path)


# -- functions -------------------------------------------------------------------------------------------------

TWICE: dict[str, Any] = {
    "text": "Write a function that doubles a number.",
    "code": "def helper(x):\n    return x\n\ndef twice(x):\n    return 2 * helper(x)",
    "test_list": ["assert twice(2) == 4", "assert twice(-1) == -2"],
    "test_setup_code": "",
}


def test_mbpp_has_assertions(tmp_path: Path) -> None:
    write_rows(tmp_path / "mbpp.jsonl", TWICE)
    (prompt,) = registry.read("mbpp", tmp_path)
    assert isinstance(prompt.truth, UnitTest)
    assert prompt.truth.entry_point == "twice"
    assert "assert twice(2) == 4" in prompt.text
    (tmp_path / "mbpp.jsonl").unlink()
    sanitized = {name: value for name, value in TWICE.items() if name != "text"} | {"prompt": "Double it."}
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([sanitized | {"test_imports": ["import math"]}]))
    (prompt,) = registry.read("mbpp", tmp_path)
    assert isinstance(prompt.truth, UnitTest)
    assert prompt.truth.test.startswith("import math\ndef check(candidate):\n    assert twice(2) == 4\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_list": []}, "test_list must have an assertion"),
        ({"test_list": "assert twice(2)"}, "test_list='assert twice.2.' must be a list of lines"),
        ({"code": "def twice("}, "code and test_list must be Python"),
        ({"test_list": ["assert thrice(2) == 6"]}, "test_list must call a function of code"),
        ({"text": ""}, "text='' must be a non-empty string"),
    ],
)
def test_malformed_rows_of_mbpp_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "mbpp.jsonl", TWICE | change, TWICE)
    with pytest.raises(ValueError, match=rf"mbpp\.jsonl:1: {message}"):
        registry.read("mbpp", tmp_path)
    assert len(registry.read("mbpp", tmp_path, Malformed("skip"))) == 1


@runs_code
def test_functions_of_mbpp_are_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "mbpp.jsonl", TWICE)
    (prompt,) = registry.read("mbpp", tmp_path)
    right = "Here:\n```python\ndef twice(x):\n    return x + x\n\nassert twice(1) == 2\n```"
    assert score(prompt.truth, right) == 1
    assert score(prompt.truth, right.replace("x + x", "x * x")) == 0
    assert score(prompt.truth, "I cannot.") == 0


# -- programs --------------------------------------------------------------------------------------------------

STDIN = {
    "question_content": "Add up two numbers.",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "5 -7\n", "output": "-2", "testtype": "stdin"}]),
    "metadata": "{}",
}
METHOD = STDIN | {
    "question_content": "Reverse a list.",
    "starter_code": "class Solution:\n    def reverse(self, items: List[int]) -> List[int]:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]", "output": "[2, 1]", "testtype": "functional"}]),
    "private_test_cases": "",
    "metadata": json.dumps({"func_name": "reverse"}),
}


def packed(value: Any) -> str:
    """As the hub has private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_livecodebench_has_cases(tmp_path: Path) -> None:
    private = packed(STDIN["private_test_cases"])
    write_rows(tmp_path / "code_generation_lite" / "test.jsonl", STDIN | {"private_test_cases": private})
    write_rows(tmp_path / "code_generation_lite" / "test2.jsonl", METHOD)
    program, method = registry.read("livecodebench", tmp_path)
    assert program.truth == Cases((("1 2\n", "3\n"), ("5 -7\n", "-2")))
    assert program.category == "easy"
    assert "reads the input from standard input" in program.text
    assert method.truth == Cases((("[1, 2]", "[2, 1]"),), "reverse")
    assert "class Solution:" in method.text


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"private_test_cases": packed(Evil())}, r"private_test_cases must be .* \(it must hold a text, but needs"),
        ({"private_test_cases": "%%"}, "private_test_cases must be a list of tests as JSON"),
        ({"private_test_cases": packed("{")}, "private_test_cases must be a list of tests as JSON"),
        ({"public_test_cases": "[1]"}, "public_test_cases must be a list of tests"),
        ({"public_test_cases": "", "private_test_cases": ""}, "the tests must have at least one case"),
        ({"public_test_cases": '[{"input": 1, "output": "1"}]'}, "input=1 of a test must be a text"),
        ({"public_test_cases": '[{"input": "", "output": "", "testtype": "x"}]'}, r"testtype=\['stdin', 'x'\] must be"),
        ({**METHOD, "metadata": "{}"}, "metadata must name the method in func_name"),
    ],
)
def test_malformed_rows_of_livecodebench_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "livecodebench.jsonl", STDIN | change)
    with pytest.raises(ValueError, match=rf"livecodebench\.jsonl:1: {message}"):
        registry.read("livecodebench", tmp_path)


@runs_code
@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", True),
        ("import sys\na, b = map(int, sys.stdin.buffer.read().split())\nsys.stdout.write(str(a + b))", True),
        ("a, b = map(int, open(0).read().split())\nprint(a + b, '')\nexit()", True),
        (
            "def main():\n    print(float(sum(map(int, input().split()))))\nif __name__ == '__main__':\n    main()",
            True,
        ),
        ("print(3)", False),  # right in the first case only
        ("a, b = map(int, input().split())\nprint(a + b)\nprint(a + b)", False),
        ("a, b = map(int, input().split())\nprint(a + b)\nimport os\nos._exit(0)", False),
        ("while True:\n    pass", False),
        ("1 +", False),
    ],
)
def test_programs_are_run_on_every_input(code: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CASE_LIMITS", sandbox.Limits(cpu_s=2))
    cases = Cases((("1 2\n", "3\n"), ("5 -7\n", "-2")))
    assert score(cases, f"<think>```print(1)```</think>So:\n```python\n{code}\n```\nDone.") == passed


@runs_code
def test_methods_are_called_with_each_line() -> None:
    cases = Cases((("[1, 2]\n3", "[2, 1, 3]"), ("[]\n0", "[0]")), "extended")
    code = "class Solution:\n    def extended(self, items: List[int], last: int) -> List[int]:\n        {}"
    assert score(cases, code.format("return (*reversed(items), last)")) == 1  # tuples are lists, as in JSON
    assert score(cases, code.format("return [*items, last]")) == 0
    assert score(cases, code.format("return {last}")) == 0
    assert score(cases, "def extended(items, last):\n    return [last]") == 0


def test_lines_are_equal_as_texts_or_as_numbers() -> None:
    assert same("1 2.0 \n\n", "1.0 2")
    assert same("Yes\nno", " Yes\nno \n")
    assert not same("1 2", "1\n2")
    assert not same("yes", "Yes")
    assert not same("", "0")
    assert not same("1 x", "1.0 x")


def test_the_code_of_an_output() -> None:
    assert code_of("```python\na\n```\nor better\n```\nb\n```") == "b\n"
    assert code_of("a = 1\nprint(a)") == "a = 1\nprint(a)"
    assert code_of("<think>```\nx\n```</think>\n```py\ny\n```") == "y\n"


# -- conversations ---------------------------------------------------------------------------------------------


def test_messages_are_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write_rows(tmp_path / "mine.jsonl", {"messages": messages, "category": "x"}, {"prompt": "a"})
    first, second = registry.read(str(path), None)
    assert first == Prompt("Why?", "x", messages=(("system", "Be brief."), ("user", "Why?")))
    assert second == Prompt("a")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages=\[\] must be a list of messages"),
        ("Why?", "messages='Why.' must be a list of messages"),
        ([{"role": "user"}], "content=None must be a non-empty string"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "messages must end with the user's",
        ),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", {"messages": messages})
    with pytest.raises(ValueError, match=rf"mine\.jsonl:1: {message}"):
        registry.read(str(path), None)
