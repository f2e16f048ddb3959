"""What detects bugs of caches, recurrent states and routers: `python -m bench.tools.state_power`.

The mutants of windows, recurrent states and experts need targets that have them, so they are planted in small random
models: a Mistral whose prompts are longer than its window, a Qwen 3.5 whose layers alternate, and a Mixtral. Two tests
judge each: greedy outputs, which must equal those of the engine without the bug token for token, and an audit as in
`detection_power` at temperature 1. There are fewer slots than prompts, so that slots are refilled.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.tools import detection_power
from specdec import SamplingParams
from specdec.conformance.mutants import ROUTER_MUTANTS, STATE_MUTANTS, WINDOW_MUTANTS, maker
from specdec.conformance.mutants.planting import Plant
from specdec.conformance.mutants.proposals import prompt_lookup
from specdec.conformance.reference import Reference
from specdec.models.causal import CausalLM
from specdec.runtime.command_line import Parser
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens

GAMMA, SLOTS, NUM_PROMPTS = 3, 8, 16
WINDOW = 8  # tokens
SAMPLED = SamplingParams(ignore_eos=True)
GREEDY = replace(SAMPLED, temperature=0.0)
_SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": _SIZES | {"sliding_window": WINDOW},
    "qwen3_5_text": _SIZES
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "mixtral": _SIZES | {"num_local_experts": 4, "sliding_window": None},
}


LENGTHS = {  # tokens of a prompt and of an output
    "mistral": (150, 64),  # longer than a ring of this window, which has 136 columns
    "qwen3_5_text": (1, 8),  # what a slot kept of another sequence fades within some tokens
    "mixtral": (10, 64),
}


SOUND, LOOKUP = partial(maker), partial(maker, proposer=prompt_lookup)


@dataclass(frozen=True, slots=True)
class Case:
    """A mutant, or the engine without a bug, on a kind of target, with drafts of its own proposer."""

    name: str
    kind: str
    plant: Plant
    sound: Plant = SOUND


CASES = [
    Case("none", "mistral", SOUND),
    *(Case(name, "mistral", plant) for name, plant in WINDOW_MUTANTS.items()),
    Case("none", "qwen3_5_text", SOUND),
    *(Case(name, "qwen3_5_text", plant) for name, plant in STATE_MUTANTS.items()),
    Case("none", "mixtral", LOOKUP),
    *(Case(name, "mixtral", plant, LOOKUP) for name, plant in ROUTER_MUTANTS.items()),
]


@dataclass(frozen=True, slots=True)
class StateFinding:
    """What both tests find. num_greedy: prompts decoded greedily, of which num_different have other outputs."""

    kind: str
    num_greedy: int
    num_different: int
    audit: detection_power.Finding


def pair(kind: str) -> tuple[CausalLM, CausalLM]:
    """A random target whose outputs vary, and a draft that is it with noise added to its weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return CausalLM(model), CausalLM(draft)


def prompts(kind: str) -> list[tuple[int, ...]]:
    """Random tokens; the second half of each prompt repeats the first."""
    generator, length = torch.Generator().manual_seed(1), LENGTHS[kind][0]
    texts = torch.randint(3, _SIZES["vocab_size"], (NUM_PROMPTS, -(-length // 2)), generator=generator).tolist()
    return [(*text, *text)[:length] for text in texts]


def judge(case: Case, num_draws: int) -> StateFinding:
    """Judge one case by both tests."""
    models, texts = pair(case.kind), prompts(case.kind)
    sampled, greedy = (replace(each, max_tokens=LENGTHS[case.kind][1]) for each in (SAMPLED, GREEDY))
    broken, sound = (plant(*models, GAMMA)(uniforms, verify_tokens, SLOTS) for plant in (case.plant, case.sound))
    outputs = [
        [row.output for row in detection_power.generate(each, texts, range(NUM_PROMPTS), Reference(models[0], greedy))]
        for each in (broken, sound)
    ]
    references = [Reference(model, sampled) for model in models]
    return StateFinding(
        kind=case.kind,
        num_greedy=NUM_PROMPTS,
        num_different=sum(one != other for one, other in zip(*outputs, strict=True)),
        audit=detection_power.judge(case.name, broken, references, texts, num_draws),
    )


def findings(num_draws: int, names: list[str] | None = None) -> Iterator[StateFinding]:
    """What is found of each case, or of those with these names."""
    for case in CASES:
        if not names or case.name in names:
            yield judge(case, num_draws)


HEAD = (
    "| mutant | target | greedy outputs that differ | audit: found by, tokens | tokens judged |\n|---|---|---|---|---|"
)


def line(found: StateFinding) -> str:
    """A row of the table, in Markdown."""
    audit = found.audit
    greedy = f"{found.num_different} of {found.num_greedy}"
    return f"| {audit.mutant} | {found.kind} | {greedy} | {detection_power.detected(audit)} | {audit.num_draws} |"


def main() -> None:
    parser = Parser(prog="python -m bench.tools.state_power", description=__doc__)
    parser.add_argument("--num-draws", type=int, default=20_000, help="tokens of each mutant at the most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, too")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="may be repeated")
    given = parser.parse_args()
    print(HEAD, flush=True)
    found = []
    for each in findings(given.num_draws, given.only):
        found.append(asdict(each))
        print(line(each), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
