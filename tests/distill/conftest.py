from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny

from specdec.distill.corpus import Text


@pytest.fixture
def target():
    """A random Llama over 61 tokens."""
    return tiny.make("llama", tiny.GQA)


@pytest.fixture
def texts() -> list[Text]:
    """Texts of several lengths and temperatures; every token depends on the one before it."""
    random = torch.Generator().manual_seed(0)

    def text(index: int) -> Text:
        tokens = [3 + index // 58, 3 + index % 58]  # no prompt occurs twice
        while len(tokens) < 12 + index % 7:
            tokens.append((tokens[-1] * 7 + int(torch.randint(2, (1,), generator=random))) % 61)
        return Text(tuple(tokens[:4]), tuple(tokens[4:]), (0.0, 1.0, None)[index % 3], index)

    return [text(index) for index in range(240)]


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory, default_vocabulary) -> Path:
    """A tiny random Llama with the default pair's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("target")
    model = tiny.make("llama", tiny.GQA | {"vocab_size": default_vocabulary.vocab_size, "max_position_embeddings": 256})
    model.save_pretrained(folder)
    default_vocabulary.tokenizer.save_pretrained(folder)
    return folder
