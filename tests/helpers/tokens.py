"""Small tokenizers whose decoders do what real ones do."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CLEANED = [
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁hello",
    "▁.",
    ".",
    "▁,",
    ",",
    "▁do",
    "▁n't",
    "n't",
    "▁'s",
    "'s",
    "▁'",
    "'",
    "?",
]


def cleaning() -> PreTrainedTokenizerFast:
    """As T5's, with a decoder that takes back spaces before punctuation."""
    raw = Tokenizer(models.Unigram([(word, -1.0) for word in CLEANED], unk_id=2))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=True, **special)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: ## continues a word, and the decoder cleans up."""
    words = ["[PAD]", "[UNK]", "hello", "##s", ".", ",", "do", "n", "'", "t", "##t", "##.", "?"]
    raw = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def sentencepiece(
    letters: Sequence[str] = tuple(map(chr, range(33, 127))), data: Sequence[int] = range(256)
) -> PreTrainedTokenizerFast:
    """As Llama 2's: characters, bytes to fall back on, and a first space that the decoder drops."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in data), *letters, "▁", "▁▁", "▁▁▁▁"]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def letters(size: int) -> PreTrainedTokenizerFast:
    """A token for each character and, as real ones have, for some pairs, which can be written in two ways."""
    singles = ["<pad>", "<s>", "</s>", *map(chr, range(97, 123)), " ", ".", ","]
    merges = [(left, right) for left in "aeiou" for right in "nrst"] + [("t", "h"), ("c", "h")]
    names = [*singles, *("".join(pair) for pair in merges)]
    assert len(names) <= size
    names += [f"<{index}>" for index in range(len(names), size)]
    raw = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def characters(size: int) -> PreTrainedTokenizerFast:
    """A token for each of `size` characters, so that a text can be written in one way only."""
    names = ["<pad>", "<s>", "</s>", *map(chr, range(97, 123)), " ", ".", ","]
    names += map(chr, range(0x391, 0x391 + size - len(names)))
    raw = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
