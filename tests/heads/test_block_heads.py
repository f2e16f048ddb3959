"""DFlash, DFlash2, DSpark and Domino heads as they are published: against references, as oracles, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from helpers.block_heads import hidden_states, load, next_logits
from helpers.checkpoints import MASK, WIDTH, Checkpoint, Weights
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.heads import formats
from specdec.heads.blocks.backbone import Sight
from specdec.kernels import cpp
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.runtime.artifacts import LoadError

CASES = {
    **{f"dflash {dialect}": checkpoints.dflash(dialect) for dialect in checkpoints.BLOCK_DIALECTS},
    "dflash2": checkpoints.dflash2(input_embedding_scale=1.5, output_multiplier=0.5, final_logit_softcapping=3.0),
    **{f"dspark {kind}": checkpoints.dspark(markov=kind) for kind in checkpoints.MARKOV_KINDS},
    "dspark SpecForge": checkpoints.dspark("SpecForge", confidence_reads_markov=True),
    "domino": checkpoints.domino(),
    "domino with a pure prefix": checkpoints.domino(prefix_len=2),
}
FORMATS = ("dflash z-lab", "dflash2", "dspark vanilla", "dspark gated", "dspark rnn", "domino")
PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4] * 20, [7, 7, 30]]


@pytest.fixture(scope="module")
def model():
    return checkpoints.target()


def tensors_of(name: str) -> dict[str, Tensor]:
    return dict(CASES[name].tensors)


def drafted_logits(head: Any, features: Tensor, newest: int, drafted: list[int]) -> list[Tensor]:
    """Logits [vocab] of each place, given the tokens before it."""
    cache = head.allocate(1, 32)
    head.extend(features.unsqueeze(0), torch.zeros(1, len(features), dtype=torch.int64), cache)
    cache.num_cached = [len(features)]
    anchor, tokens = torch.tensor([newest]), torch.tensor([drafted])
    block = head.block(anchor, len(drafted), cache)
    return [head.logits(block, anchor, tokens[:, :place])[0, 0] for place in range(len(drafted))]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_head_computes_the_definition_of_its_format(name: str, fused: bool, model, tmp_path: Path) -> None:
    head, tensors = load(CASES[name], tmp_path, model), tensors_of(name)
    if fused:
        head.fuse()
    torch.manual_seed(0)
    features, newest, drafted = torch.randn(5, 3 * WIDTH), 11, [4, 70, 9]
    at_anchor = name.startswith("dspark")
    embedded = tensors.get("embed_tokens.weight", model.get_input_embeddings().weight.detach())
    block = embedded[torch.tensor([newest] + [MASK] * (3 - at_anchor))] * (1.5 if name == "dflash2" else 1.0)
    with torch.inference_mode():
        hidden = hidden_states(tensors, features, block)[not at_anchor :]
        for place, logits in enumerate(drafted_logits(head, features, newest, drafted)):
            is_pure = name == "domino with a pure prefix" and place < 2
            kind = "dflash" if is_pure else name.removesuffix(" with a pure prefix")
            expected = next_logits(kind, tensors, model, hidden[: place + 1], [newest, *drafted[:place]])
            is_candidate = expected.isfinite()
            torch.testing.assert_close(logits[is_candidate], expected[is_candidate], rtol=1e-4, atol=1e-4)
            assert (logits[~is_candidate] < -1e8).all()


@pytest.mark.parametrize(
    ("options", "is_causal", "window"),
    [
        ({"causal": True}, True, None),
        ({"use_swa": True, "swa_window_size": 3, "layer_types": ["sliding_attention"] * 2}, True, 3),
        ({"causal": False, "swa_window_size": 3, "layer_types": ["sliding_attention"] * 2}, False, 3),
    ],
)
def test_sliding_layers_are_causal_unless_the_config_sets_it(
    options: dict[str, Any], is_causal: bool, window: int | None, model, tmp_path: Path
) -> None:
    head = load(checkpoints.dflash(**options), tmp_path, model)
    assert head.settings.sights == (Sight(is_causal, window),) * 2
    features, tensors = (
        torch.randn(6, 3 * WIDTH, generator=torch.Generator().manual_seed(0)),
        checkpoints.dflash().tensors,
    )
    block = model.get_input_embeddings().weight.detach()[[11, MASK, MASK, MASK]]
    hidden = hidden_states(tensors, features, block, is_causal=is_causal, window=window)[1:]
    expected = hidden @ model.get_output_embeddings().weight.detach().T
    torch.testing.assert_close(
        torch.stack(drafted_logits(head, features, 11, [4, 70, 9])), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("files", ["safetensors", "shards"])
def test_a_head_loads_from_one_file_and_from_shards(files: str, model, tmp_path: Path) -> None:
    found = formats.recognized(checkpoints.dspark().renamed("", "model.").write(tmp_path, files))
    assert found
    assert found.load(model).max_tokens == 4


def test_confidence_is_read_from_the_state_and_the_token_before(model, tmp_path: Path) -> None:
    case = checkpoints.dspark(confidence_reads_markov=True)
    head, features = load(case, tmp_path, model), torch.randn(5, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
    cache = head.allocate(1, 32)
    head.extend(features.unsqueeze(0), torch.zeros(1, 5, dtype=torch.int64), cache)
    cache.num_cached = [5]
    block = head.block(torch.tensor([11]), 3, cache)
    confidence = head.confidence(block, torch.tensor([11]), torch.tensor([[4]]))
    inputs = torch.cat([block.hidden[0, 1], case.tensors["markov_head.markov_w1.weight"][4]])
    weight, bias = (case.tensors[f"confidence_head.proj.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(confidence, (weight @ inputs + bias).sigmoid())
    assert (
        load(checkpoints.dflash(), tmp_path / "other", model).confidence(block, torch.tensor([11]), torch.tensor([[4]]))
        is None
    )


def test_rows_of_a_draft_vocabulary_that_does_not_ascend(model, tmp_path: Path) -> None:
    """Output head and Markov bias are sorted alike."""
    tokens = torch.randperm(checkpoints.VOCAB, generator=torch.Generator().manual_seed(0))[:40]
    case, cut = checkpoints.dspark(), {}
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        cut[name.replace(".", "__")] = case.tensors[name][tokens]
    mapped = case.with_tensors(**cut, d2t=tokens - torch.arange(40)).with_config(draft_vocab_size=40)
    head, whole = load(mapped, tmp_path / "mapped", model), load(case, tmp_path / "whole", model)
    features = torch.randn(5, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
    for few, many in zip(*(drafted_logits(each, features, 11, [4, 70]) for each in (head, whole)), strict=True):
        torch.testing.assert_close(few, many[tokens.sort().values])


# ---- through the real loop


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(model) -> list[tuple[int, ...]]:
    """The target's outputs without speculation."""
    return [each.token_ids for each in Engine(CausalLM(model), max_batch_size=3).generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_equals_plain_decoding_and_caches_stay_in_step(
    name: str, fused: bool, model, plain: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Ragged rows in three slots, of which one is used again, across rejections."""
    head = load(CASES[name], tmp_path, model)
    if fused:
        head.fuse()
    for method in (head.format, "hybrid"):
        engine = Engine(
            CausalLM(model), draft=head, method=method, num_speculative_tokens=head.max_tokens, max_batch_size=3
        )
        completions = engine.generate(PROMPTS, GREEDY)
        assert [each.token_ids for each in completions] == plain
        counts = [each.counts for each in completions]
        assert sum(each.num_drafted for each in counts) > sum(each.num_accepted for each in counts)


# ---- oracles


def oracle(layer_ids: tuple[int, ...]) -> tuple[Any, Checkpoint]:
    """A target that repeats the last token, and a head that knows it from the state after layer 4 alone.

    Layer i of the target adds a permuted state, larger from layer to layer; what the output head reads is unpermuted.
    The draft's first place reads from the context, uniformly, the fused state, which `fc` permutes as later layers do.
    """
    target = checkpoints.target(num_key_value_heads=checkpoints.HEADS, tie_word_embeddings=False)
    shift = torch.eye(WIDTH).roll(1, 0)
    with torch.no_grad():
        embedding, output = target.get_input_embeddings().weight.zero_(), target.get_output_embeddings().weight.zero_()
        embedding[:WIDTH] = torch.eye(WIDTH)
        output[:WIDTH] = torch.linalg.matrix_power(shift, checkpoints.TARGET_LAYERS).T
        for index, layer in enumerate(target.model.layers):
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                module.weight.zero_()
            layer.self_attn.v_proj.weight.copy_(torch.eye(WIDTH))
            layer.self_attn.o_proj.weight.copy_(shift * 32.0**index)
    weights = Weights(dict(checkpoints.dflash(num_layers=1, layer_ids=layer_ids).tensors))
    tensors = {
        name: torch.ones_like(value) if value.ndim == 1 else value * 0 for name, value in weights.tensors.items()
    }
    tensors["fc.weight"] = torch.linalg.matrix_power(shift, checkpoints.TARGET_LAYERS - 5)  # layer 4's output: 5 shifts
    for name in ("v_proj", "k_proj"):
        tensors[f"layers.0.self_attn.{name}.weight"] = torch.eye(WIDTH)
    tensors["layers.0.self_attn.o_proj.weight"] = torch.eye(WIDTH)
    config = dict(checkpoints.dflash(num_layers=1, layer_ids=layer_ids).config)
    return target, Checkpoint(config | {"num_key_value_heads": checkpoints.HEADS}, tensors)


@pytest.mark.parametrize("layer", [2, 3, 4, 5, 6])
def test_an_oracle_is_always_accepted_if_and_only_if_it_reads_its_layer(layer: int, tmp_path: Path) -> None:
    target, checkpoint = oracle((layer,))
    engine = Engine(
        CausalLM(target), draft=load(checkpoint, tmp_path, target), method="dflash", num_speculative_tokens=3
    )
    [completion] = engine.generate([[9] * 8], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert set(completion.token_ids) == {9}
    assert completion.counts.num_drafted > 0
    assert completion.counts.num_accepted == (completion.counts.num_drafted if layer == 4 else 0)


# ---- conventions and refusals


@pytest.mark.parametrize(
    ("checkpoint", "layers"),
    [
        (checkpoints.dflash(layer_ids=(-1, 3, 7)), (0, 4, FINAL)),
        (checkpoints.dflash("speculators", layer_ids=(1, 3, 7)), (2, 4, 8)),
        (checkpoints.dflash(num_layers=3, target_layer_ids=None), (2, 4, 6)),
    ],
)
def test_feature_layers(checkpoint: Checkpoint, layers: tuple[int, ...], model, tmp_path: Path) -> None:
    head = load(checkpoint, tmp_path, model)
    assert head.feature_layers == layers
    [choice] = head.choices()
    assert next(iter(choice.readings.values())) == {"feature_layers": list(layers)}
    assert head.with_options({"feature_layers": [1, 2, 3]}).feature_layers == (1, 2, 3)
    with pytest.raises(ValueError, match="must be feature_layers, 3 of them"):
        head.with_options({"feature_layers": [1, 2]})


def changed(**config: Any) -> Checkpoint:
    case = checkpoints.dflash()
    inner = {**case.config["dflash_config"], **config}
    return case.with_config(dflash_config={key: value for key, value in inner.items() if value is not None})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (changed(mask_token_id=None), "mask_token_id=None .* must be an integer"),
        (changed(mask_token_id=128), "mask_token_id=128 .* a row of the embedding, below 128"),
        (checkpoints.dflash().with_config(block_size=1), "block_size=1 .* at least 2"),
        (changed(attention_sink_bias=True), "attention_sink_bias=true .* is not supported"),
        (changed(target_layer_ids=[1, 3]), "width of the states that fc.weight reads=96"),
        (changed(target_layer_ids=[1, 3, 8]), r"layer 9 of \[2, 4, 9\].* must be in \[0, 8\]"),
        (changed(swa_window_size=4).with_config(layer_types=["sliding_attention"]), "must name the kinds of 2 layers"),
        (checkpoints.dflash().with_config(layer_types=["sliding_attention"] * 2), "with an integer window"),
        (checkpoints.dflash().with_tensors(norm2__weight=torch.ones(3)), "norm2.weight of the head .* does not have"),
        (
            checkpoints.dflash().with_tensors(layers__1__mlp__up_proj__weight=None),
            "'layers.1.mlp.up_proj.weight' is missing",
        ),
        (
            checkpoints.dflash().with_tensors(layers__0__mlp__up_proj__weight=torch.ones(3, 32)),
            r"has the shape \[3, 32\]",
        ),
        (
            checkpoints.dflash().with_tensors(layers__0__self_attn__qkv_proj__weight=torch.ones(3, 3)),
            "is of a Laguna head",
        ),
        (checkpoints.dflash().with_tensors(encoder__fc__weight=torch.ones(3, 3)), "is of a Muse-Glimmer head"),
        (checkpoints.dspark().with_config(markov_head_type="cubic"), "markov_head_type='cubic' .* vanilla, gated, rnn"),
        (checkpoints.dspark().with_tensors(lm_head__weight=torch.ones(40, 32)), "without d2t it must have 128"),
        (checkpoints.dspark().with_tensors(d2t=torch.full((128,), 5)), "must be an offset to a token id"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint: Checkpoint, message: str, model, tmp_path: Path) -> None:
    with pytest.raises((LoadError, ValueError), match=message):
        load(checkpoint, tmp_path, model)


def test_a_head_of_a_wider_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target"):
        load(checkpoints.dflash(), tmp_path, checkpoints.target(hidden_size=64))


def test_more_tokens_than_a_block_drafts_are_refused(model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens=4 must be at most 3"):
        Engine(
            CausalLM(model),
            draft=load(checkpoints.dflash(), tmp_path, model),
            method="dflash",
            num_speculative_tokens=4,
        )


@pytest.mark.parametrize("name", ["dflash z-lab", "dspark vanilla"])
def test_the_format_is_found_in_a_described_check(name: str, model, tmp_path: Path) -> None:
    """Before weights are read, by shapes alone."""
    found = formats.recognized(CASES[name].write(tmp_path))
    assert found
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert "draft positions" in found.check(skeleton)


@pytest.mark.skipif(not cpp.available(torch.float32), reason="this machine has no C++ kernels")
def test_the_cpu_kernels_attend_both_ways_within_a_block(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 32 and an MLP of 64, which the kernels can compute; 9 tokens are more than one of their tiles."""
    for name, value in {"HEAD_DIM": 32, "MLP": 64, "BLOCK": 9}.items():
        monkeypatch.setattr(checkpoints, name, value)
    monkeypatch.setitem(checkpoints.LAYER, "intermediate_size", 64)
    checkpoint = checkpoints.dflash()
    head = load(checkpoint, tmp_path, model)
    head.fuse()
    assert head._stack is not None
    features, drafted = torch.randn(40, 3 * WIDTH, generator=torch.Generator().manual_seed(0)), list(range(10, 18))
    cache = head.allocate(1, 64)
    head.extend(features.unsqueeze(0), torch.zeros(1, 40, dtype=torch.int64), cache)
    cache.num_cached = [40]
    block = model.get_input_embeddings().weight.detach()[[11] + [MASK] * 8]
    expected = hidden_states(checkpoint.tensors, features, block)[1:]
    made = head.block(torch.tensor([11]), len(drafted), cache).hidden[0]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
