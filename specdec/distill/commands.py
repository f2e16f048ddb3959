"""The steps of `python -m specdec.distill`, each a function of the parsed options."""

from __future__ import annotations

import json
import platform
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from specdec.assembly import tree_costs
from specdec.distill import corpus, dataset, prompts, sources
from specdec.distill.dataset import Dataset
from specdec.distill.evaluation.calibration import measure_calibration
from specdec.distill.evaluation.comparison import compare
from specdec.distill.evaluation.convention import measure_convention
from specdec.distill.evaluation.cost import draft_cost_ratio
from specdec.distill.evaluation.tree import count
from specdec.distill.heads import train_head, usual_layers
from specdec.distill.runs import (
    FREQUENT,
    about,
    asked_for,
    largest,
    machine,
    prepare,
    print_result,
    train,
)
from specdec.distill.server import ServerAnswers
from specdec.distill.students import DraftStudent, HeadGuesser
from specdec.drafts import RATES_FILE, is_head, kind_of, load_with_drafts
from specdec.engine import Engine
from specdec.heads.eagle import load_head
from specdec.methods import packaged_draft
from specdec.models.files.derived import materialize, save_derived
from specdec.models.files.saving import write_config
from specdec.models.loading import load_pretrained, read_vocabulary
from specdec.prompts import encode
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.table import NgramTable
from specdec.runtime.artifacts import LoadError as LoadError
from specdec.trees.optimal import expected_accepted, fastest_tree, optimal_tree
from specdec.trees.shape import Tree

DRAFT_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def make_corpus(options: Namespace) -> None:
    """Generate the corpus: let the target answer prompts."""
    kinds = sources.parse_counts(options.kinds)
    answers, tokenizer = _answers(options)
    dialogues = prompts.read_dialogues(options.prompts)
    texts, left_out = corpus.plan_texts(
        dialogues,
        tokenizer,
        num_prompts=options.num_prompts,
        num_replies=options.num_replies,
        num_about_texts=options.num_about_texts,
        kinds=kinds,
        temperatures=options.temperatures,
        max_tokens=options.max_tokens,
        seed=options.seed,
        excluded=prompts.EvaluationText(options.evaluation),
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus.write_texts(texts, answers, options.folder / "texts.jsonl", max_tokens=options.max_tokens)
    made = list(corpus.read_texts(options.folder / "texts.jsonl"))
    corpus.write_held_out(made, tokenizer, options.folder / "held_out.jsonl")
    facts = (
        asked_for(options)
        | {"evaluation": [path.name for path in options.evaluation]}
        | {"licences": {name: sources.LICENCES[name] for name in kinds}, "python": platform.python_version()}
        | {"dialogues": len(dialogues), "texts": len(texts), "left_out": left_out}
        | machine()
    )
    (options.folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    num_tokens = sum(len(text.output) for text in made)
    print(f"corpus: {len(made)} texts with {num_tokens} tokens of output in {options.folder}; next: score")


def _answers(options: Namespace) -> tuple[corpus.Answers, Any]:
    """The target, here or served, and its tokenizer."""
    if options.url is None:
        if options.model is not None:
            raise ValueError(f"model={options.model!r} must go with --url, the server that has it; leave it out")
        engine = Engine.load(options.target, device=options.device, max_batch_size=options.batch_size)
        return corpus.EngineAnswers(engine), engine.target.tokenizer
    found, model = read_vocabulary(options.target), options.model or options.target
    return ServerAnswers(options.url, model, found.tokenizer, found.vocab_size, options.batch_size), found.tokenizer


def score(options: Namespace) -> None:
    """Run the target over the corpus and store its features."""
    model, _ = load_pretrained(options.target, dtype=torch.bfloat16, device=options.device)
    texts = list(corpus.read_texts(options.folder / "texts.jsonl"))
    layers = usual_layers(model) if options.layers == [] else options.layers or []
    dataset.score(texts, model, options.folder, layers=layers)
    also = f" and states of layers {', '.join(map(str, layers))}" if layers else ""
    print(f"score: features{also} of {len(texts)} texts in {options.folder}; next: head, draft or table")


def train_draft(options: Namespace) -> None:
    """Train a draft model (method draft_model).

    `out` is an ordinary model, `out`/derived the same without embeddings.
    """
    model, tokenizer, data, counts = prepare(options)
    names = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(model.config, name) for name in names}
    config = LlamaConfig(**shared, **DRAFT_SHAPE, tie_word_embeddings=False, attn_implementation="sdpa")
    cost_ratio = options.cost_ratio or draft_cost_ratio(options.target, config, options.device)
    student = DraftStudent(config, model, largest(counts, FREQUENT))
    best = train(student, data, options, cost_ratio)
    if best is None:
        return
    save_derived(options.out / "derived", config, student.module.state_dict(), model, about(options) | best)
    materialize(options.out / "derived", model, tokenizer, options.out)
    print_result("draft", best, options)


def count_table(options: Namespace) -> None:
    """Count an n-gram table (method ngram_table)."""
    texts = list(corpus.read_texts(options.folder / "texts.jsonl"))
    unseen = set(corpus.held_out(texts))
    spoken = [text.output for i, text in enumerate(texts) if i not in unseen and text.temperature is not None]
    vocab_size = read_vocabulary(options.target).vocab_size
    table = NgramTable.count(spoken, vocab_size, max_ngram=options.max_ngram, min_count=options.min_count)
    write_config(options.out, {"vocab_size": vocab_size, "specdec": about(options)})
    table.save(options.out / "table.safetensors")
    shutil.copymode(options.out / "config.json", options.out / "table.safetensors")
    print(f"table: counted from {len(spoken)} texts, in {options.out}")


def compare_with_lookup(options: Namespace) -> None:
    """Compare prompt lookup with a head, by the length of the match."""
    model, _ = load_pretrained(options.target, dtype=torch.bfloat16, device=options.device)
    guesser = HeadGuesser(load_head(str(options.head), model), model)
    data = Dataset(options.folder)
    print("text     match  positions  accepted of 1: lookup  head  accepted of 4: lookup  head")
    for name, temperature in (("greedy", 0.0), ("T = 1", 1.0)):
        for row in compare(guesser, data, temperature):
            numbers = (row.lookup[0], row.draft[0], row.lookup[1], row.draft[1])
            print(f"{name:8} {row.match:5} {row.positions:10}", *(f"{number:12.3f}" for number in numbers))


def best_tree(options: Namespace) -> None:
    """Measure acceptance rates of a draft's siblings and write the best tree (method tree)."""
    source = options.draft or packaged_draft(options.target, "tree")
    if source is None:
        raise ValueError(
            f"draft={options.draft!r} must be given: no draft is packaged with {options.target!r}; use --draft"
        )
    loading = {"dtype": torch.bfloat16, "device": options.device, "load_format": "auto", "attention": "sdpa"}
    target, drafts = load_with_drafts(options.target, [source], **loading)
    draft: Any = drafts[source]
    tree = Tree.balanced(options.widths)
    proposer = (EagleProposer if is_head(kind_of(draft)) else DraftModelProposer)(draft, tree=tree)
    asked = [
        encode(each.prompt, target.tokenizer) for each in prompts.read_dialogues(options.prompts)[: options.num_prompts]
    ]
    sizes = {"max_tokens": options.max_tokens, "batch_size": options.batch_size, "seed": options.seed}
    counts = count(target, proposer, asked, tree, options.temperatures, **sizes)
    acceptance, (step_s, level_s) = counts.acceptance(), tree_costs(target, draft)
    level_cost = level_s / step_s[0]
    options_used = Namespace(**vars(options) | {"draft": Path(source).name, "prompts": Path(options.prompts).name})
    recorded = about(options_used)
    rounded = [[round(rate, 4) for rate in rates] for rates in acceptance]
    facts = {"acceptance": rounded, "level_cost": round(level_cost, 4), "tried": counts.tried} | recorded
    options.out.mkdir(parents=True, exist_ok=True)
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
    (options.out / RATES_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for level, (rates, tried) in enumerate(zip(acceptance, counts.tried, strict=False), 1):
        print(f"level {level}, {tried[0]:6} samples:", *(f"{rate:6.3f}" for rate in rates))
    best = fastest_tree(acceptance, step_s, level_s)
    print(f"a level costs {level_cost:.3f} steps; " + _described("best at these costs", best, acceptance))
    if options.nodes:
        best = optimal_tree(acceptance, options.nodes, level_cost)
        print(_described("requested", best, acceptance))
    if best:
        best.save(options.out / "tree.json", **recorded)


def _described(name: str, tree: Tree | None, acceptance: list[list[float]]) -> str:
    if tree is None:
        return f"{name}: no tree, plain decoding is faster"
    tokens = 1 + expected_accepted(tree, acceptance)
    return f"{name}: {len(tree)} nodes in levels of {', '.join(map(str, tree.widths))}, {tokens:.2f} tokens per step"


VERBS: dict[str, Callable[[Namespace], None]] = {
    "corpus": make_corpus,
    "score": score,
    "head": train_head,
    "draft": train_draft,
    "table": count_table,
    "compare": compare_with_lookup,
    "tree": best_tree,
    "convention": measure_convention,
    "calibration": measure_calibration,
}
