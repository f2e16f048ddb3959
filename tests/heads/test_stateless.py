"""Medusa, Hydra and MLP speculator: forward passes as published, exact distributions, and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, silu

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import Each, exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import FeatureTarget, grid_pair, joint_distribution, table
from specdec.decoding import Decoder
from specdec.drafts import kind_in
from specdec.heads import formats
from specdec.heads.medusa import HydraHead, MedusaHead, ResidualBlock
from specdec.heads.mlp_speculator import MlpSpeculator
from specdec.models.causal import CausalLM
from specdec.proposers.heads.stateless import StatelessProposer
from specdec.requests import Request
from specdec.runtime.artifacts import LoadError
from specdec.sampling.randomness import uniforms
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree
from specdec.verification import verify_block, verify_coupled, verify_tokens

HIDDEN, VOCAB, PLACES = tiny.GQA["hidden_size"], tiny.GQA["vocab_size"], 3
Weights = dict[str, Tensor]


def write(folder: Path, config: dict, weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


# ---- checkpoints as published, and what they compute


def medusa_original(num_blocks: int = 2) -> Weights:
    weights = {}
    for place in range(PLACES):
        for block in range(num_blocks):
            weights[f"{place}.{block}.linear.weight"] = random(HIDDEN, HIDDEN)
            weights[f"{place}.{block}.linear.bias"] = random(HIDDEN)
        weights[f"{place}.{num_blocks}.weight"] = random(VOCAB, HIDDEN)
    return weights


def medusa_vllm(*, has_map: bool = True) -> Weights:
    weights = {f"blocks.{place}.layers.0.weight": random(HIDDEN, HIDDEN) for place in range(PLACES)}
    tokens = torch.tensor([7, 3, 60, 5, 21])  # not ascending
    rows = len(tokens) if has_map else VOCAB
    weights |= {f"lm_heads.{place}.weight": random(rows, HIDDEN) for place in range(PLACES)}
    return weights | ({"token_map": tokens} if has_map else {})


def medusa_reference(weights: Weights, model, hidden: Tensor, text: list[int], place: int) -> dict[int, float]:
    if "0.0.linear.weight" in weights:
        for block in range(2):
            linear = f"{place}.{block}.linear"
            hidden = hidden + silu(weights[f"{linear}.weight"] @ hidden + weights[f"{linear}.bias"])
        logits, tokens = weights[f"{place}.2.weight"] @ hidden, range(VOCAB)
    else:
        hidden = hidden + silu(weights[f"blocks.{place}.layers.0.weight"] @ hidden)
        logits = weights[f"lm_heads.{place}.weight"] @ hidden
        tokens = weights["token_map"].tolist() if "token_map" in weights else range(VOCAB)
    return dict(zip(tokens, logits.tolist(), strict=True))


def hydra(num_blocks: int = 2) -> Weights:
    weights = {}
    for place in range(PLACES):
        for block in range(num_blocks):
            width = (place + 2) * HIDDEN if block == 0 else HIDDEN
            for name in ["linear", *(["res_connection"] if block == 0 else [])]:
                weights[f"hydra_mlp.{place}.{block}.{name}.weight"] = random(HIDDEN, width)
                weights[f"hydra_mlp.{place}.{block}.{name}.bias"] = random(HIDDEN)
        weights[f"hydra_lm_head.{place}.weight"] = random(VOCAB, HIDDEN)
    return weights


def hydra_reference(weights: Weights, model, hidden: Tensor, text: list[int], place: int) -> dict[int, float]:
    """text: the newest token and the draft tokens before `place`."""
    embeddings = model.get_input_embeddings().weight
    x = torch.cat([hidden, *(embeddings[token] for token in text)])
    for block in range(2):
        names = [f"hydra_mlp.{place}.{block}.{name}" for name in ("linear", "res_connection")]
        linear, kept = (
            weights[f"{name}.weight"] @ x + weights[f"{name}.bias"] if f"{name}.weight" in weights else x
            for name in names
        )
        x = kept + silu(linear)
    return dict(enumerate((weights[f"hydra_lm_head.{place}.weight"] @ x).tolist()))


INNER = 24


def speculator(*, is_tied: bool = False, prefix: str = "speculator.") -> Weights:
    weights = {}
    for place in range(PLACES):
        source = min(place, 0 if is_tied else place)
        weights[f"{prefix}emb.{place}.weight"] = weights.get(f"{prefix}emb.{source}.weight", random(VOCAB, INNER))
        weights[f"{prefix}proj.{place}.weight"] = random(INNER, INNER if place else HIDDEN)
        weights[f"{prefix}head.{place}.weight"] = random(VOCAB, INNER)
        weights[f"{prefix}ln.{place}.weight"], weights[f"{prefix}ln.{place}.bias"] = (
            torch.rand(INNER) + 0.5,
            random(INNER),
        )
        if is_tied:
            for name in ["emb", "head", "ln", *(["proj"] if place > 1 else [])]:
                first = 1 if name == "proj" else 0
                for part in ("weight", "bias"):
                    if f"{prefix}{name}.{first}.{part}" in weights:
                        weights[f"{prefix}{name}.{place}.{part}"] = weights[f"{prefix}{name}.{first}.{part}"].clone()
    return weights


def speculator_reference(
    weights: Weights, model, hidden: Tensor, text: list[int], place: int, *, scales_input: bool = False
) -> dict[int, float]:
    weights = {name.removeprefix("speculator."): value for name, value in weights.items()}
    state_weight = 0.5 ** (0.5 / PLACES)
    token_weight = math.sqrt((1 - state_weight**2) * (INNER / 2))
    state = hidden / (hidden.pow(2).mean() + 1e-6).sqrt() / math.sqrt(2) if scales_input else hidden
    for i, token in enumerate(text):
        state = weights[f"proj.{i}.weight"] @ state * state_weight + weights[f"emb.{i}.weight"][token] * token_weight
        state = state / (state.pow(2).mean() + 1e-6).sqrt() * weights[f"ln.{i}.weight"] + weights[f"ln.{i}.bias"]
        state = gelu(state)
    return dict(enumerate((weights[f"head.{place}.weight"] @ state).tolist()))


SPECULATOR = {"n_predict": PLACES, "inner_dim": INNER, "emb_dim": HIDDEN, "vocab_size": VOCAB}


@dataclass(frozen=True)
class Case:
    kind: str
    config: dict
    make: object
    reference: object


CASES = {
    "medusa, original": Case("medusa", {"medusa_num_heads": PLACES}, medusa_original, medusa_reference),
    "medusa, vLLM, token map": Case("medusa", {"model_type": "medusa"}, medusa_vllm, medusa_reference),
    "medusa, vLLM": Case("medusa", {}, partial(medusa_vllm, has_map=False), medusa_reference),
    "hydra": Case("hydra", {"hydra_head_arch": "mlp", "grounded_heads": True}, hydra, hydra_reference),
    "speculator": Case("mlp_speculator", SPECULATOR, speculator, speculator_reference),
    "speculator, tied": Case(
        "mlp_speculator", SPECULATOR | {"tie_weights": True}, partial(speculator, is_tied=True), speculator_reference
    ),
    "speculator, scaled input": Case(
        "mlp_speculator",
        SPECULATOR | {"scale_input": True},
        partial(speculator, prefix=""),
        partial(speculator_reference, scales_input=True),
    ),
}


@pytest.fixture(scope="module")
def model():
    return tiny.make("llama", tiny.GQA)


def load(folder: Path, model):
    found = formats.recognized(folder)
    assert found
    return found.load(model)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_computes_the_definition_of_its_format(name: str, model, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    weights = case.make()
    folder = write(tmp_path, case.config, weights)
    assert kind_in(str(folder)) == case.kind
    head = load(folder, model)
    assert (head.format, head.drafting, head.max_tokens) == (case.kind, "stateless", PLACES)
    head.fuse()
    hidden, text = torch.randn(HIDDEN), [11, 4, 29]
    states = head.start(hidden.view(1, 1, -1))
    for place in range(PLACES):
        states = head.advance(place, states, torch.tensor([[text[place]]]))
        logits = dict(zip(head.draft_vocabulary.tolist(), head.logits(place, states)[0, 0].tolist(), strict=True))
        expected = case.reference(weights, model, hidden, text[: place + 1], place)
        assert logits == pytest.approx(expected, abs=1e-5)


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(model) -> list[tuple[int, ...]]:
    """The target's outputs without speculation."""
    return [each.token_ids for each in Engine(CausalLM(model), max_batch_size=3).generate(tiny.PROMPTS, GREEDY)]


@pytest.mark.parametrize("method", ["own", "hybrid", "tree", "auto"])
@pytest.mark.parametrize("name", ["medusa, vLLM, token map", "hydra", "speculator, tied"])
def test_greedy_equals_plain_decoding(
    name: str, method: str, model, plain: list[tuple[int, ...]], tmp_path: Path
) -> None:
    case = CASES[name]
    torch.manual_seed(2)
    head = load(write(tmp_path, case.config, case.make()), model)
    options = {"own": {"method": case.kind}, "auto": {"method": case.kind}}.get(method, {"method": method})
    gamma = "auto" if method == "auto" else PLACES
    engine = Engine(CausalLM(model), draft=head, num_speculative_tokens=gamma, max_batch_size=3, **options)
    completions = engine.generate(tiny.PROMPTS, GREEDY)
    assert [each.token_ids for each in completions] == plain
    if method != "auto":  # which may well find that nothing pays
        assert sum(each.counts.num_drafted for each in completions) > 0


# ---- exact distributions through the real loop


V = 3
HALVES = torch.tensor([[2, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).double() / 2
TARGET = FeatureTarget(grid_pair(3)[0].table)
TOY = SimpleNamespace(  # what a head reads of a transformers model; hidden states of V * V numbers
    get_input_embeddings=lambda: SimpleNamespace(weight=torch.eye(V, V * V, dtype=torch.float64))
)


def on_grid(seed: int, num_rows: int) -> Tensor:
    """Logits [num_rows, V] of distributions on a grid of halves."""
    return table(seed, HALVES).flatten(0, 1)[:num_rows].clamp(min=1e-300).log()


def of_codes(head):
    """Let a head read FeatureTarget's codes of the last two tokens as one-hot hidden states."""
    head.start = lambda features: torch.nn.functional.one_hot(features.squeeze(-1).long(), V * V).double()
    return head.double()


def toy_medusa() -> MedusaHead:
    blocks = [[ResidualBlock(V * V, V * V)] for _ in range(2)]
    outputs = [torch.nn.Linear(V * V, V, bias=False) for _ in range(2)]
    head = of_codes(MedusaHead(TOY, blocks, outputs))
    for place in range(2):
        torch.nn.init.zeros_(head.blocks[place][0].linear.weight)
        torch.nn.init.zeros_(head.blocks[place][0].linear.bias)
        head.outputs[place].weight.data = on_grid(place, V * V).T
    return head


def toy_hydra() -> HydraHead:
    blocks = [[ResidualBlock((place + 2) * V * V, V * V, is_projected=True)] for place in range(2)]
    outputs = [torch.nn.Linear(V * V, V, bias=False) for _ in range(2)]
    head = of_codes(HydraHead(TOY, blocks, outputs))
    for place in range(2):
        block = head.blocks[place][0]
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
        block.res_connection.weight.data[:V, (place + 1) * V * V :][:, :V] = torch.eye(V)  # the newest of its tokens
        head.outputs[place].weight.data[:, :V] = on_grid(4 + place, V).T
    return head


def toy_speculator(rows: Tensor | None = None) -> MlpSpeculator:
    """The newest token decides its distributions: logits rows [V, V]. Its output layers are solved for."""
    inner = 4 * V**3  # more than there are pairs of a state and a token
    torch.manual_seed(0)
    head = of_codes(MlpSpeculator(TOY, 2, inner))
    codes = torch.eye(V * V, dtype=torch.float64).unsqueeze(0)
    states = [head.advance(0, codes, torch.full((1, V * V), token)) for token in range(V)]
    first = torch.cat(states, 1)
    second = torch.cat([head.advance(1, first, torch.full(first.shape[:2], token)) for token in range(V)], 1)
    for place, reached in enumerate((first, second)):
        wanted = (on_grid(8 + place, V) if rows is None else rows).repeat_interleave(reached.shape[1] // V, 0)
        head.head[place].weight.data = torch.linalg.lstsq(reached[0], wanted, driver="gelsd").solution.T
    return head


TOYS = {"medusa": toy_medusa, "hydra": toy_hydra, "mlp_speculator": toy_speculator}


def decoder(make, gamma: int, source, rule, max_batch_size: int, *, target=TARGET, tree: Tree | None = None) -> Decoder:
    proposer = StatelessProposer(make(), source, tree=tree)
    return Decoder(target, proposer, gamma, max_batch_size=max_batch_size, rule=rule, uniforms=source)


@pytest.mark.parametrize("name", TOYS)
def test_joint_distribution_of_chains(name: str) -> None:
    """Each outcome of a step is decoded in a row of its own, beside all the others."""
    distribution = exact_distribution(partial(decoder, TOYS[name], 2), (0, 1), 4, (2, 4, 4))
    assert distance(distribution, joint_distribution(TARGET, (0, 1), 4)) < 1e-12


@pytest.mark.parametrize("name", TOYS)
def test_joint_distribution_under_block_verification(name: str) -> None:
    """A target on the same grid as the heads: all thresholds are multiples of a quarter."""
    target = FeatureTarget(table(5, HALVES))
    make = partial(decoder, TOYS[name], 2, target=target)
    distribution = exact_distribution(make, (0, 1), 4, (2, 4, 4), rule=verify_block)
    assert distance(distribution, joint_distribution(target, (0, 1), 4)) < 1e-12


@pytest.mark.parametrize("name", TOYS)
def test_coupled_output_is_that_of_plain_decoding(name: str) -> None:
    params = [SamplingParams(max_tokens=30, seed=seed) for seed in range(20)]
    requests = [Request(seed, (0, 1), each) for seed, each in enumerate(params)]
    plain = Decoder(TARGET, max_batch_size=3, rule=verify_coupled).run(requests)
    drafted = list(decoder(TOYS[name], 2, uniforms, verify_coupled, 3).run(requests))
    expected = {row.request.index: row.output for row in plain}
    assert {row.request.index: row.output for row in drafted} == expected
    assert sum(step.num_accepted for row in drafted for step in row.steps) > 0


@pytest.mark.parametrize("name", TOYS)
def test_joint_distribution_of_a_tree(name: str) -> None:
    """Two siblings, of which one has a child: states follow the branch that they are on."""
    tree = Tree(((0,), (1,), (1, 0)))
    grid = (Each((2, 1, 2)), Each((4, 12, 4)), 12)
    target = FeatureTarget(table(5, HALVES))
    make = partial(decoder, TOYS[name], 3, target=target, tree=tree)
    distribution = exact_distribution(make, (0, 1), 3, grid, rule=verify_tree, tree=tree)
    assert distance(distribution, joint_distribution(target, (0, 1), 3)) < 1e-12


def test_a_speculator_is_accepted_always_if_and_only_if_it_is_in_step() -> None:
    """The target's next token is decided by its last one. A head one token late reads another one's embedding."""
    following = torch.eye(V)[[1, 2, 0]].double()
    target = FeatureTarget(following.expand(V, V, V))
    params = SamplingParams(max_tokens=40, temperature=1, seed=1)

    def accepted(head: MlpSpeculator) -> float:
        rows = decoder(lambda: head, 2, uniforms, verify_tokens, 1, target=target).run([Request(0, (0, 1), params)])
        steps = [step for row in rows for step in row.steps]
        return sum(step.num_accepted for step in steps) / sum(step.num_drafted for step in steps)

    assert accepted(toy_speculator(following.clamp(min=1e-300).log())) == 1
    late = toy_speculator(following.clamp(min=1e-300).log())
    late.advance = lambda place, states, tokens: MlpSpeculator.advance(late, place, states, (tokens + 1) % V)
    assert accepted(late) < 0.2


# ---- refusals


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hydra", {"hydra_head_arch": "prefix-mlp"}, r"hydra_head_arch='prefix-mlp' .* must be 'mlp'"),
        ("hydra", {"grounded_heads": False}, "grounded_heads=False"),
        ("speculator", {"n_predict": 4}, "n_predict=4 .* must be at least 1, and at most 3, the stored positions"),
        ("speculator", {"n_predict": 10**9}, "n_predict=1000000000 .* must be at least 1, and at most 3"),
        ("speculator", {"n_predict": 0}, "n_predict=0 .* must be at least 1"),
        ("speculator", {"n_predict": 2}, "emb.2.weight, head.2.weight, ln.2.bias of the head .* are tensors that"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(name: str, change: dict, message: str, model, tmp_path: Path) -> None:
    folder = write(tmp_path, CASES[name].config | change, CASES[name].make())
    with pytest.raises((LoadError, ValueError), match=message):
        load(folder, model)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("medusa, original", "1000000000.0.linear.weight"),
        ("medusa, original", "0.1000000000.linear.weight"),
        ("hydra", "hydra_mlp.1000000000.0.linear.weight"),
    ],
)
def test_numbers_in_names_make_no_modules_that_are_not_stored(name: str, tensor: str, model, tmp_path: Path) -> None:
    folder = write(tmp_path, CASES[name].config, CASES[name].make() | {tensor: random(1)})
    with pytest.raises(ValueError, match=r"must be numbered from 0 without a gap, but \d is missing"):
        load(folder, model)


@pytest.mark.parametrize("name", ["medusa, original", "hydra", "speculator"])
def test_a_head_of_a_wider_target_is_refused(name: str, tmp_path: Path) -> None:
    other = tiny.make("llama", tiny.GQA | {"hidden_size": 16})
    folder = write(tmp_path, CASES[name].config, CASES[name].make())
    with pytest.raises(LoadError, match=r"has the shape .*, but by its config it must have"):
        load(folder, other)


@pytest.mark.parametrize(("tokens", "message"), [([3, 3, 1, 2, 0], "must ascend"), ([61, 3, 1, 2, 0], r"in \[0, 61\)")])
def test_a_token_map_out_of_range_or_with_repetitions_is_refused(
    tokens: list[int], message: str, model, tmp_path: Path
) -> None:
    folder = write(tmp_path, {}, medusa_vllm() | {"token_map": torch.tensor(tokens)})
    with pytest.raises(ValueError, match=message):
        load(folder, model)


def test_an_lstm_speculator_is_refused_by_name(model, tmp_path: Path) -> None:
    folder = write(tmp_path, SPECULATOR, speculator() | {"speculator.forget_emb.0.weight": random(VOCAB, INNER)})
    with pytest.raises(ValueError, match=r"'forget_emb.0.weight' .* is of Arctic's LSTM speculator"):
        load(folder, model)


def test_more_tokens_than_a_head_has_positions_are_refused(model, tmp_path: Path) -> None:
    head = load(write(tmp_path, {}, medusa_original()), model)
    with pytest.raises(ValueError, match="num_speculative_tokens=4 must be at most 3, the draft positions"):
        Engine(CausalLM(model), method="medusa", draft=head, num_speculative_tokens=4)
