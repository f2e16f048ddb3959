"""Models over several devices: what of it runs on one processor, and the rest where there are GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from specdec import Engine, SamplingParams
from specdec.drafts import can_be_recorded, load_with_drafts, place_models
from specdec.models import loading
from specdec.models.base import LanguageModel
from specdec.models.causal import CausalLM
from specdec.models.elsewhere import Elsewhere, seen_from
from specdec.models.loading import load_pretrained, read_layer_bytes
from specdec.models.placement import LayerBytes, PlacementError
from specdec.runtime import devices

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[1, 5, 9, 2, 1, 5, 9], [3, 3, 7]]
SIZES = {"num_hidden_layers": 3, "vocab_size": 96, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(  # large enough for bitsandbytes
        **SIZES, hidden_size=64, intermediate_size=128, num_key_value_heads=2, initializer_range=0.3
    ),
    "tied": transformers.Qwen3Config(
        **SIZES, hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True
    ),
    "gpt2": transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=96, n_positions=128),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with random weights for each configuration, and "draft", another Llama."""
    made = {}
    for name, config in {**CONFIGS, "draft": CONFIGS["llama"]}.items():
        torch.manual_seed(len(made))
        config.bos_token_id = config.eos_token_id = 0
        made[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_bytes_are_those_of_the_weights(name: str, folders: dict[str, Path]) -> None:
    model, _ = load_pretrained(str(folders[name]), dtype=torch.bfloat16)
    sizes = read_layer_bytes(str(folders[name]), torch.bfloat16)
    assert sizes.total == 2 * sum(weight.numel() for weight in model.parameters())
    layers = model.base_model.h if name == "gpt2" else model.base_model.layers
    assert sizes.layers == tuple(2 * sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    assert sizes.shared == (2 * 96 * 32 if name != "llama" else 0)  # GPT-2 ties, too
    assert read_layer_bytes(str(folders[name]), torch.float32).total == 2 * sizes.total


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_its_layers_device(name: str, folders: dict[str, Path]) -> None:
    model, _ = load_pretrained(str(folders[name]), dtype=torch.float32)
    where = [torch.device("cuda", index) for index in (0, 0, 1)]  # only named, never used
    device_map = loading._device_map(model, where)
    for weight in dict(model.named_parameters(remove_duplicate=False)):
        (found,) = {module for module in device_map if weight == module or weight.startswith(f"{module}.")}
        index = next((int(part) for part in weight.split(".") if part.isdigit()), None)
        is_first = any(part in weight for part in ("embed_tokens", "wte", "wpe"))
        assert device_map[found] == (where[index] if index is not None else where[0] if is_first else where[-1])
    with pytest.raises(ValueError, match="device must be one, or one for each of 3 layers, but there are 2"):
        loading._device_map(model, where[:2])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dispatched_model_decodes_the_same(name: str, folders: dict[str, Path]) -> None:
    """Through accelerate's hooks, which on GPUs move what a layer reads; here all are the same processor."""
    model, _ = load_pretrained(str(folders[name]), dtype=torch.float32)
    expected = Engine(CausalLM(model), method="ngram").generate(PROMPTS, GREEDY)
    device_map = loading._device_map(model, [torch.device("cpu")] * 3)
    accelerate.dispatch_model(model, device_map, force_hooks=True, skip_keys=model._skip_keys_device_placement)
    assert all(hasattr(model.get_submodule(module), "_hf_hook") for module in device_map)
    actual = Engine(CausalLM(model), method="ngram").generate(PROMPTS, GREEDY)
    assert [each.token_ids for each in actual] == [each.token_ids for each in expected]


class Far(CausalLM):
    """A model that claims to be on another device than the tokens, and counts its calls."""

    num_calls = 0

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__(model)
        self.device, self.num_calls = torch.device("cpu:0"), 0

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.num_calls += 1
        return super().forward(*args, **kwargs)  # type: ignore[arg-type]


def test_a_draft_elsewhere_changes_nothing(folders: dict[str, Path]) -> None:
    target = CausalLM(load_pretrained(str(folders["llama"]), dtype=torch.float32)[0])
    draft, _ = load_pretrained(str(folders["draft"]), dtype=torch.float32)
    near, far = CausalLM(draft), Far(draft)
    assert seen_from(near, target.device) is near
    assert isinstance(seen_from(far, target.device), Elsewhere)
    for params in (GREEDY, SamplingParams(temperature=1, max_tokens=24, ignore_eos=True, seed=3)):
        here, there = (
            Engine(target, draft=each, method="draft_model", max_batch_size=2).generate(PROMPTS, params)
            for each in (near, far)
        )
        assert [(each.token_ids, each.steps) for each in here] == [(each.token_ids, each.steps) for each in there]
    assert far.num_calls > 0


class Stub(LanguageModel):
    """A language model whose logits are zeros, and which insists on where its tokens are."""

    vocab_size, context_length = 96, 128

    def __init__(self, device: str, logits_at: str) -> None:
        self.device, self.logits_at = torch.device(device), logits_at

    def allocate(
        self, num_slots: int, capacity: int, *, features: tuple[int, ...] = (), max_rollback: int = 16
    ) -> None:
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor, cache: object, first_slot: int, last_only: bool) -> torch.Tensor:
        assert tokens.device == self.device
        return torch.zeros(*tokens.shape, 96, device=self.logits_at)


@pytest.mark.parametrize(
    ("stub", "home"),
    [(Stub("meta", "cpu"), "cpu"), (Stub("cpu", "cpu"), "meta")],
    ids=["tokens go", "logits come back"],
)
def test_tokens_and_logits_cross(stub: Stub, home: str) -> None:
    """To "meta" numbers can only be moved, never back: so each way is tried alone."""
    logits = Elsewhere(stub, torch.device(home)).forward(torch.zeros(1, 2, dtype=torch.int64), None)
    assert (logits.device, logits.shape) == (torch.device(home), (1, 2, 96))


def test_nothing_is_recorded_across_devices(folders: dict[str, Path]) -> None:
    target, draft = (
        CausalLM(load_pretrained(str(folders[each]), dtype=torch.float32)[0]) for each in ("llama", "tied")
    )
    assert can_be_recorded(target)
    assert can_be_recorded(target, draft)
    assert not can_be_recorded(target, Far(draft.model))
    draft.is_spread = True
    assert not can_be_recorded(target, draft)


def options(**changes: object) -> dict[str, object]:
    return {"dtype": torch.float32, "device": "cuda", "load_format": "auto"} | changes


def test_placements_become_the_devices_of_layers(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in range(3)]
    monkeypatch.setattr("specdec.drafts.free_memories", lambda device: dict.fromkeys(gpus, 10**9))
    target, draft = str(folders["llama"]), str(folders["draft"])
    assert place_models(target, [draft], "same", options()) == ("cuda", {draft: "cuda"})
    assert place_models(target, [draft], "separate", options()) == (gpus[:1] * 3, {draft: gpus[1:2] * 3})
    assert place_models(target, [target], "separate", options()) == (gpus[:1] * 3, {target: gpus[1:2] * 3})
    assert place_models(target, [draft], "auto", options()) == (gpus[:1] * 3, {draft: gpus[:1] * 3})
    on_two, on_third = place_models(target, [draft], "ratio:2:1", options())
    assert on_third == {draft: [gpus[2]] * 3}
    assert set(on_two) == set(gpus[:2])
    with pytest.raises(PlacementError, match="must have 8 devices, but there are 3"):
        place_models(target, [draft], "ratio:6:2", options())


def test_weights_leave_room_on_a_device(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(folders["llama"])
    size = read_layer_bytes(target, torch.float32).total
    for free, fits in ((int(size / 0.9) + 2, True), (int(size / 0.9) - 2, False)):
        monkeypatch.setattr("specdec.drafts.free_memories", lambda device, free=free: {torch.device("cuda:0"): free})
        if fits:
            assert place_models(target, [], "auto", options())
        else:
            with pytest.raises(PlacementError, match="placement='auto' must fit into 1 devices"):
                place_models(target, [], "auto", options())


def test_one_processor_has_auto_but_not_separate(folders: dict[str, Path]) -> None:
    load = {"dtype": torch.float32, "device": "cpu", "load_format": "auto"}
    target, drafts = load_with_drafts(str(folders["llama"]), [str(folders["draft"])], "auto", **load)
    engine = Engine(target, draft=drafts[str(folders["draft"])], method="draft_model")
    assert len(engine.generate(PROMPTS, GREEDY)[0].token_ids) == 24
    with pytest.raises(PlacementError, match="placement='separate' must have 2 devices, but there are 1"):
        load_with_drafts(str(folders["llama"]), [str(folders["draft"])], "separate", **load)


def test_free_memory_is_that_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    assert devices.free_host_memory(tmp_path / "meminfo") == 1_024_000
    assert devices.free_host_memory(tmp_path / "nothing") > 2**20
    assert devices.free_memories("cpu") == {torch.device("cpu"): pytest.approx(devices.free_host_memory(), rel=0.5)}


def test_encoder_decoders_cannot_be_spread() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no single list of 1 decoder layers"):
        loading._parts(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int3"}, "quantization='int3' must be one of these; use None or bitsandbytes-4bit or"),
        ({"tp_plan": "manual"}, "tp_plan='manual' must be one of these; use None or auto"),
        (
            {"tp_plan": "auto"},
            "tp_plan='auto' must be used in processes started by torchrun, .*; run torchrun --nproc",
        ),
        (
            {"quantization": "torchao-int8", "load_format": "dummy"},
            "quantization='torchao-int8' requires unquantized weights; name a folder",
        ),
        ({"tp_plan": "auto", "load_format": "dummy"}, "tp_plan='auto' requires unquantized weights"),
    ],
)
def test_wrong_ways_of_loading_are_named(
    arguments: dict[str, str], message: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(folders["llama"]), dtype=torch.float32, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [load_pretrained, Engine.load])
def test_the_old_spelling_is_accepted_with_a_warning(load: Callable[..., Any], folders: dict[str, Path]) -> None:
    with (
        pytest.warns(DeprecationWarning, match="quantisation= is now quantization="),
        pytest.raises(ValueError, match="quantization='int3' must be one of these"),
    ):
        load(str(folders["llama"]), dtype=torch.float32, quantisation="int3")


@pytest.mark.parametrize("name", loading.QUANTIZATIONS)
def test_a_package_that_lacks_is_named(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    package = loading.QUANTIZATIONS[name]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"requires the package {package}; pip install {package}"):
        load_pretrained(str(folders["llama"]), dtype=torch.bfloat16, quantization=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", loading.QUANTIZATIONS)
def test_quantized_weights_are_decoded_losslessly(name: str, folders: dict[str, Path]) -> None:
    pytest.importorskip(loading.QUANTIZATIONS[name])
    load = {"dtype": torch.float32, "device": "cpu", "load_format": "auto", "quantization": name}
    target, _ = load_with_drafts(str(folders["llama"]), [], **load)
    weight = target.model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    plain, fast = (Engine(target, method=method).generate(PROMPTS, GREEDY) for method in ("autoregressive", "ngram"))
    assert [each.token_ids for each in plain] == [each.token_ids for each in fast]


SHARDED = """
import json, os, pathlib, sys, torch
from specdec import Engine, SamplingParams
target, draft, prompts, folder = sys.argv[1:]
engine = Engine.load(target, draft=draft, method="draft_model", dtype=torch.float32, tp_plan="auto")
kinds = {type(weight).__name__ for weight in engine.target.model.parameters()}
greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
tokens = [each.token_ids for each in engine.generate(json.loads(prompts), greedy)]
found = pathlib.Path(folder) / f"{os.environ['RANK']}.json"  # their prints would run together
found.write_text(json.dumps(["DTensor" in kinds, tokens]))
torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter
"""


def test_tensor_parallel_processes_decode_as_a_single_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each of two processes holds a part of every weight, and emits the tokens of this one, which holds all."""
    models = [str(folders["llama"]), str(folders["draft"])]
    whole = Engine.load(models[0], draft=models[1], method="draft_model", dtype=torch.float32)
    assert {type(weight) for weight in whole.target.model.parameters()} == {torch.nn.Parameter}
    expected = [list(each.token_ids) for each in whole.generate(PROMPTS, GREEDY)]
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, *models, json.dumps(PROMPTS), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(path.read_text()) for path in tmp_path.glob("*.json")] == [[True, expected]] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_draft_on_the_host_and_a_target_on_a_gpu(folders: dict[str, Path]) -> None:
    target, alone = (
        CausalLM(load_pretrained(str(folders["llama"]), dtype=torch.float32, device=device)[0])
        for device in ("cuda:0", "cpu")
    )
    draft = CausalLM(load_pretrained(str(folders["draft"]), dtype=torch.float32, device="cpu")[0])
    spread = Engine(target, draft=draft, method="draft_model", max_batch_size=2).generate(PROMPTS, GREEDY)
    expected = Engine(alone, draft=draft, method="draft_model", max_batch_size=2).generate(PROMPTS, GREEDY)
    assert [each.token_ids for each in spread] == [each.token_ids for each in expected]


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_target_on_two_gpus_and_its_draft_on_a_third(name: str, folders: dict[str, Path]) -> None:
    target, draft = str(folders[name]), str(folders["draft"])
    load = {"dtype": torch.float32, "load_format": "auto"}
    spread, drafts = load_with_drafts(target, [draft], "ratio:2:1", device="cuda", **load)
    assert spread.is_spread
    engine = Engine(spread, draft=drafts[draft], method="draft_model", max_batch_size=2)
    alone = Engine(load_with_drafts(target, [], device="cpu", **load)[0], max_batch_size=2)
    expected = [each.token_ids for each in alone.generate(PROMPTS, GREEDY)]
    assert [each.token_ids for each in engine.generate(PROMPTS, GREEDY)] == expected


def test_sizes_of_a_pair_of_the_catalogue_s_shape() -> None:
    """Llama 3.1 8B's dimensions: 8,030,261,248 parameters, as stated on its model card."""
    folder = Path(__file__).parents[2] / "bench" / "catalogue" / "models" / "llama-8b-shape" / "config.json"
    sizes = read_layer_bytes(str(folder), torch.bfloat16, "dummy")
    assert isinstance(sizes, LayerBytes)
    assert sizes.total == 2 * 8_030_261_248
