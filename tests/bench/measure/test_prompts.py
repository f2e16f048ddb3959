"""Prompts of a run: reading, encoding, and the selection for each cell."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.campaign.plan import plan
from bench.catalogue.pairs import Pair
from bench.engines.base import PromptResult, Run, Setup
from bench.measure.context import Context
from bench.measure.models import Models
from bench.measure.prompts import Prompts
from bench.measure.quality import sandbox
from bench.records.schema import Cell
from bench.workloads.base import bucket

DATA = Path(__file__).parents[1] / "data"
RANDOM = Pair("p", "t", load_format="dummy")  # whose prompts are bytes without a tokenizer


def test_a_quality_score_needs_a_tokenizer(make_config: Callable[..., BenchConfig]) -> None:
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "humaneval", 1)
    with pytest.raises(pytest.fail.Exception, match="pair=p must have a tokenizer to read prompts; name a target with"):
        Prompts(config).chosen(cell, Pair("p", "t"), None)


def test_lengths_are_counted_in_tokens(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join("x" * length + "\n" for length in range(1, 21)))
    config = make_config(workloads=(str(path),), prompt_lengths=((5, 8),), num_prompts=4)
    prompts = Prompts(config)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "mine", 1)
    chosen = prompts.chosen(cell, RANDOM, None)
    assert sorted(len(tokens) for _, tokens in chosen) == [5, 6, 7, 8]
    assert [bytes(tokens).decode() for _, tokens in chosen] == [prompt.text for prompt, _ in chosen]
    narrow = Prompts(make_config(workloads=(str(path),), prompt_lengths=((5, 6),), num_prompts=4))
    with pytest.raises(
        pytest.fail.Exception, match=r"prompt_lengths=5:6 must hold for at least num_prompts=4 .* for 2"
    ):
        narrow.chosen(cell, RANDOM, None)


def test_each_bucket_of_lengths_is_a_cell_with_its_own_prompts(
    make_config: Callable[..., BenchConfig], tmp_path: Path
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join("x" * length + "\n" for length in range(1, 21)))
    config = make_config(
        engines=("specdec",),
        methods=("autoregressive",),
        workloads=(str(path),),
        prompt_lengths=((3, 5), (9, 12)),
        num_prompts=3,
    )
    prompts = Prompts(config)
    cells = [each.cell for each in plan(config)]
    assert [cell.workload for cell in cells] == ["mine@3:5", "mine@9:12"]
    lengths = [[len(tokens) for _, tokens in prompts.chosen(cell, RANDOM, None)] for cell in cells]
    assert sorted(lengths[0]) == [3, 4, 5]
    assert len(set(lengths[1]) & {9, 10, 11, 12}) == 3
    assert bucket("a@b@3:5", config.prompt_lengths) == ("a@b", (3, 5))
    assert bucket("a@3:5", ((1, 2),)) == ("a@3:5", (1, 2))


def test_raw_prompts_are_texts_to_go_on_with(make_config: Callable[..., BenchConfig]) -> None:
    config = make_config(workloads=("humaneval",), data_dir=DATA, prompt_format="raw", num_prompts=2)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "humaneval", 1)
    for prompt, tokens in Prompts(config).chosen(cell, RANDOM, None):
        assert bytes(tokens).decode() == prompt.raw == prompt.truth.head
    asked = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, named=frozenset({"prompt_format"}))
    with pytest.raises(
        pytest.fail.Exception, match="prompt_format=instruct must have a tokenizer with a chat template"
    ):
        Prompts(asked).chosen(cell, RANDOM, None)


class Chat:
    """A tokenizer of bytes, whose template shows every message and whether it thinks."""

    def __init__(self, *, thinks: bool = True) -> None:
        self.chat_template, self._thinks = "a template", thinks

    def apply_chat_template(self, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
        assert arguments.pop("add_generation_prompt") is True
        assert arguments.pop("return_dict") is False
        shown = "".join(f"{each['role'][0]}:{each['content']};" for each in messages)
        thinking = str(arguments.get("enable_thinking", "")) if self._thinks else ""
        return list(f"{shown}{thinking}{arguments.get('effort', '')}".encode())


def test_later_turns_follow_the_answers_of_the_target(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    rows = [{"category": "writing", "turns": ["Q1", "Q2", "Q3"]}, {"category": "qa", "turns": ["one"]}]
    (tmp_path / "mt_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[bytes] = []

    def answer(tokens: tuple[int, ...]) -> str:
        asked.append(bytes(tokens))
        return f"A{len(asked)}"

    config = make_config(workloads=("mt_bench",), data_dir=tmp_path, num_prompts=2, turns="all")
    prompts, cell = Prompts(config), Cell("specdec", "p", "autoregressive", 0, "same", "mt_bench", 1)
    chosen = prompts.chosen(cell, RANDOM, Chat(), answer)
    found = {bytes(tokens).decode(): (prompt.turn, prompt.category) for prompt, tokens in chosen}
    assert found == {
        "u:one;": (1, "qa"),
        "u:Q1;": (1, "writing"),
        "u:Q1;a:A1;u:Q2;": (2, "writing"),
        "u:Q1;a:A1;u:Q2;a:A2;u:Q3;": (3, "writing"),
    }
    assert asked == [b"u:Q1;", b"u:Q1;a:A1;u:Q2;"]  # each conversation is answered once
    assert prompts.chosen(cell, RANDOM, Chat(), answer) == chosen
    assert len(asked) == 2  # also for other cells
    with pytest.raises(pytest.fail.Exception, match="turns=all must have a chat template and prompt_format=instruct"):
        prompts.chosen(cell, RANDOM, None, answer)
    first = Prompts(make_config(workloads=("mt_bench",), data_dir=tmp_path, num_prompts=2))
    assert {prompt.text for prompt, _ in first.chosen(cell, RANDOM, Chat())} == {"Q1", "one"}
    assert first.sha256() != prompts.sha256()


@pytest.mark.parametrize("workload", ["random_128", "shared_prefix_128"])
def test_random_prompts_have_their_length_and_no_special_tokens(
    workload: str, make_config: Callable[..., BenchConfig]
) -> None:
    class Vocabulary:
        all_special_ids = (0, 299)

        def __len__(self) -> int:
            return 300

    config = make_config(workloads=(workload,), num_prompts=1024)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", workload, 1)
    chosen = Prompts(config).chosen(cell, RANDOM, Vocabulary())
    assert {len(tokens) for _, tokens in chosen} == {128}
    assert {token for _, tokens in chosen for token in tokens} == set(range(1, 299))
    assert len({tokens for _, tokens in chosen}) == 1024
    prefixes = Counter(tokens[:64] for _, tokens in chosen)
    assert set(prefixes.values()) == ({8} if workload == "shared_prefix_128" else {1})
    assert Prompts(config).chosen(cell, RANDOM, Vocabulary()) == chosen
    ((_, tokens),) = Prompts(make_config(workloads=(workload,), num_prompts=1)).chosen(cell, RANDOM, None)
    assert max(tokens) < 256


def test_the_chat_template_has_its_variables(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Why?\n")
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "mine", 1)

    def text(chat: Chat, **changes: Any) -> str:
        config = make_config(workloads=(str(path),), num_prompts=1, **changes)
        ((_, tokens),) = Prompts(config).chosen(cell, RANDOM, chat)
        return bytes(tokens).decode()

    assert text(Chat()) == "u:Why?;"
    assert text(Chat(), thinking="on") == "u:Why?;True"
    assert text(Chat(), thinking="off", chat_template_arguments='{"effort": "high"}') == "u:Why?;Falsehigh"
    with pytest.raises(pytest.fail.Exception, match="thinking=off must be known to the chat template, but"):
        text(Chat(thinks=False), thinking="off")


def test_messages_go_through_the_chat_template(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    path, cell = tmp_path / "mine.jsonl", Cell("specdec", "p", "autoregressive", 0, "same", "mine", 1)
    roles = {"system": "Be brief.", "user": "Why?", "assistant": "So.", "tool": "42"}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    path.write_text(json.dumps({"messages": messages}))

    def text(chat: Chat, **changes: Any) -> str:
        config = make_config(workloads=(str(path),), num_prompts=1, **changes)
        ((_, tokens),) = Prompts(config).chosen(cell, RANDOM, chat)
        return bytes(tokens).decode()

    assert text(Chat()) == "s:Be brief.;u:Why?;a:So.;t:42;"
    assert text(Chat(), thinking="on", chat_template_arguments='{"effort": "low"}').endswith(";Truelow")
    with pytest.raises(pytest.fail.Exception, match="thinking=on must be known to the chat template, but"):
        text(Chat(thinks=False), thinking="on")
    with pytest.raises(pytest.fail.Exception, match="messages must have a chat template and prompt_format=instruct"):
        text(Chat(), prompt_format="raw")
    before = Prompts(make_config(workloads=(str(path),), num_prompts=1)).sha256()
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "Be long."}, *messages[1:]]}))
    assert Prompts(make_config(workloads=(str(path),), num_prompts=1)).sha256() != before


def test_the_reference_engine_answers_by_plain_decoding(make_config: Callable[..., BenchConfig]) -> None:
    calls: list[Any] = []

    class Engine:
        tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: f"{tokens} {skip_special_tokens}")

        def prepare(self, setups: Any) -> None:
            calls.append(setups)

        def generate(self, prompts: Any, method: str, gamma: int, sampling: Any) -> Run:
            calls.append((prompts, method, gamma, sampling[0].max_tokens))
            return Run((PromptResult((7, 8), 0.1, 0.2, None, "length"),))

    config = make_config(max_tokens=8)
    context = Context(config, "cpu", Models(config, "cpu"), Prompts(config), io.StringIO())
    assert context._answer(Engine(), (1, 2)) == "(7, 8) True"  # type: ignore[arg-type]
    assert calls == [[Setup("autoregressive", 0, 1)], ([(1, 2)], "autoregressive", 0, 8)]


def test_a_machine_that_cannot_shut_code_in_refuses(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "why_not", lambda: "unshare: Operation not permitted")
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, allow_code_execution=True)
    with pytest.raises(ValueError, match="allow_code_execution=1 must have a working sandbox, but unshare: Oper"):
        Prompts(config)
    Prompts(make_config(workloads=("gsm8k",), data_dir=DATA, num_prompts=2, allow_code_execution=True))
