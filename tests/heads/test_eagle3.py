"""EAGLE-3 heads as they are published: each dialect against a reference, exactly lossless, and refused where wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.heads import (
    OnGrid,
    attend,
    block_shapes,
    check_greedy_is_lossless,
    feed_forward,
    plain_greedy,
    random_tensors,
    rms,
    write_folder,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import (
    coupled_runs,
    exact_coupled_distribution,
    exact_distribution,
    race_pieces,
)
from specdec.conformance.gates import distance
from specdec.conformance.toys import HALVES, QUARTERS, FeatureTarget, joint_distribution, table
from specdec.decoding import Decoder
from specdec.heads import eagle3, formats
from specdec.heads.files import HeadFolder
from specdec.kernels import cpp
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.runtime.artifacts import LoadError
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree
from specdec.verification import verify_block, verify_tokens

HIDDEN, VOCAB, DRAFTED = 32, 61, 24
LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LAYER |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "vocab_size": VOCAB, "rope_theta": 10_000.0}
TARGET = tiny.GQA | {"num_hidden_layers": 8, "max_position_embeddings": 128}


@dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint. expected: what must be recognized. layers: of the target that it reads, as loaded."""

    expected: str
    config: dict[str, Any]
    layers: tuple[int, ...] = (2, 4, 5)
    num_layers: int = 1
    first: str = "midlayer."
    drafted: int | None = DRAFTED
    own_embedding: bool = False
    own_output: bool = True
    all_wide: bool = False
    fc: bool = True
    hidden: int = HIDDEN
    further: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def shapes(self, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
        width, shapes = self.hidden, {"norm.weight": (self.hidden,)}
        for index in range(self.num_layers):
            prefix = self.first if index == 0 else f"layers.{index}."
            is_wide = index == 0 or self.all_wide
            shapes |= block_shapes(prefix, width, 2 * width if is_wide else width, **self.sizes)
            if is_wide and self.fc:
                shapes[f"{prefix}hidden_norm.weight"] = (width,)
        if self.fc:
            shapes["fc.weight"] = (width, len(self.layers) * HIDDEN)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (vocab, width)
        if self.own_output:
            shapes["lm_head.weight"] = (self.drafted or vocab, width)
        return shapes | self.further

    def tensors(self, vocab: int = VOCAB, seed: int = 0) -> dict[str, Tensor]:
        tensors = random_tensors(self.shapes(vocab), seed)
        if self.drafted:
            kept = torch.randperm(vocab, generator=torch.Generator().manual_seed(5))[: self.drafted].sort().values
            tensors |= {"d2t": kept - torch.arange(self.drafted), "t2d": torch.isin(torch.arange(vocab), kept)}
        return tensors

    def write(self, folder: Path, vocab: int = VOCAB, tensors: Mapping[str, Tensor] | None = None, **config: Any):
        return write_folder(
            folder, LAYER | {"vocab_size": vocab} | self.config | config, tensors or self.tensors(vocab)
        )


WRAPPER = {"speculators_model_type": "eagle3", "transformer_layer_config": LAYER | {"model_type": "llama"}}
BIASES = {f"midlayer.self_attn.{name}_proj.bias": (n,) for name, n in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
NORMS = {f"layers.0.self_attn.{name}_norm.weight": (8,) for name in "qk"}
DIALECTS = {
    "original": Dialect("SafeAILab", {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": DRAFTED}),
    "narrow with a target of its own width": Dialect(
        "SafeAILab", {"target_hidden_size": HIDDEN, "hidden_size": 16, "head_dim": 8}, hidden=16, own_embedding=True
    ),
    "SpecForge": Dialect(
        "SpecForge",
        {"norm_output": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        first="layers.0.",
        further={"fc.bias": (HIDDEN,)},
    ),
    "several layers": Dialect("SpecForge", {}, first="layers.0.", num_layers=3),
    "ModelOpt": Dialect(
        "ModelOpt",
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8], "use_aux_hidden_state": True}},
        layers=(1, 3, 8),
        first="layers.0.",
        drafted=None,
    ),
    "ModelOpt without auxiliary states": Dialect(
        "ModelOpt", {"eagle_config": {"use_aux_hidden_state": False}}, layers=(FINAL,), first="layers.0.", fc=False
    ),
    "biases": Dialect("SafeAILab", {"attention_bias": True}, further=BIASES),
    "output head of the target": Dialect("SafeAILab", {}, own_output=False, drafted=None),
    "DeepSpec": Dialect(
        "DeepSpec",
        {"architectures": ["Qwen3Eagle3Model"], "target_layer_ids": [-1, 1, 3, 5, 7], "ttt_length": 7},
        layers=(0, 2, 4, 6, 8),
        first="layers.0.",
        num_layers=2,
        all_wide=True,
        drafted=None,
        own_embedding=True,
        further=NORMS | {name.replace("layers.0", "layers.1"): size for name, size in NORMS.items()},
    ),
    "speculators": Dialect("speculators", WRAPPER | {"norm_before_residual": False}, first="layers.0."),
    "speculators, residual by default": Dialect("speculators", WRAPPER, first="layers.0.", own_embedding=True),
    "3.1": Dialect(
        "speculators",
        WRAPPER | {"norm_output": True, "fc_norm": True, "norm_before_residual": True},
        first="layers.0.",
        further={f"fc_norm.{i}.weight": (HIDDEN,) for i in range(3)},
    ),
    "gpt-oss": Dialect(
        "speculators",
        WRAPPER | {"norm_before_fc": True, "norm_before_residual": True},
        first="layers.0.",
        further={"input_norm.weight": (3 * HIDDEN,)},
    ),
}
RESIDUAL_IS_NORMED = {"speculators, residual by default", "3.1", "gpt-oss"}
each_dialect = pytest.mark.parametrize("name", DIALECTS)


def target(vocab: int = VOCAB) -> Any:
    model = tiny.make("llama", TARGET | {"vocab_size": vocab})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def load(folder: Path, model: Any) -> eagle3.Eagle3Head:
    return eagle3.load(HeadFolder.open(folder), model, "auto")


# ---- what a head computes


def reference(name: str, tensors: dict[str, Tensor], embedded: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """By the format's description: (next states, what the output head reads) of embeddings and states [n, width]."""
    tensors = {key.replace("midlayer.", "layers.0."): value for key, value in tensors.items()}
    x = states
    for index in range(DIALECTS[name].num_layers):
        layer = {k.removeprefix(f"layers.{index}."): v for k, v in tensors.items() if k.startswith(f"layers.{index}.")}
        residual = x
        inputs = rms(x, layer["input_layernorm.weight"])
        if index == 0 or DIALECTS[name].all_wide:
            normed = rms(x, layer["hidden_norm.weight"]) if DIALECTS[name].fc else x
            inputs = torch.cat([rms(embedded, layer["input_layernorm.weight"]), normed], -1)
            residual = normed if name in RESIDUAL_IS_NORMED else x
        x = residual + attend(inputs, layer, "self_attn.", 8)
        x = x + feed_forward(rms(x, layer["post_attention_layernorm.weight"]), layer, "mlp.")
    normed = rms(x, tensors["norm.weight"])
    return (normed if name == "3.1" else x), normed


def encoded(name: str, tensors: dict[str, Tensor], features: Tensor) -> Tensor:
    if name == "3.1":
        parts = features.chunk(3, -1)
        features = torch.cat([rms(part, tensors[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], -1)
    if name == "gpt-oss":
        features = rms(features, tensors["input_norm.weight"])
    if not DIALECTS[name].fc:
        return features
    return features @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(()))


@each_dialect
def test_a_dialect_is_recognized_and_computes_its_description(name: str, tmp_path: Path) -> None:
    """Two committed stretches and two drafted tokens, of which the head's own states are read."""
    dialect, model = DIALECTS[name], target()
    tensors, folder = dialect.tensors(), dialect.write(tmp_path)
    assert eagle3.recognize(HeadFolder.open(folder)) == dialect.expected
    head = load(folder, model)
    assert head.feature_layers == dialect.layers
    embedding = tensors.get("embed_tokens.weight", model.get_input_embeddings().weight.detach())
    output = tensors.get("lm_head.weight", model.get_output_embeddings().weight.detach())
    if dialect.drafted:
        assert head.draft_vocabulary.tolist() == tensors["t2d"].nonzero().flatten().tolist()
    features = torch.randn(9, len(dialect.layers) * HIDDEN)
    tokens = torch.randint(VOCAB, (11,))
    states = encoded(name, tensors, features)
    cache = head.allocate(2, 16)
    with torch.inference_mode():
        head(head.encode(features[:4][None]), tokens[None, :4], cache, 1)
        cache.num_cached[1] = 4
        hidden = head(head.encode(features[4:][None]), tokens[None, 4:9], cache, 1)
        cache.num_cached[1] = 9
        for number in range(9, 12):
            state, read = reference(name, tensors, embedding[tokens[:number]], states)
            torch.testing.assert_close(hidden[0, -1], state[-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head.logits(hidden)[0, -1], read[-1] @ output.T, rtol=1e-4, atol=1e-4)
            if number < 11:
                states = torch.cat([states, state[-1:]])
                hidden = head(hidden[:, -1:], tokens[None, number : number + 1], cache, 1)
                cache.num_cached[1] += 1


@each_dialect
def test_a_dialect_is_checked_by_shapes_alone(name: str, tmp_path: Path) -> None:
    """Before any weight is read, for a target that is shapes alone, too."""
    found = formats.recognized(DIALECTS[name].write(tmp_path))
    assert found
    num = DIALECTS[name].drafted or VOCAB
    assert f"EAGLE-3 head ({DIALECTS[name].expected}), " in (description := found.check(target().to("meta")))
    assert f"draft vocabulary {num} of {VOCAB}" in description


def test_output_rows_follow_a_vocabulary_that_does_not_ascend(tmp_path: Path) -> None:
    dialect = DIALECTS["original"]
    tensors = dialect.tensors()
    ordered = load(dialect.write(tmp_path / "a", tensors=tensors), target())
    order = torch.randperm(DRAFTED, generator=torch.Generator().manual_seed(1))
    tokens = (torch.arange(DRAFTED) + tensors["d2t"])[order]
    shuffled = tensors | {"d2t": tokens - torch.arange(DRAFTED), "lm_head.weight": tensors["lm_head.weight"][order]}
    head = load(dialect.write(tmp_path / "b", tensors=shuffled), target())
    assert head.draft_vocabulary.tolist() == ordered.draft_vocabulary.tolist()
    states = torch.randn(1, 1, HIDDEN)
    assert torch.equal(head.logits(states), ordered.logits(states))


# ---- what the loop makes of it


def on_grid(name: str, folder: Path, rows: Tensor = QUARTERS) -> OnGrid:
    """A loaded head over three tokens, all of which it drafts."""
    dialect = DIALECTS[name]
    tensors = (
        dialect.tensors(3)
        if dialect.drafted is None
        else {key: value for key, value in dialect.tensors(24).items() if key not in ("d2t", "t2d")}
    )
    tensors = {k: v[:3] if k in ("lm_head.weight", "embed_tokens.weight") else v for k, v in tensors.items()}
    head = load(dialect.write(folder, 3, tensors), target(3))
    return OnGrid(head, 9, len(dialect.layers) * HIDDEN, rows)


MARKOV = FeatureTarget(table(0))
PROMPT = (0, 1, 2, 0)


def maker(
    head: OnGrid, gamma: int = 1, tree: Tree | None = None, hybrid: bool = False, records: bool = False, target=MARKOV
):
    def make(source, rule, max_batch_size):
        proposer: Any = EagleProposer(head, source, tree=tree)
        if hybrid:
            proposer = HybridProposer(NgramProposer(3, MARKOV.device, lambda: LookupIndex(1, 2)), proposer)
        return Decoder(
            target, proposer, gamma, max_batch_size=max_batch_size, rule=rule, uniforms=source, records=records
        )

    return make


@each_dialect
def test_joint_distribution_of_a_chain(name: str, tmp_path: Path) -> None:
    num_tokens = 4 if name == "3.1" else 3
    found = exact_distribution(maker(on_grid(name, tmp_path), 2), PROMPT, num_tokens, (4, 2, 4))
    assert distance(found, joint_distribution(MARKOV, PROMPT, num_tokens)) < 1e-12


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@pytest.mark.parametrize("records", [False, True])
def test_joint_distribution_by_rule(rule: Any, records: bool, tmp_path: Path) -> None:
    head = on_grid("3.1", tmp_path)
    grid = (4, 8, 24) if rule is verify_block else (4, 2, 4)
    found = exact_distribution(maker(head, 1, records=records), PROMPT, 3, grid, rule=rule)
    assert distance(found, joint_distribution(MARKOV, PROMPT, 3)) < 1e-12


def test_joint_distribution_after_lookup(tmp_path: Path) -> None:
    found = exact_distribution(maker(on_grid("original", tmp_path), hybrid=True), PROMPT, 3, (4, 4, 12))
    assert distance(found, joint_distribution(MARKOV, PROMPT, 3)) < 1e-12


@pytest.mark.parametrize("shape", [((0,), (1,)), ((0,), (1,), (0, 0)), ((0,), (0, 0), (0, 1))])
@pytest.mark.parametrize("records", [False, True])
def test_joint_distribution_of_a_tree(shape: Any, records: bool, tmp_path: Path) -> None:
    tree = Tree(shape)
    make = maker(on_grid("several layers", tmp_path, HALVES), len(tree), tree, records=records)
    found = exact_distribution(make, PROMPT, 3, (2, 2, 4), rule=verify_tree, tree=tree)
    assert distance(found, joint_distribution(MARKOV, PROMPT, 3)) < 1e-12


def test_joint_distribution_of_coupled_drafts(tmp_path: Path) -> None:
    target = FeatureTarget(table(0, HALVES))
    make = maker(on_grid("original", tmp_path, HALVES), 2, target=target)
    pieces = [race_pieces(HALVES.tolist())] * 3
    found = exact_coupled_distribution(coupled_runs(make, PROMPT, pieces))
    assert distance(found, joint_distribution(target, PROMPT, 3)) < 1e-12


def test_the_heads_distributions_depend_on_their_context(tmp_path: Path) -> None:
    """Otherwise enumeration could not detect the state of another position."""
    head = on_grid("original", tmp_path)
    cache, rows = head.allocate(9, 4), set()
    with torch.inference_mode():
        for token in range(3):
            states = head.forward(head.encode(torch.arange(9.0).view(9, 1, 1)), torch.full((9, 1), token), cache)
            rows |= {tuple(row) for row in head.logits(states)[:, 0].exp().tolist()}
    assert len(rows) > 2


@cache
def plain_outputs() -> list[tuple[int, ...]]:
    return plain_greedy(target())


@each_dialect
@pytest.mark.parametrize("method", ["eagle3", "hybrid", "tree"])
def test_greedy_equals_plain_decoding(name: str, method: str, tmp_path: Path) -> None:
    model = target()
    head = load(DIALECTS[name].write(tmp_path), model)
    head.fuse()
    check_greedy_is_lossless(model, head, method, plain_outputs())


# ---- an oracle


def shift(by: int, size: int = HIDDEN) -> Tensor:
    """The matrix that turns the one-hot vector of i into that of i + by."""
    return torch.roll(torch.eye(size), by, 0)


def shifting_mlp(by: int, gain: float = 1.0) -> dict[str, Tensor]:
    """An MLP that, added to the one-hot vector of i, gives that of i + by, times a gain."""
    at_hot = torch.tensor(HIDDEN / (1 + 1e-6 * HIDDEN)).sqrt()
    scale = torch.nn.functional.silu(at_hot) * at_hot
    weights = {
        "gate_proj": torch.eye(HIDDEN),
        "up_proj": torch.eye(HIDDEN),
        "down_proj": (gain * shift(by) - shift(0)) / scale,
    }
    return {f"{name}.weight": weight for name, weight in weights.items()}


def counting_target() -> Any:
    """A Llama that continues i with i + 1, and whose state before layer n is the one-hot vector of i + n(n + 1)/2."""
    sizes = LAYER | {"intermediate_size": HIDDEN, "vocab_size": HIDDEN, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    total = 0
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.load_state_dict(shifting_mlp(index + 1))
            total += index + 1
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN))
        model.lm_head.weight.copy_(shift(1 - total))
    model.generation_config.eos_token_id = None
    return model


def oracle(folder: Path, feeds_normed: bool = False, **config: Any) -> Path:
    """A head that knows `counting_target` by the states before layers 2, 4 and 5."""
    tensors = random_tensors(DIALECTS["original"].shapes(HIDDEN)) | {"norm.weight": torch.ones(HIDDEN)}
    gain = 100.0 if feeds_normed else 1.0  # of the output, which its norm makes of length 1 again
    tensors |= {f"midlayer.mlp.{name}": weight for name, weight in shifting_mlp(1, gain).items()}
    if feeds_normed:
        tensors["norm.weight"] /= HIDDEN**0.5
    tensors["midlayer.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    tensors["midlayer.self_attn.o_proj.weight"].zero_()
    blocks = [shift(-n * (n + 1) // 2) / 3 for n in (2, 4, 5)]
    tensors["fc.weight"] = torch.cat(blocks, 1)
    tensors["lm_head.weight"] = shift(1)
    sizes = LAYER | {"intermediate_size": HIDDEN, "vocab_size": HIDDEN} | config
    return write_folder(folder, sizes, tensors)


def acceptance(folder: Path) -> float:
    model = counting_target()
    return accepted(load(folder, model), model)


def accepted(head: Any, model: Any) -> float:
    engine = Engine(CausalLM(model), method="eagle3", draft=head, num_speculative_tokens=3)
    counts = engine.generate([[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=33, ignore_eos=True))[0].counts
    return counts.num_accepted / counts.num_drafted


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, 1.0), ([2, 4, 5], 1.0), ([1, 3, 4], 0.0), ([3, 5, 6], 0.0), ([5, 4, 2], None)]
)
def test_an_oracle_is_accepted_if_and_only_if_its_layers_are_right(layers, expected, tmp_path: Path) -> None:
    found = acceptance(oracle(tmp_path, eagle_aux_hidden_state_layer_ids=layers))
    assert found == expected if expected is not None else found < 0.5


@pytest.mark.parametrize("wrapper", [False, True])
@pytest.mark.parametrize("feeds_normed", [False, True])
def test_an_oracle_is_accepted_if_and_only_if_the_right_state_is_fed_back(
    wrapper: bool, feeds_normed: bool, tmp_path: Path
) -> None:
    """`norm_output` means that normalized states are fed back in speculators' format, and nothing of it elsewhere."""
    config: dict[str, Any] = {"norm_output": True}
    if wrapper:
        config |= {"speculators_model_type": "eagle3", "norm_before_residual": False}
    found = acceptance(oracle(tmp_path, feeds_normed, **config))
    assert (found == 1.0) == (wrapper == feeds_normed)
    assert found == 1.0 or found < 0.7


@pytest.mark.parametrize("feeds_normed", [False, True])
def test_one_reading_of_an_oracle_is_accepted_always(feeds_normed: bool, tmp_path: Path) -> None:
    """For any misleading config: one reading of its choices is the right one, and the others accept less."""
    model = counting_target()
    head = load(oracle(tmp_path, feeds_normed, eagle_aux_hidden_state_layer_ids=[1, 3, 4]), model)
    layers, feeds, residual = head.choices()
    assert [dict(next(iter(each.readings.values()))) for each in (layers, feeds, residual)] == [
        {"feature_layers": [1, 3, 4]},
        {"feeds_normed": False},
        {"norm_before_residual": False},
    ]
    found = {
        (*options["feature_layers"], state["feeds_normed"]): accepted(head.with_options({**options, **state}), model)
        for options in layers.readings.values()
        for state in feeds.readings.values()
    }
    assert [reading for reading, share in found.items() if share == 1.0] == [(2, 4, 5, feeds_normed)]


def test_options_of_a_head_are_checked(tmp_path: Path) -> None:
    head = load(DIALECTS["original"].write(tmp_path), target())
    assert head.with_options({}).choices() == head.choices()
    with pytest.raises(ValueError, match="must be 3 layers"):
        head.with_options({"feature_layers": [1]})
    with pytest.raises(ValueError, match="must be of feature_layers, feeds_normed"):
        head.with_options({"layers": [1]})


# ---- refusals


def changed(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(given: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            key = name.replace("__", ".")
            if tensor is None:
                del given[key]
            else:
                given[key] = tensor

    return change


REFUSALS = {
    "offset": (
        changed(d2t=torch.arange(DRAFTED) + 60),
        {},
        r"d2t\[\d+\]=\d+ must be an offset to a token id in \[0, 61\)",
    ),
    "twice": (changed(d2t=-torch.arange(DRAFTED)), {}, "must map to each token once, but token 0 has two draft ids"),
    "t2d": (changed(t2d=torch.arange(VOCAB) < 5), {}, "d2t and t2d must name the same tokens, but they name 24 and 5"),
    "rows": (changed(lm_head__weight=torch.zeros(20, HIDDEN)), {}, "lm_head.weight of .* has 20 rows, .* d2t, 24"),
    "no map": (changed(d2t=None, t2d=None), {}, "lm_head.weight .* has 24 rows, but without d2t it must have 61"),
    "width": (
        changed(lm_head__weight=torch.zeros(DRAFTED, 16)),
        {},
        "has rows of 16 numbers, but must have hidden_size",
    ),
    "unknown": (
        changed(parallel_draft_heads__0__weight=torch.zeros(2)),
        {},
        "parallel_draft_heads.0.weight .* tensors that",
    ),
    "missing": (
        changed(midlayer__mlp__up_proj__weight=None),
        {},
        "'layers.0.mlp.up_proj.weight' is missing in the head",
    ),
    "shape": (
        changed(),
        {"intermediate_size": 40},
        r"has the shape \[48, 32\], but by its config it must have \[40, 32\]",
    ),
    "states": (
        changed(fc__weight=torch.zeros(HIDDEN, 64)),
        {},
        r"fc.weight reads=64 .* 32 for each of the layers \[2, 4, 5\]",
    ),
    "layer": (changed(), {"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, r"layer 9 of \[2, 4, 9\], .* \[0, 8\]"),
    "size": (
        changed(),
        {"num_attention_heads": None},
        "num_attention_heads=None in the head's config must be a number",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    change, config, message = REFUSALS[name]
    tensors = DIALECTS["original"].tensors()
    change(tensors)
    with pytest.raises((LoadError, ValueError), match=message):
        load(DIALECTS["original"].write(tmp_path, tensors=tensors, **config), target())


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_a_narrow_head_cannot_borrow(name: str, tmp_path: Path) -> None:
    dialect = DIALECTS["narrow with a target of its own width"]
    tensors = {key: value for key, value in dialect.tensors().items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing .* hidden_size=16 is not the target's, 32"):
        load(dialect.write(tmp_path, tensors=tensors), target())


def test_a_head_of_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    dialect = DIALECTS["speculators, residual by default"]
    tensors = dialect.tensors() | {"embed_tokens.weight": torch.zeros(50, HIDDEN)}
    with pytest.raises(ValueError, match=r"embed_tokens.weight=50 .* must be the target's, 61"):
        load(dialect.write(tmp_path, tensors=tensors), target())


def test_latent_attention_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.zeros(4, 12), "midlayer.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(4, 8)}
    with pytest.raises(LoadError, match="latent attention"):
        load(write_folder(tmp_path, LAYER, tensors), target())


@pytest.mark.parametrize("extra", [{"mask_hidden": (1, 1, 96)}, {"midlayer.self_attn.q_proj.weight": (32, 32)}])
def test_other_formats_are_not_taken_for_it(extra: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    shapes = DIALECTS["original"].shapes() | extra
    assert eagle3.recognize(HeadFolder.open(write_folder(tmp_path, LAYER, random_tensors(shapes)))) is None


# ---- fused

FOR_KERNELS = {"mlp": 64, "heads": 2, "kv_heads": 1, "dim": 32}
LARGE_NORMS = {f"layers.{i}.self_attn.{name}_norm.weight": (32,) for i in range(2) for name in "qk"}


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("name", ["original", "several layers", "3.1", "gpt-oss", "DeepSpec", "speculators"])
def test_a_fused_head_computes_the_same(name: str, has_kernels: bool, tmp_path: Path) -> None:
    """A ragged batch, then a step of one token each, then a tree."""
    dialect, sizes = DIALECTS[name], {}
    if has_kernels:
        dialect = replace(dialect, sizes=FOR_KERNELS, further=LARGE_NORMS if name == "DeepSpec" else dialect.further)
        sizes = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    if "transformer_layer_config" in dialect.config:
        sizes = {"transformer_layer_config": dialect.config["transformer_layer_config"] | sizes} | sizes
    folder, model = dialect.write(tmp_path, **sizes), target()
    plain, fused = load(folder, model), load(folder, model)
    fused.fuse()
    if has_kernels and cpp.available(torch.float32):
        assert all(layers._stack for layers in fused.layers)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 8, len(dialect.layers) * HIDDEN, generator=generator)
    tokens = torch.randint(VOCAB, (2, 12), generator=generator)
    found = []
    for head in (plain, fused):
        cache = head.allocate(2, 24)
        with torch.inference_mode():
            head(head.encode(features[:1, :5]), tokens[:1, :5], cache, 0)
            cache.num_cached[0] = 5
            states = head(head.encode(features[:, 5:]), tokens[:, 5:8], cache)
            cache.num_cached[:] = [8, 3]
            next_states = head(states[:, -1:], tokens[:, 8:9], cache)
            cache.num_cached[:] = [9, 4]
            branches = Branches.after_root((-1, -1, 0))
            nodes = head(next_states.expand(-1, 4, -1), tokens[:, 8:12], cache, branches=branches)
            found.append([states, next_states, nodes, head.logits(nodes)])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
    assert plain.step_bytes == fused.step_bytes


# ---- costs


def test_a_dummy_head_and_the_bytes_of_a_step(tmp_path: Path) -> None:
    """All but the embedding is read, before and after fusing."""
    folder, model = DIALECTS["several layers"].write(tmp_path), target().to(torch.bfloat16)
    head = eagle3.load(HeadFolder.open(folder), model, "dummy")
    weights = sum(torch.Size(shape).numel() for shape in DIALECTS["several layers"].shapes().values())
    assert head.step_bytes == 2 * weights
    head.fuse()
    assert head.step_bytes == 2 * weights
