"""From a target to drafts that the engine takes, by the command line alone."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers import checkpoints

from specdec import Engine, SamplingParams
from specdec.distill.__main__ import main

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def work(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, its features, and a head, a draft and a table made from them."""
    folder = tmp_path_factory.mktemp("work")
    rows = [{"prompt": f"What is {n} plus {n}?", "reply": f"It is {2 * n}."} for n in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--target", str(target_folder), "--folder", str(folder)]
    counts = ["--num-prompts", "45", "--num-replies", "5", "--max-tokens", "16"]
    steps = ["--steps", "3", "--tokens-per-batch", "500"]
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["corpus", *common, "--prompts", str(folder / "prompts.jsonl"), *counts]) == 0
        assert main(["score", *common]) == 0
        assert main(["head", *common, "--out", str(folder / "head"), "--vocabulary", "300", *steps]) == 0
        assert main(["draft", *common, "--out", str(folder / "draft"), *steps]) == 0
        assert main(["table", *common, "--out", str(folder / "table")]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def test_each_step_prints_a_line_of_result(work: Path) -> None:
    printed = (work / "printed.txt").read_text().splitlines()
    lines = [line for line in printed if not line.startswith("{")]  # what training has seen so far
    assert [line.split(":")[0] for line in lines] == ["corpus", "score", "head", "draft", "table"]
    assert lines[0].startswith("corpus: 50 texts with ")
    assert "held-out texts at the best step: step=3" in lines[2]


def test_the_corpus_records_its_settings(work: Path) -> None:
    facts = json.loads((work / "corpus.json").read_text())
    assert (facts["texts"], facts["num_prompts"], facts["seed"]) == (50, 45, 0)
    assert facts["left_out"] == {"overlapping": 0, "not_ascii": 0, "too_long": 0}
    held_out = (work / "held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 2
    assert all(json.loads(line)["prompt"].startswith("What is ") for line in held_out)
    assert not any(str(work) in str(value) for key, value in facts.items() if key != "prompts")


@pytest.mark.parametrize(
    ("method", "draft"), [("eagle", "head"), ("draft_model", "draft"), ("ngram_table", "table"), ("hybrid", "head")]
)
def test_the_engine_loads_the_result(work: Path, target_folder: Path, method: str, draft: str) -> None:
    place = {"dtype": torch.float32}
    plain = Engine.load(str(target_folder), **place).generate(["What is 7 plus 7?"], GREEDY)
    engine = Engine.load(str(target_folder), draft=str(work / draft), method=method, **place)
    completion = engine.generate(["What is 7 plus 7?"], GREEDY)[0]
    assert completion.token_ids == plain[0].token_ids
    assert completion.counts.num_drafted > 0 or method == "ngram_table"  # which may not predict a random model


def test_a_head_for_another_target_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match=r"hidden_size=32 of the head .* must be the target's, 576; give the model"):
        Engine.load("smollm2-135m", draft=str(work / "head"), method="eagle")


def test_a_head_for_other_weights_is_refused(work: Path, target_folder: Path, tmp_path: Path) -> None:
    from specdec.models.loading import load_pretrained

    model, tokenizer = load_pretrained(str(target_folder), dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"recorded in the head .* must be that of the target's weights"):
        Engine.load(str(tmp_path), draft=str(work / "head"), method="eagle")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "draft_vocabulary.json"])
def test_a_damaged_head_is_reported(work: Path, target_folder: Path, tmp_path: Path, file: str) -> None:
    import shutil

    from specdec.runtime.artifacts import LoadError

    head = shutil.copytree(work / "head", tmp_path / "head", ignore=shutil.ignore_patterns("training"))
    (head / file).write_bytes((head / file).read_bytes()[:-30])
    with pytest.raises(LoadError, match="must be a folder with an undamaged head"):
        Engine.load(str(target_folder), draft=str(head), method="eagle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "--prompts", "missing.jsonl"], "missing.jsonl"),
        (["score"], "texts.jsonl"),
        (["head", "--out", "x"], "texts.json"),
    ],
)
def test_missing_items_are_named(arguments, message, target_folder: Path, tmp_path: Path, capsys) -> None:
    code = main([arguments[0], "--target", str(target_folder), "--folder", str(tmp_path), *arguments[1:]])
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_when_to_copy_is_printed(work: Path, target_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--target", str(target_folder), "--folder", str(work)]
    assert main(["compare", *common, "--head", str(work / "head")]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("text     match  positions")
    assert rows
    assert all(row.startswith(("greedy", "T = 1")) for row in rows)


def test_the_convention_of_a_head_is_measured(
    target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n} plus {n}?", "reply": ""} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocab_size = json.loads((target_folder / "config.json").read_text())["vocab_size"]
    head = checkpoints.eagle(has_embedding=False).with_config(vocab_size=vocab_size).write(tmp_path / "head")
    given = ["--target", str(target_folder), "--prompts", str(tmp_path / "prompts.jsonl"), "--dtype", "float32"]
    sizes = ["--num-prompts", "4", "--max-tokens", "12"]
    assert main(["convention", *given, *sizes, "--draft", str(head)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("EAGLE head (SafeAILab), 1 layer, ")
    assert lines[1].split() == ["feature", "layers", "accepted", "per", "draft"]
    assert {line.split()[0] for line in lines[2:4]} == {"final", "2"}
    assert lines[4].startswith("The head ")
    assert (head / "convention.json").exists() == lines[-1].startswith("stored in ")
    assert main(["convention", *given, *sizes, "--draft", str(target_folder)]) == 2
    assert "must be a folder or hub id with a head" in capsys.readouterr().err
