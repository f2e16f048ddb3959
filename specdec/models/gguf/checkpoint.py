"""Load a GGUF file into a transformers model.

The file's configuration, tokenizer and names of weights are converted by transformers, which takes long for a large
vocabulary, and stored in a folder (`describe`). Weights are dequantized at every load, straight into their dtype
(`read_weights`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.models.gguf.blocks import dequantize
from specdec.models.gguf.header import Header, StoredTensor, write_without_vocabulary

PLAN_FILE = "weights.json"  # in the folder: {"names": by their name in the file, "altered": names in the file}
DESCRIPTION_BYTES = 200_000_000  # maximum disk space of a folder


def describe(header: Header, folder: Path) -> None:
    """Write a file's configuration, its tokenizer (if it has one) and the plan for its weights into a new folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = _config(header)
    config.save_pretrained(folder)
    if "tokenizer.ggml.model" in header.metadata:
        _save(_tokenizer(header, config.model_type), folder)
    if not is_read_by_transformers(header):
        with torch.device("meta"):
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            plan = _plan(header, auto_class.from_config(config))
        (folder / PLAN_FILE).write_text(json.dumps(plan))


def is_read_by_transformers(header: Header) -> bool:
    """Whether transformers has a reader of its own for an architecture, which is as fast as this one."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    return bool(is_gguf_arch_supported(header.architecture))


def read_plan(folder: Path) -> tuple[dict[str, str], set[str]]:
    """The names of weights in the model by those in the file, and the names in the file of those that are altered.

    folder: as written by `describe`.
    """
    plan = json.loads((folder / PLAN_FILE).read_text())
    return plan["names"], set(plan["altered"])


def read_weights(header: Header, folder: Path, dtype: torch.dtype, unread: Collection[str] = ()) -> dict[str, Any]:
    """A state dict for `from_pretrained`, most of whose tensors are dequantized when they are indexed.

    folder: as written by `describe`. unread: names in the model of weights that are not read: tensors of their shape
    whose values are undefined and take no memory.
    """
    (names, altered), content = read_plan(folder), header.content()
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Any] = {}
    for stored in header.tensors:
        weight = Weight(content[stored.start : stored.start + stored.num_bytes], stored, dtype)
        if names.get(stored.name) in unread:
            weights[names[stored.name]] = torch.empty(1, dtype=dtype).expand(stored.shape)
        elif stored.name in altered:
            weights |= _altered(header, weight, names, weights, config)
        elif stored.name in names:
            weights[names[stored.name]] = weight
    return weights


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight in the file, dequantized when it is indexed with `...`, as transformers indexes what it loads."""

    content: NDArray[np.uint8]
    stored: StoredTensor
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> Tensor:
        return self.read(self.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.content, self.stored.kind, dtype).view(self.stored.shape)


def _config(header: Header) -> Any:
    from transformers import AutoConfig

    if is_read_by_transformers(header):
        return AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    with TemporaryDirectory() as folder, _quiet():
        write_without_vocabulary(header, Path(folder, "header.gguf"))
        config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
    config.vocab_size = next(each.shape[0] for each in header.tensors if each.name == "token_embd.weight")
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers, such as that the size of the vocabulary is missing."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tokenizer(header: Header, model_type: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # with the type, transformers does not read the configuration again
    options = {"tokenizer_type": model_type} if TOKENIZER_MAPPING_NAMES.get(model_type) else {}
    return AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name, **options)


def _save(tokenizer: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.clean_up_tokenization_spaces = False  # transformers 5.17 sets True here and warns when decoding
    tokenizer.save_pretrained(folder)
    stored = AutoTokenizer.from_pretrained(folder)
    if stored.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        # its class has a normalizer or a split of its own; this one takes what is stored
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}))


def _plan(header: Header, model: Any) -> dict[str, Any]:
    """Weights' names in the model, and which weights transformers reorders, shifts or merges with others."""
    processor, names = processor_of(header, model.config.to_dict()), weight_names(header, model)
    return {"names": names, "altered": [each.name for each in header.tensors if _is_altered(each, processor, names)]}


def weight_names(header: Header, model: Any) -> dict[str, str]:
    """The name in a transformers model of each weight that it has, by the name in the file."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names: dict[str, str] = get_gguf_hf_weights_map(model, processor_of(header, model.config.to_dict()))
    return names


def _is_altered(stored: StoredTensor, processor: Any, names: Mapping[str, str]) -> bool:
    if len(stored.shape) > 2:
        return True  # experts: a probe of their size takes long
    probe = np.broadcast_to(np.float32(-1), stored.shape)
    result = processed(processor, probe, stored.name, names, {})
    return result.weights is not probe or result.name != stored.name


def _altered(
    header: Header, weight: Weight, names: Mapping[str, str], weights: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The weights of the model that one in the file is a part of."""
    merged: dict[str, Tensor] = {name: each for name, each in weights.items() if isinstance(each, Tensor)}
    processor, whole = processor_of(header, config), weight.read(torch.float32)
    result = processed(processor, whole.numpy(), weight.stored.name, names, merged)
    if result.name in names:
        merged[names[result.name]] = torch.from_numpy(np.copy(result.weights))
    return {name: each.to(weight.dtype) for name, each in merged.items()}


def processor_of(header: Header, config: Mapping[str, Any]) -> Any:
    """What transformers converts the weights of an architecture by."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)


def processed(
    processor: Any, weights: NDArray[np.float32], name: str, names: Mapping[str, str], merged: dict[str, Tensor]
) -> Any:
    """A weight of the model, as `weights` and `name`, from the one of this name in the file.

    merged: weights of the model that consist of several in the file, which the processor adds to.
    """
    parameters = {"tensors": merged}
    return processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parameters)
