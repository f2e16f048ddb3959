"""Measuring which convention a head was trained with, on texts that its target generates."""

from __future__ import annotations

from argparse import Namespace

from specdec.distill import prompts
from specdec.drafts import find
from specdec.engine import Engine
from specdec.heads.convention import Text, measure, store, table, verdict
from specdec.models.causal import CausalLM
from specdec.models.loading import as_dtype, load_pretrained
from specdec.prompts import encode
from specdec.sampling_params import SamplingParams


def measure_convention(options: Namespace) -> None:
    """Measure which convention a head was trained with, and store it for the next load.

    Raises ValueError for a draft that is no head, or whose checkpoint leaves nothing open.
    """
    head = find(options.draft, allow_pickle=options.allow_pickle).head
    if head is None:
        raise ValueError(f"draft={options.draft!r} must be a folder or hub id with a head; see docs/heads.md")
    model, tokenizer = load_pretrained(options.target, dtype=as_dtype(options.dtype), device=options.device)
    loaded = head.load(model)
    print(head.described(loaded))
    if not loaded.choices():
        raise ValueError(f"draft={options.draft!r} leaves nothing open to measure; use it as it is")
    target = CausalLM(model, tokenizer)
    measured = measure(target, loaded, _texts(target, options))
    found = verdict(measured)
    print(table(measured, found))
    if found.is_own:
        return
    print(f"stored in {store(head.folder.path, model, found)}; the head is read so from now on")


def _texts(target: CausalLM, options: Namespace) -> list[Text]:
    """Texts that the target samples at temperature 1, so that its own distribution is what the head is measured by."""
    asked = [encode(each.prompt, target.tokenizer) for each in prompts.read_dialogues(options.prompts)]
    fitting = [each for each in asked if len(each) + options.max_tokens <= target.context_length]
    engine = Engine(target, max_batch_size=options.batch_size)
    sampling = SamplingParams(temperature=1, max_tokens=options.max_tokens, seed=options.seed)
    answers = engine.generate(fitting[: options.num_prompts], sampling)
    return [Text([*each.prompt_token_ids, *each.token_ids], len(each.prompt_token_ids)) for each in answers]
