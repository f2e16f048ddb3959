"""Load models from a bundled name, a hub id, a local folder, a GGUF file or a configuration without weights.

`load_pretrained` returns plain transformers objects. `resolve` returns the folder of a bundled model, so that all
engines of a comparison read the same files. transformers and gguf parse the formats.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from specdec.models.files.bundled import BUNDLED, bundled_gguf
from specdec.models.files.formats import DTYPE_NAMES, LOAD_FORMATS, OWN_QUANTIZATIONS, QUANTIZATIONS
from specdec.models.gguf.checkpoint import (
    DESCRIPTION_BYTES,
    PLAN_FILE,
    describe,
    is_read_by_transformers,
    read_weights,
)
from specdec.models.gguf.header import Header, read_header
from specdec.models.placement import LayerBytes
from specdec.runtime.artifacts import (
    LoadError,
    WrongArgumentError,
    cache_root,
    explained,
    fetch,
    folder_of,
    made_once,
)
from specdec.runtime.checks import nearest, renamed, require_choice
from specdec.runtime.json_files import fields, read_json
from specdec.runtime.progress import doing, others_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.models.quantization.model import Quantization

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTENTIONS = ("eager", "sdpa", "auto")
WEIGHTS_SHARE = 0.9  # fraction of a device's free memory for weights; keys, values and activations need the rest
# configuration fields, or GGUF metadata, that are a number of modules
COUNTED = re.compile(r"(layers?|experts?|blocks?|depth|(block|expert)(_\w+)?_count)$")
MAX_PARTS = 10_000  # upper bound on such a field
_PATH = "pretrained_model_name_or_path"  # the first argument of from_pretrained
WEIGHTS = Path(__file__).parents[1] / "weights"  # the packaged drafts, a folder each


@renamed(quantisation="quantization")
def load_pretrained(
    source: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    attention: str = "auto",
    load_format: str = "auto",
    quantization: str | None = None,
    dequantize: bool = False,
    tp_plan: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model, in eval mode and without gradients, and its tokenizer (None if it has none).

    source: a bundled name ("smollm2-135m"), else an existing folder or .gguf file, else a hub id. A GGUF file is
        dequantized into ordinary dense weights. Code in a model's repository is never run.
    dtype: float16, bfloat16, float32 or float64, for all weights.
    device: one for all weights, or one per decoder layer; modules before the first layer are placed with it, modules
        after the last layer with that.
    attention: "eager" or "sdpa", the transformers implementation; "auto" is "sdpa" if the architecture supports it,
        else "eager", with a warning.
    load_format: "auto" reads the weights (from a folder or the hub: safetensors only); "dummy" initializes random
        weights with a fixed seed and needs only the configuration (source may then also be the path of a config.json).
    quantization: None; one of QUANTIZATIONS or OWN_QUANTIZATIONS: keeps the weights of linear layers in fewer bits.
        "auto" keeps those of a GGUF file or a bundled model in the file's own types, whose distribution is that of the
        dequantized weights. The others change it (for "q8_0", "q4_1" and "q4_0", unless the file has that type);
        speculative decoding is then lossless with respect to the quantized model.
    dequantize: load the values of the weights that OWN_QUANTIZATIONS would keep in fewer bits, and all others as they
        are in `dtype`, into an ordinary float32 model: a reference for the distribution of the quantized model.
    tp_plan: "auto" shards each layer over the processes of `torchrun`, as transformers does for this architecture;
        all processes decode the same tokens. `device` is then only a device type: "cpu" or "cuda".
    vocabulary: of `read_vocabulary` for this source, if it was needed before; its tokenizer is not read again.
    Raises ValueError for other arguments, FileNotFoundError for a missing folder or file, and LoadError for damaged
    content or a failed download.
    """
    _check_choices(dtype=(dtype, DTYPES), attention=(attention, ATTENTIONS), load_format=(load_format, LOAD_FORMATS))
    quantizations = (None, *QUANTIZATIONS, *OWN_QUANTIZATIONS)
    _check_choices(quantization=(quantization, quantizations), tp_plan=(tp_plan, (None, "auto")))
    if dequantize and quantization not in OWN_QUANTIZATIONS:
        raise ValueError(
            f"quantization={quantization!r} must be {' or '.join(OWN_QUANTIZATIONS)} to be dequantized; no "
            "other can be the reference of an audit"
        )
    devices = _usable_devices(device)
    place = _locate(source, load_format)
    is_own = quantization in OWN_QUANTIZATIONS
    if is_own and load_format == "auto":
        place = _with_file(place)
    special = _special(place, dtype, devices, quantization, tp_plan, load_format)
    load = _stored_model if load_format == "auto" else _random_model
    with explained(place.rule, place.remedy), others_bars(), doing(f"loading {source}"):
        own = _own_quantization(place, dtype, devices, quantization, load_format) if is_own and quantization else None
        if own and load_format == "auto":
            special["unread"] = own.unread
        model = _with_attention(attention, partial(load, place, devices, dtype=dtype, **special))
        if own:
            (own.dequantize if dequantize else own.quantize)(model)
        model.eval().requires_grad_(False)
        _check_generation_config(place)
        return model, vocabulary.tokenizer if vocabulary else _tokenizer(place, load_format)


@dataclass(frozen=True)
class Vocabulary:
    """A model's vocabulary. is_encoder_decoder: of the model. read: reads the tokenizer, when it is first used."""

    vocab_size: int
    is_encoder_decoder: bool
    read: Callable[[], PreTrainedTokenizerBase | None]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if it has none. Errors as for `load_pretrained`."""
        return self.read()


def read_vocabulary(source: str, load_format: str = "auto") -> Vocabulary:
    """A model's vocabulary, without reading its weights; arguments and errors as for `load_pretrained`."""
    place = _locate(source, load_format)
    with explained(place.rule, place.remedy):
        config = _config_and_class(place)[0]
        vocab_size = config.get_text_config(decoder=True).vocab_size
        return Vocabulary(vocab_size, config.is_encoder_decoder, partial(_tokenizer, place, load_format))


def read_layer_bytes(source: str, dtype: torch.dtype, load_format: str = "auto") -> LayerBytes:
    """Bytes of a model's weights in a dtype, from its configuration alone; errors as for `load_pretrained`."""
    place = _locate(source, load_format)
    with explained(place.rule, place.remedy):
        return _layer_bytes(_skeleton(place, dtype))


def read_skeleton(source: str, dtype: torch.dtype, load_format: str = "auto") -> PreTrainedModel:
    """A model whose weights are shapes alone, on the "meta" device; errors as for `load_pretrained`."""
    place = _locate(source, load_format)
    with explained(place.rule, place.remedy):
        return _skeleton(place, dtype)


def check_complete(source: str) -> None:
    """Raise LoadError unless a folder holds all weights of its model, by the names and shapes in its files' headers."""
    from transformers.utils import logging as transformers_logging

    place = _locate(source, "auto")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # else what does not fit is listed in a report, too
    try:
        with explained(place.rule, place.remedy), others_bars():
            _stored_model(place, (torch.device("meta"),), dtype=torch.float32)
    finally:
        transformers_logging.set_verbosity(verbosity)


def hub_folder(source: str, *, allow_pickle: bool = False) -> Path | None:
    """The folder of a checkpoint on the hub, downloaded unless it is cached; None for a source that is no hub id.

    allow_pickle: whether its .bin and .pt files are downloaded, too. Raises LoadError if it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    known = source in _names() or Path(source).expanduser().exists()
    if known or not _HUB_ID.fullmatch(source) or Path(source).suffix in _FILE_SUFFIXES:
        return None
    place = _locate(source, "auto")
    options = {key: value for key, value in place.arguments.items() if key != _PATH}
    patterns = [*_CHECKPOINT_FILES, *_PICKLED_FILES * allow_pickle]
    with explained(place.rule, place.remedy), others_bars():
        found = snapshot_download(place.arguments[_PATH], allow_patterns=patterns, ignore_patterns=["*/*"], **options)
    return Path(found)


def _with_attention(attention: str, load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Load the model with the requested attention. Raises ValueError if the architecture does not support it."""
    try:
        return load(attn_implementation="sdpa" if attention == "auto" else attention)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        name = str(error).split(" ", 1)[0]
        if attention != "auto":
            raise WrongArgumentError(
                f"attention={attention!r} must be supported by {name} in transformers; use attention='eager' or 'auto'"
            ) from None
    logging.getLogger("specdec").warning("%s does not support SDPA in transformers: using eager attention", name)
    return load(attn_implementation="eager")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Convert the name of a dtype; a torch.dtype is returned unchanged. Raises ValueError for an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    require_choice("dtype", dtype, DTYPE_NAMES)
    return cast("torch.dtype", getattr(torch, dtype))


def as_device(device: str | torch.device) -> str:
    """Resolve "auto" to "cuda" if a GPU is available, else "cpu"; other names are returned unchanged.

    Raises ValueError for what is no name.
    """
    if not isinstance(device, str | torch.device):
        raise ValueError(f"device={device!r} must be a name; use cpu, cuda or cuda:0")
    if device != "auto":
        return str(device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def with_revision(source: str, revision: str | None) -> str:
    """Append a revision to a hub id, in the form of `load_pretrained`. Raises ValueError if source is no hub id."""
    if revision is None:
        return source
    if not isinstance(source, str) or source in _names() or Path(source).exists() or "@" in source:
        raise ValueError(
            f"revision={revision!r} must be left out: {source!r} is not an id on the hub without a revision"
        )
    return f"{source}@{revision}"


def resolve(source: str) -> str:
    """The path of a bundled model or packaged draft, to pass to any engine; other sources are returned unchanged.

    The first call for a bundled model downloads it; see `fetch` for the errors, and for terms to accept. For a packaged
    draft stored without embeddings, this is a folder in the cache to which they were added.
    """
    if not source:
        raise ValueError(f"source={source!r} must not be empty; {_remedy()}")
    bundled = next((entry for entry in BUNDLED if entry.name == source), None)
    if bundled:
        return str(fetch(bundled, _convert))
    if source in packaged():
        return str(_with_embeddings(WEIGHTS / source))
    return os.path.expanduser(source)


def packaged() -> list[str]:
    """Names of the drafts in this package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def _with_embeddings(folder: Path) -> Path:
    from specdec.models.files.derived import WEIGHTS_FILE, materialize

    if not (folder / WEIGHTS_FILE).exists():
        return folder
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()

    def make(staging: Path) -> dict[str, Any]:
        target = json.loads((folder / "config.json").read_text())["specdec"]["made_with"]["target"]
        with others_bars():
            materialize(folder, *load_pretrained(target, dtype=torch.bfloat16), staging / "made")
        return {"name": folder.name, "target": target, "weights_sha256": digest}

    rule = f"source={folder.name!r} must be completed with the target's embeddings, once"
    place = cache_root() / f"{folder.name}-{digest[:8]}"
    return made_once(place, make, disk_bytes=150_000_000, rule=rule, what=f"assembling {folder.name}, once")


# ---- one loaded model


@dataclass(frozen=True, slots=True)
class _Place:
    """A source as arguments of `from_pretrained`, with the rule and the remedy for its error message."""

    arguments: dict[str, Any]
    rule: str
    remedy: str
    folder: Path | None = None  # None for the hub
    gguf: Header | None = None  # of the file with the weights; the folder then holds the rest


def _check_choices(**choices: tuple[object, tuple[object, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of these; use {' or '.join(map(str, allowed))}")


def _usable_devices(device: str | torch.device | Sequence[torch.device]) -> tuple[torch.device, ...]:
    given = (device,) if isinstance(device, str | torch.device) else device
    return tuple(map(_usable_device, given))


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device missing in this machine or torch
        cause = str(error).splitlines()[0]
        cause = "there is no such kind" if "Expected one of" in cause else cause
        raise ValueError(f"device={str(device)!r} must be usable here ({cause}); use cpu, cuda or cuda:0") from error


def _remedy() -> str:
    return f"name a bundled model ({', '.join(_names())}), a folder, a .gguf file or a hub id"


def _names() -> list[str]:
    return [*(entry.name for entry in BUNDLED), *packaged()]


def _locate(source: str, load_format: str) -> _Place:
    path = Path(resolve(source))
    if path.is_dir():
        return _folder(source, path, load_format)
    if path.is_file():
        return _file(source, path, load_format)
    looks_like_hub_id = _HUB_ID.fullmatch(source)
    if path.suffix in _FILE_SUFFIXES or not looks_like_hub_id:
        raise FileNotFoundError(
            f"source={source!r} must exist; check the path, or {_remedy()}{nearest(source, _names())}"
        )
    rule = f"source={source!r} must be a bundled name, an existing path, or a hub id that is cached or within reach"
    remedy = f"check the spelling and the network, or set HF_HUB_OFFLINE=1 to use the hub's cache, or {_remedy()}"
    remedy += nearest(source, _names())
    name, revision = looks_like_hub_id["name"], looks_like_hub_id["revision"]
    arguments = {_PATH: name} | ({"revision": revision} if revision else {})
    return _Place(arguments | _within_reach(name, revision, rule, remedy), rule, remedy)


_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[\w./-]+))?")  # "gpt2", "org/model@main"


def _within_reach(name: str, revision: str | None, rule: str, remedy: str) -> dict[str, Any]:
    """Arguments that restrict loading to the local cache if the hub is unreachable; else none.

    Probes the hub once, where transformers would retry. Raises LoadError if it is unreachable and the model is not
    cached.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return {}  # the hub is reachable; transformers raises the better message
    except Exception as error:  # the type depends on the HTTP client of huggingface_hub
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return {"local_files_only": True}
        raise LoadError(f"{rule} (the hub does not answer: {error}); {remedy}") from error
    return {}


_HUB_TIMEOUT_S = 10.0
_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_PICKLED_FILES = ("*.bin", "*.pt")
_FILE_SUFFIXES = (".gguf", ".json", ".safetensors")


def _folder(source: str, path: Path, load_format: str) -> _Place:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"source={source!r} must hold a config.json; name a folder made by save_pretrained")
    if load_format == "auto" and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"source={source!r} must hold its weights as .safetensors; convert them with save_pretrained, "
            'or use load_format="dummy" for random ones'
        )
    rule = f"source={source!r} must hold an undamaged transformers model"
    remedy = "copy or save it again (for a bundled model, delete its folder to fetch it again)"
    return _Place({_PATH: str(path)}, rule, remedy, path)


def _file(source: str, path: Path, load_format: str) -> _Place:
    if path.suffix == ".gguf":
        return _gguf_file(source, path)
    if path.suffix == ".json" and load_format == "dummy":
        rule = f"source={source!r} must be a transformers configuration"
        return _Place({_PATH: str(path)}, rule, "use a config.json written by save_pretrained", path.parent)
    raise ValueError(
        f"source={source!r} must be a .gguf file if it is a file; name the folder that holds it, "
        'or use load_format="dummy" for random weights from a config.json'
    )


def _gguf_file(source: str, path: Path) -> _Place:
    """The file, and the folder in the cache with its configuration and tokenizer, which the first call creates."""
    rule = f"source={source!r} must be an undamaged GGUF file of an architecture that transformers can read"
    remedy = "fetch it again and compare its size and checksum"
    with explained(rule, remedy):
        header = read_header(path)
        _check_counts(header.metadata)
        place = cache_root() / f"gguf-{_description_key(header)}"

    def make(staging: Path) -> dict[str, Any]:
        with explained(rule, remedy), others_bars():
            describe(header, staging / "made")
        return {"name": path.name}

    what = f"converting the vocabulary of {path.name}, once"
    folder = made_once(place, make, disk_bytes=DESCRIPTION_BYTES, rule=rule, what=what)
    return _Place({_PATH: str(folder)}, rule, remedy, folder, header)


def _description_key(header: Header) -> str:
    """What a converted configuration and tokenizer depend on: the header, and the version that converts it."""
    version = importlib.metadata.version("transformers").encode()
    return hashlib.sha256(version + header.content()[: header.num_bytes].tobytes()).hexdigest()[:16]


def _config_and_class(place: _Place) -> tuple[Any, Any]:
    from transformers import AutoConfig, PreTrainedConfig

    _check_counts(PreTrainedConfig.get_config_dict(**place.arguments)[0])
    config = AutoConfig.from_pretrained(**place.arguments, trust_remote_code=False)
    return config, model_class(config)


def model_class(config: Any) -> Any:
    """The class that makes a model of a configuration: of a composite with images, the one that takes text alone, too.

    Raises ValueError if transformers has no model of it that reads and writes token ids.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    decoder_only = (AutoModelForCausalLM, AutoModelForImageTextToText)
    for candidate in (AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else decoder_only:
        if type(config) in candidate._model_mapping:
            return candidate
    raise WrongArgumentError(
        f"model_type={config.model_type!r} must be a model that reads token ids and writes token ids, but transformers "
        "has it for other inputs or outputs only; use a language model"
    )


def _check_counts(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for an impossible number of layers or experts, or one that would take forever to create.

    fields: of a configuration as they are stored; those of a GGUF file by their names there.
    """
    parts = [fields]
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif COUNTED.search(name) and isinstance(value, int) and not 0 <= value <= MAX_PARTS:
                raise ValueError(f"{name}={value} must be {'at least 0' if value < 0 else f'at most {MAX_PARTS}'}")


_GENERATION_CONFIG = "generation_config.json"


def _check_generation_config(place: _Place) -> None:
    """Raise ValueError for a damaged generation_config.json, which transformers ignores, with its stop tokens."""
    if place.folder:
        path: Any = place.folder / _GENERATION_CONFIG
    else:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            place.arguments[_PATH], _GENERATION_CONFIG, revision=place.arguments.get("revision")
        )
    if isinstance(path, str | Path) and Path(path).is_file():
        read_json(Path(path), f"{_GENERATION_CONFIG} must be a JSON object", fields)


def _check_weight_files(place: _Place, config: Any) -> None:
    """Raise ValueError if a model's configuration or weight index names files other than safetensors."""
    from transformers.utils import cached_file

    named = getattr(config, "transformers_weights", None) or "model.safetensors.index.json"
    if not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"transformers_weights={named} must be .safetensors, as other formats can hold code")
    if not str(named).endswith(".json"):
        return
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors", "gated_repo")}
    index = cached_file(place.arguments[_PATH], named, **quiet)
    files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else set()
    if others := sorted(str(name) for name in files if not str(name).endswith(".safetensors")):
        raise ValueError(f"{named} must name only .safetensors, as other formats can hold code, but names {others[0]}")
    if outside := sorted(str(name) for name in files if ".." in Path(name).parts or Path(name).is_absolute()):
        raise ValueError(f"{named} must name files in its own folder, but names {outside[0]}")


def _special(
    place: _Place,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    quantization: str | None,
    tp_plan: str | None,
    load_format: str,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for quantized or sharded weights. Raises ValueError for conflicting options."""
    is_special = quantization in QUANTIZATIONS
    if not (is_special or tp_plan):
        return {}
    if load_format == "dummy" or place.gguf:
        name, value = ("quantization", quantization) if is_special else ("tp_plan", tp_plan)
        raise ValueError(f"{name}={value!r} requires unquantized weights; name a folder or a hub id that has them")
    if tp_plan and (len(devices) > 1 or "WORLD_SIZE" not in os.environ):
        raise ValueError(
            f"tp_plan={tp_plan!r} must be used in processes started by torchrun, with one device type; run "
            "torchrun --nproc-per-node=2 your_script.py, or use placements"
        )
    special: dict[str, Any] = {}
    if quantization in QUANTIZATIONS:
        special["quantization_config"] = _quantization(quantization, dtype)
    if tp_plan:
        from transformers.distributed import DistributedConfig

        special["distributed_config"] = DistributedConfig(tp_plan=tp_plan)
    return special


def _with_file(place: _Place) -> _Place:
    """Of a bundled model the GGUF file that its folder was made from; other places as they are."""
    bundled = next((entry for entry in BUNDLED if place.folder == folder_of(entry)), None)
    return _gguf_file(bundled.name, bundled_gguf(bundled)) if bundled else place


def _own_quantization(
    place: _Place, dtype: torch.dtype, devices: Sequence[torch.device], name: str, load_format: str
) -> Quantization:
    """How this package quantizes the model at a place, with the weights of its GGUF file if it is one."""
    from specdec.models.gguf.stored import StoredWeights
    from specdec.models.quantization.model import Quantization

    model, stored = _skeleton(place, dtype), None
    if place.gguf and place.folder and load_format == "auto" and not is_read_by_transformers(place.gguf):
        stored = StoredWeights(place.gguf, place.folder, model)
    return Quantization(model, name, stored, devices[0])


def _quantization(name: str, dtype: torch.dtype) -> Any:
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantization={name!r} requires the package {package}; pip install {package}")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _skeleton(place: _Place, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: no memory is allocated for its weights."""
    config, auto_class = _config_and_class(place)
    with torch.device("meta"):
        return cast("PreTrainedModel", auto_class.from_config(config, dtype=dtype))


def _parts(model: PreTrainedModel) -> tuple[list[str], list[str], list[str]]:
    """Names of the modules before the decoder layers, of the layers, and of the modules after them.

    Raises ValueError for a model without exactly one list of decoder layers.
    """
    count, base = model.config.get_text_config(decoder=True).num_hidden_layers, model.base_model
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    children = [(f"{prefix}{name}", child) for name, child in base.named_children()]
    lists = [
        i for i, (_, child) in enumerate(children) if isinstance(child, torch.nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1 or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has no single list of {count} decoder layers to spread over devices")
    at = lists[0]
    # modules without weights, such as rotary embeddings, are used by all layers: keep them on the input device
    before = [name for name, child in children if not any(True for _ in child.parameters())]
    before += [name for name, _ in children[:at] if name not in before]
    after = [name for name, _ in children[at + 1 :] if name not in before]
    after += [name for name, child in model.named_children() if child is not base and prefix]
    return before, [f"{children[at][0]}.{index}" for index in range(count)], after


def _layer_bytes(model: PreTrainedModel) -> LayerBytes:
    before, layers, after = _parts(model)

    def weights(names: list[str]) -> dict[int, int]:
        modules = [model.get_submodule(name) for name in names]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return {id(parameter): parameter.numel() * parameter.element_size() for parameter in parameters}

    first, last = weights(before), weights(after)
    shared = sum(size for key, size in last.items() if key in first)
    sizes = tuple(sum(weights([name]).values()) for name in layers)
    return LayerBytes(sizes, sum(first.values()), sum(last.values()), shared)


def _device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of each module, as accelerate expects it, given the device of each layer."""
    before, layers, after = _parts(model)
    if len(devices) != len(layers):
        raise ValueError(f"device must be one, or one for each of {len(layers)} layers, but there are {len(devices)}")
    ends = dict.fromkeys(before, devices[0]) | dict.fromkeys(after, devices[-1])
    return ends | dict(zip(layers, devices, strict=True))


def _stored_model(
    place: _Place, devices: Sequence[torch.device], *, unread: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """The model with its weights. unread: names of weights that are not read from a GGUF file, see `read_weights`."""
    config, auto_class = _config_and_class(place)
    options |= {"config": config, "output_loading_info": True}
    if place.gguf and place.folder:
        auto_class = type(_skeleton(place, options["dtype"]))  # the automatic classes need a name
        options |= _gguf_weights(place.gguf, place.folder, options["dtype"], unread)
    else:
        _check_weight_files(place, config)
        options |= place.arguments | {"use_safetensors": True, "trust_remote_code": False}
    # load each weight directly to its device: the host never holds the whole model
    if len(set(devices)) > 1:
        options["device_map"] = _device_map(_skeleton(place, options["dtype"]), devices)
    elif devices[0].type != "cpu" and "distributed_config" not in options:
        options["device_map"] = {"": devices[0]}
    model, report = auto_class.from_pretrained(**options)
    if missing := sorted(report["missing_keys"]):  # transformers only warns and leaves them randomly initialized
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return cast("PreTrainedModel", model)


def _gguf_weights(header: Header, folder: Path, dtype: torch.dtype, unread: Collection[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the weights in a GGUF file. folder: with what else there is in it."""
    from transformers import GgufConfig

    if not is_read_by_transformers(header):
        return {_PATH: None, "state_dict": read_weights(header, folder, dtype, unread)}
    # dequantize: else some architectures stay quantized if a matching kernel is installed
    file = {_PATH: str(header.path.parent), "gguf_file": header.path.name}
    return file | {"quantization_config": GgufConfig(dequantize=True)}


def _random_model(place: _Place, devices: Sequence[torch.device], **options: Any) -> PreTrainedModel:
    config, auto_class = _config_and_class(place)
    if len(set(devices)) > 1:
        from accelerate import dispatch_model

        model = _random_model(place, devices[-1:], **options)
        return cast(
            "PreTrainedModel",
            dispatch_model(model, _device_map(model, devices), skip_keys=model._skip_keys_device_placement),
        )
    device = devices[0]
    on_gpu = [device] if device.type == "cuda" else []  # initialize on the GPU: billions of weights are slow on a CPU
    with torch.random.fork_rng(devices=on_gpu), torch.device(device):
        (torch.cuda if on_gpu else torch.default_generator).manual_seed(0)
        return cast("PreTrainedModel", auto_class.from_config(config, **options).to(device))


def _tokenizer(place: _Place, load_format: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer at a place; None for a folder without one, and for "dummy" weights also for a hub id without one.

    Raises LoadError for one that cannot be read.
    """
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {**place.arguments, "trust_remote_code": False}
    if place.folder:
        arguments[_PATH] = str(place.folder)
        if not _has_tokenizer(place.folder):
            return None  # for some architectures, transformers would create an empty one
    with explained(place.rule, place.remedy):
        try:
            return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(**arguments))
        except (OSError, ValueError):
            if load_format == "dummy" and not place.folder:
                return None
            raise


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "tekken.json"))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a new folder, as transformers stores them."""
    header = read_header(gguf)
    with others_bars():
        describe(header, folder)
        place = _Place({_PATH: str(folder)}, "", "", folder, header)
        _stored_model(place, (torch.device("cpu"),), dtype=torch.bfloat16).save_pretrained(folder)
    (folder / PLAN_FILE).unlink(missing_ok=True)
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable only by the owner
        shutil.copymode(folder / "config.json", weights)
