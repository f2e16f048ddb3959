"""What is decoded of each architecture in transformers, on a tiny random model, as a table for the documentation.

`PYTHONPATH=tests python -m helpers.architectures` runs all of them and writes the page, and with names after it only
those.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from helpers.heads import random_tensors, write_folder
from specdec import Engine, SamplingParams
from specdec.heads import mtp
from specdec.heads.files import HeadFolder
from specdec.models.causal import CausalLM
from specdec.models.loading import model_class
from specdec.models.seq2seq import Seq2SeqLM
from specdec.runtime.artifacts import LoadError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW, CONTEXT = 32, 4, 2, 8, 61, 16, 256
LONG = [3 + (7 * i * i + 3 * i) % 55 for i in range(100)]  # the ring buffer of a window has 144 columns
PROMPTS = ([5, 9, 8, 7, 5, 9, 8, 11, 4, 11, 4, 6], [3, 7], LONG)
METHODS = ("ngram", "draft_model", "tree", "mtp")
TREE = [(0,), (1,), (0, 0), (1, 0)]

# sizes by the names that configurations have for them; those that a configuration lacks are left out
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "block_ff_dim"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size",), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), KV_HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    **{"qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": 4, "n_group": 1, "topk_group": 1, "query_pre_attn_scalar": 8},
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}
_LATENT = {"num_key_value_heads": HEADS, "head_dim": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_GATED = _LINEAR | {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    "longcat_flash": _LATENT | {"zero_expert_num": 2},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **{kind: {"rotary_dim": 4} for kind in ("gptj", "codegen")},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _GATED),
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"), _MIXED),
    "gemma4_text": _MIXED
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    | {"per_layer_config": {"1": {"head_dim": 16}}},
    "kimi_linear": _LINEAR
    | {"mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 8, "linear_num_heads": 4}
    | {"num_key_value_heads": 4, "num_experts_per_token": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    | {"use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8}
    | {"mamba_headdim": 8, "mamba_d_state": 8, "chunk_size": 8, "attention_head_dim": 16, "attention_hidden_size": 64}
    | {"num_key_value_heads": 4, "kv_channels": 8, "num_query_groups": 4, "use_mamba_kernels": False},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    | {"moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False},
    **{kind: {"layer_types": ["conv", "full_attention"]} for kind in ("lfm2", "lfm2_moe")},
    "minimax": _LINEAR | {"block_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": HIDDEN, "attention_window_size": WINDOW},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW}
    | {"floor_scale": 8},
    "whisper": {"max_target_positions": CONTEXT, "max_source_positions": 8, "num_mel_bins": 8},
    # a padding token would have no position
    **{kind: {"decoder_start_token_id": 2} for kind in ("m2m_100", "nllb-moe")},
    "xmod": {"default_language": "en_XX"},
    "led": {"max_encoder_position_embeddings": CONTEXT, "max_decoder_position_embeddings": CONTEXT}
    | {"attention_window": [WINDOW, WINDOW]},
}
_LONG_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24},
    **{"short_factor": [1.0, 1.5, 1.9, 2.0], "long_factor": [2.0, 3.0, 3.5, 4.0], "partial_rotary_factor": 1.0},
}


@dataclass(frozen=True)
class Case:
    """An architecture, or a variant of it. kind: the model type. text: of a composite, the type of its text model."""

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def config(self) -> Any:
        return _composite(self) if self.text else config(self.kind, **self.options)


def _cases(*names: str) -> list[Case]:
    return [Case(name, name) for name in names]


LISTED = [
    *_cases("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
    *_cases("gemma", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "phi"),
    Case("phi3 (longrope)", "phi3", {"rope_parameters": _LONG_ROPE}),
    *_cases("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon"),
    Case("falcon (ALiBi)", "falcon", {"alibi": True}),
    *_cases("mpt", "starcoder2", "cohere", "cohere2", "olmo2", "olmoe", "granite", "granitemoehybrid", "deepseek_v2"),
    *_cases("deepseek_v3", "mamba", "mamba2", "jamba", "bamba", "zamba2", "nemotron_h", "lfm2", "falcon_h1", "minimax"),
    *_cases("kimi_linear", "recurrent_gemma", "rwkv"),
    *_cases("t5", "mt5", "umt5", "bart", "pegasus", "marian", "m2m_100", "nllb-moe", "whisper"),
]
"""The architectures that are run by every test run."""
_VISION = {
    **{"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": HEADS},
    **{"image_size": 28, "patch_size": 14, "depth": 1, "embed_dim": HIDDEN, "num_heads": HEADS},
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), HIDDEN),
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OTHERS = [
    *_cases("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bert", "bert-generation", "big_bird", "biogpt"),
    *_cases("bitnet", "camembert", "codegen", "cohere2_moe", "cpmant", "ctrl", "cwm", "data2vec-text", "deepseek_v4"),
    *_cases("diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe"),
    *_cases("falcon_mamba", "flex_olmo", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite"),
    *_cases("gpt-sw3", "gpt_bigcode", "gpt_neox_japanese", "granite_swa", "granitemoe", "granitemoe_swa"),
    *_cases("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling_text"),
    *_cases("internlm3", "jais2", "jetmoe", "lfm2_moe", "lfm3", "llama4_text", "longcat_flash", "megatron-bert"),
    *_cases("mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "modernbert-decoder"),
    *_cases("moshi", "nanochat", "nemotron", "olmo", "olmo3", "olmo_hybrid", "openai-gpt", "persimmon"),
    Case("phi3", "phi3"),
    *_cases("phimoe", "qwen3_5_moe_text", "rembert", "roberta", "roberta-prelayernorm", "roformer", "seed_oss"),
    *_cases("smollm3", "solar_open", "stablelm", "trocr", "vaultgemma", "xglm", "xlm", "xlm-roberta"),
    *_cases("xlm-roberta-xl", "xlnet", "xmod", "youtu", "zaya"),
    *_cases("longt5", "switch_transformers", "mbart", "blenderbot", "blenderbot-small", "plbart", "mvp", "pegasus_x"),
    *_cases("bigbird_pegasus", "prophetnet", "fsmt", "led"),
    Case("gemma3 (composite)", "gemma3", text="gemma3_text"),
    Case("llama4 (composite)", "llama4", text="llama4_text"),
    Case("mllama (composite)", "mllama", {"cross_attention_layers": [1]}, "mllama_text_model"),
    Case("qwen2_vl (composite)", "qwen2_vl", _MROPE, "qwen2_vl_text"),
    Case("qwen2_5_vl (composite)", "qwen2_5_vl", _MROPE, "qwen2_5_vl_text"),
    Case("qwen3_vl (composite)", "qwen3_vl", _MROPE, "qwen3_vl_text"),
    Case("mistral3 (composite)", "mistral3", text="mistral"),
    Case("llava (composite)", "llava", text="llama"),
    Case("paligemma (composite)", "paligemma", text="gemma"),
]
"""Further ones, which only the command runs and a slow test."""
MTP = {"deepseek_v3", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "nemotron_h", "glm4_moe", "glm4_moe_lite"}
MTP |= {"mimo_v2_flash", "ernie4_5_moe", "exaone_moe"}
"""Architectures that have checkpoints with MTP layers."""


def config(kind: str, **options: Any) -> Any:
    """A tiny configuration of a model type. options: in place of the sizes above, or of fields that have none."""
    defaults = AutoConfig.for_model(kind)
    known = {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in known and not _is_off(defaults, name)}
    if "is_decoder" in known and not defaults.is_encoder_decoder:
        sizes["is_decoder"] = True
    if defaults.is_encoder_decoder:  # the start token of some has another name, or is in the generation config only
        sizes["decoder_start_token_id"] = 0
    return AutoConfig.for_model(kind, **sizes | _OPTIONS.get(kind, {}) | options)


def _is_off(defaults: Any, name: str) -> bool:
    """Whether a window or a rank is None by default, which means that the model has none."""
    return name in ("sliding_window", "q_lora_rank") and getattr(defaults, name, None) is None


def _composite(case: Case) -> Any:
    text = {name: size for name, size in config("llama").to_dict().items() if name in _SIZES}
    text |= {"model_type": case.text, "head_dim": HEAD_DIM, **_OPTIONS.get(case.text, {}), **case.options}
    vision = AutoConfig.for_model(case.kind).vision_config.model_type
    return AutoConfig.for_model(case.kind, text_config=text, vision_config=_VISION | {"model_type": vision})


def make(made: Any, seed: int = 0) -> Any:
    """A random float32 model of a configuration, in eval mode, with SDPA if transformers has it for the model."""
    kind = transformers.WhisperForConditionalGeneration if made.model_type == "whisper" else model_class(made)
    torch.manual_seed(seed)
    build = kind._from_config if made.model_type == "whisper" else kind.from_config
    try:
        model = build(made, dtype=torch.float32, attn_implementation="sdpa").eval()
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = build(made, dtype=torch.float32, attn_implementation="eager").eval()
    # which `generate` forces and sampling parameters do not
    model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    for parameter in model.parameters():  # the default initialization is so small that every argmax is the same
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def draft_of(model: Any) -> Any:
    """The model with noise of another seed on its weights, so that some drafts are accepted and some are not."""
    draft = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return draft


@dataclass(frozen=True)
class Outcome:
    """What was seen of an architecture.

    results: by method "equal", to `generate`, or "uncached", equal to greedy decoding without a cache where `generate`
    is not, or "refused", or "DIFFERS". why: the refusals. generate: what transformers gets wrong, or "".
    """

    name: str
    model: str
    results: Mapping[str, str]
    why: str = ""
    generate: str = ""

    def row(self) -> str:
        cells = [f"`{self.name}`", self.model, *(self.results.get(method, "") for method in METHODS)]
        notes = "; ".join(filter(None, (self.why, self.generate))).replace("|", "\\|")
        return "| " + " | ".join([*cells, notes]) + " |\n"


def outcome(case: Case, num_tokens: int = 52) -> Outcome:
    """Decode the prompts with each method and compare the tokens."""
    made = case.config()
    model = make(made)
    name, is_seq2seq = type(model).__name__, made.is_encoder_decoder
    methods = METHODS if case.kind in MTP else METHODS[:3]
    expected, complaint = _generated(model, num_tokens)
    wrap = Seq2SeqLM if is_seq2seq else CausalLM
    try:
        target = wrap(model)
    except ValueError as error:
        return Outcome(case.name, name, dict.fromkeys(methods, "refused"), _short(error, name), complaint)
    results, reasons = {}, defaultdict(list)
    for method in methods:
        try:
            results[method] = _compared(model, _decoded(target, model, wrap, method, num_tokens), expected)
        except (ValueError, LoadError) as error:
            results[method] = "refused"
            reasons[_short(error, name)].append(method)
    why = "; ".join(
        reason if len(refused) == len(methods) else f"{', '.join(refused)}: {reason}"
        for reason, refused in reasons.items()
    )
    return Outcome(case.name, name, results, why, complaint)


def _short(error: Exception, name: str) -> str:
    # without what differs between machines and runs
    text = re.sub(r" \(relative difference [^)]*\)| in '[^']*/[^']*'", "", str(error))
    return text.replace(f"{name}'s", "its").replace(name, "it").split("; use")[0]


def _decoded(target: Any, model: Any, wrap: Any, method: str, num_tokens: int) -> list[list[int]]:
    options: dict[str, Any] = {"num_speculative_tokens": 3} if method != "tree" else {"tree": TREE}
    if method in ("draft_model", "tree"):
        options["draft"] = wrap(draft_of(model))
    if method == "mtp":
        options["draft"] = _mtp_layer(model)
    engine = Engine(target, method=method, max_batch_size=len(PROMPTS), **options)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [list(each.token_ids) for each in engine.generate(list(PROMPTS), params)]


def _mtp_layer(model: Any) -> Any:
    """A random MTP layer of the model's own kind, as transformers names its parts."""
    layer = type(model.get_decoder().layers[-1])(mtp._config(model.config), 0)
    shapes = {f"layers.0.{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "post_norm")}
    shapes |= {"layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    shapes |= {f"layers.0.mtp_block.{name}": tuple(weight.shape) for name, weight in layer.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), {}, random_tensors(shapes))
        return mtp.load(HeadFolder.open(Path(folder)), model, "auto")


def _generated(model: Any, num_tokens: int) -> tuple[list[list[int]] | None, str]:
    """Greedy outputs of `generate`, or None where it fails or contradicts the model without a cache, and which."""
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.max_length = None, 0, None
    skip = 1 if model.config.is_encoder_decoder else 0
    outputs = []
    try:
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            output = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False
            )
            outputs.append(output[0, skip or len(prompt) :].tolist())
    except Exception as error:  # whatever a model raises
        return None, f"`generate` of transformers raises {type(error).__name__}"
    if "longrope" in str(model.config.to_dict()):  # without a cache, one call has one set of factors for all positions
        return outputs, ""
    if all(_is_greedy(model, prompt, output) for prompt, output in zip(PROMPTS, outputs, strict=True)):
        return outputs, ""
    return None, "`generate` of transformers differs from greedy decoding without a cache"


def _compared(model: Any, outputs: Sequence[list[int]], expected: Sequence[list[int]] | None) -> str:
    if expected is not None:
        return "equal" if list(outputs) == list(expected) else "DIFFERS"
    is_greedy = all(_is_greedy(model, prompt, output) for prompt, output in zip(PROMPTS, outputs, strict=True))
    return "uncached" if is_greedy else "DIFFERS"


@torch.inference_mode()
def _is_greedy(model: Any, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether each token of an output is the most likely one, by one call without a cache."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs = {"input_ids": torch.tensor([list(prompt)]), "decoder_input_ids": torch.tensor([[start, *output[:-1]]])}
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *output[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return bool(logits.argmax(-1).tolist() == list(output))


HEAD = f"""# Architectures

What is decoded of each architecture that transformers {transformers.__version__} has, seen on tiny random models in
float32: a batch of {len(PROMPTS)} prompts of unequal lengths, 52 tokens each. Windows have {WINDOW} tokens, and the
longest text overwrites the ring buffer of a window. *equal*: greedy speculation has the tokens of
`transformers.generate`, with n-gram drafts, a draft model and trees of its tokens, and an MTP layer where checkpoints
of the architecture have one. *uncached*: it has those of greedy decoding without a cache, from which `generate` itself
differs. *refused*: loading the model, or the method, raises an error with the reason given here ("it" is the model).

"""
TABLE = "| Model type | Class | n-gram | draft model | tree | MTP | Why refused; what transformers gets wrong |\n"
TABLE += "|---|---|---|---|---|---|---|\n"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"


def page(rows: Mapping[str, str]) -> str:
    """The documentation's page. rows: by name of the case."""
    listed, others = ("".join(rows[case.name] for case in cases) for cases in (LISTED, OTHERS))
    return HEAD + TABLE + listed + "\n## Further architectures\n\n" + TABLE + others


def main(names: Sequence[str]) -> None:
    """Run these cases, or all, and write the page."""
    cases = [case for case in LISTED + OTHERS if not names or case.name in names or case.kind in names]
    rows = {line.split("`")[1]: line for line in PAGE.read_text().splitlines(True) if line.startswith("| `")}
    for case in cases:
        rows[case.name] = outcome(case).row()
        print(rows[case.name], end="", flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
