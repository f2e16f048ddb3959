"""A draft model with another tokenizer: the same distribution, the right tokens, and a text that is read in step."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import coupled_runs, exact_coupled_distribution, exact_distribution, race_pieces
from specdec.conformance.gates import distance
from specdec.conformance.toys import joint_distribution, table
from specdec.decoding import Decoder
from specdec.models import vocabularies
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.models.vocabularies import SAMPLE, Rewritten, SharedVocabulary, pieces_of, share
from specdec.proposers.draft_model import DraftModelProposer
from specdec.requests import Batch, Request
from specdec.runtime.artifacts import LoadError
from specdec.sampling.distributions import Dense, Partial
from specdec.sampling.randomness import uniforms
from specdec.verification import Draft, verify_block, verify_coupled

# ---- toys: the exact distribution

TARGET_PIECES = dict(enumerate([b"a", b"b", b"c"]))
DRAFT_PIECES = dict(enumerate([b"c", b"ab", b"a", b"d"]))  # a and c are in both, under other ids
# half of each row is on what is shared, and that is made of halves
ROWS = torch.tensor([[1, 1, 1, 1], [2, 1, 0, 1], [0, 2, 2, 0], [1, 2, 1, 0], [0, 1, 2, 1]]).double() / 4
PROMPT, GRID = (0, 1), (2, 4, 12)


def longest_match(text: str) -> list[int]:
    """The draft's tokens of a text, from the left; d where it has none."""
    tokens = []
    while text:
        found = next((token for token, piece in [(1, "ab"), (0, "c"), (2, "a")] if text.startswith(piece)), 3)
        tokens.append(found)
        text = text[2 if found == 1 else 1 :]
    return tokens


def toy_maker(seed: int, gamma: int, proposer: type[DraftModelProposer] = DraftModelProposer):
    generator = torch.Generator().manual_seed(seed)
    target = MarkovModel(table(seed))
    draft = MarkovModel(ROWS[torch.randint(len(ROWS), (4, 4), generator=generator)])
    shared = SharedVocabulary(TARGET_PIECES, DRAFT_PIECES, longest_match)

    def make(source, rule, max_batch_size):
        proposing = proposer(draft, source, shared=shared)
        return Decoder(target, proposing, gamma, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    return target, make


@pytest.mark.parametrize(("gamma", "num_tokens", "seed"), [(1, 4, 0), (1, 3, 1), (2, 3, 2)])
def test_joint_distribution_of_two_vocabularies(gamma: int, num_tokens: int, seed: int) -> None:
    target, make = toy_maker(seed, gamma)
    assert (
        distance(exact_distribution(make, PROMPT, num_tokens, GRID), joint_distribution(target, PROMPT, num_tokens))
        < 1e-12
    )


def test_joint_distribution_of_two_vocabularies_under_block_verification() -> None:
    target, make = toy_maker(4, 1)
    distribution = exact_distribution(make, PROMPT, 3, GRID, rule=verify_block)
    assert distance(distribution, joint_distribution(target, PROMPT, 3)) < 1e-12


def test_joint_distribution_of_two_vocabularies_under_coupled_verification() -> None:
    target, make = toy_maker(3, 2)
    pieces = race_pieces([*target.table.flatten(0, 1).tolist(), [0.5, 0, 0.5], [1, 0, 0], [0, 0, 1]])
    distribution = exact_coupled_distribution(coupled_runs(make, PROMPT, [pieces] * 2, rule=verify_coupled))
    assert distance(distribution, joint_distribution(target, PROMPT, 2)) < 1e-12


class NotNormalised(DraftModelProposer):
    """Draws from the draft's distribution over the shared tokens, but declares it as it was before renormalising."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        if not isinstance(draft.distribution, Partial):
            return draft
        distribution = draft.distribution
        return replace(
            draft,
            distribution=Partial(Dense(distribution.inner.probs * 0.5), distribution.tokens, distribution.vocab_size),
        )


def test_a_distribution_that_is_not_normalised_again_is_caught() -> None:
    target, make = toy_maker(0, 1, NotNormalised)
    assert distance(exact_distribution(make, PROMPT, 3, (2, 4, 24)), joint_distribution(target, PROMPT, 3)) > 0.02


# ---- tokenizers made for the test


@cache
def trained(kind: str, size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the sample: byte-level, or as SentencePiece has it, the leading space by either way."""
    special, alphabet = ["<unk>", "<s>", "</s>"], []
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "byte-level":
        tokenizer, alphabet, single = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet(), []
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if kind == "prepending":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special + single, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE.splitlines(), trainer)
    return wrapped(tokenizer, special)


def wrapped(tokenizer: Tokenizer, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """As transformers has it, with these special tokens and no others."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    unk, bos, eos = special
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unk, bos_token=bos, eos_token=eos)


KINDS = ["byte-level", "metaspace", "prepending"]
SIZES = {"byte-level": 500, "metaspace": 600, "prepending": 700}


def shared_between(target: str, draft: str) -> SharedVocabulary:
    return share(trained(target, SIZES[target]), trained(draft, SIZES[draft]), (SIZES[target], SIZES[draft]))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_put_together_are_the_text(kind: str) -> None:
    """Bytes that no other token has, too; SentencePiece adds a space in front."""
    tokenizer, text = trained(kind, SIZES[kind]), "Straße, naïve: 你好\n\tx = [1, 2]  # done"
    pieces = pieces_of(tokenizer, SIZES[kind])
    spelled = b"".join(pieces[token] for token in tokenizer(text).input_ids)
    assert spelled.decode().removeprefix("" if kind == "byte-level" else " ") == text
    assert pieces[tokenizer.eos_token_id] == "</s>"
    assert len(pieces_of(tokenizer, 300)) == 300  # of a model with fewer rows than its tokenizer has tokens


@pytest.mark.parametrize(("target", "draft"), [(a, b) for a in KINDS for b in KINDS if a != b])
def test_shared_tokens_spell_the_same(target: str, draft: str) -> None:
    shared = shared_between(target, draft)
    pieces = [pieces_of(trained(kind, SIZES[kind]), SIZES[kind]) for kind in (target, draft)]
    pairs = list(zip(shared.tokens.tolist(), shared.draft_tokens.tolist(), strict=True))
    assert all(pieces[0][in_target] == pieces[1][in_draft] for in_target, in_draft in pairs)
    assert len({in_draft for _, in_draft in pairs}) == len(pairs) > 100
    assert shared.tokens.tolist() == sorted(shared.tokens.tolist())
    assert shared.to_draft(shared.tokens.view(1, -1)).tolist() == [shared.draft_tokens.tolist()]


@pytest.mark.parametrize(("target", "draft"), [(a, b) for a in KINDS for b in KINDS if a != b])
def test_all_tokens_that_spell_the_same_are_shared(target: str, draft: str) -> None:
    """By brute force, from texts: words with a leading space and without are other tokens, and both are shared.

    A token's text is what it adds after another, so that no decoder takes its space away.
    """

    def spelled(kind: str) -> dict[str, int]:
        tokenizer = trained(kind, SIZES[kind])
        before = tokenizer("x", add_special_tokens=False).input_ids
        start, special = len(tokenizer.decode(before)), set(tokenizer.all_special_ids)
        texts = {token: tokenizer.decode([*before, token])[start:] for token in range(SIZES[kind])}
        return {text: token for token, text in texts.items() if token not in special and "\ufffd" not in text and text}

    in_target, in_draft = spelled(target), spelled(draft)
    expected = {(in_target[text], in_draft[text]) for text in in_target.keys() & in_draft.keys()}
    shared = shared_between(target, draft)
    found = set(zip(shared.tokens.tolist(), shared.draft_tokens.tolist(), strict=True))
    assert expected <= found
    spaced = [text for text in in_target.keys() & in_draft.keys() if text[0] == " " and text[1:].isalpha()]
    assert len(spaced) > 20
    assert sum(text[1:] in in_target.keys() & in_draft.keys() for text in spaced) > 5, "both with the space and without"


WORDS = ["the", " keeper", " ", "  ", "\n", "é", "你", "1987", ' "No', ".", " x"]


@pytest.mark.parametrize("draft", KINDS)
@settings(max_examples=50)
@given(words=st.lists(st.sampled_from(WORDS), max_size=30), width=st.integers(1, 5))
def test_a_text_that_grows_has_the_tokens_of_the_whole(draft: str, words: list[str], width: int) -> None:
    """Byte-level tokens of the target break characters apart; what is not whole yet is not read yet."""
    shared, tokenizer = shared_between("byte-level", draft), trained("byte-level", SIZES["byte-level"])
    tokens, text = tokenizer("".join(words)).input_ids, Rewritten(shared)
    for end in range(0, len(tokens) + width, width):
        text.follow(tokens[:end])
        whole = b"".join(shared.target_pieces[token] for token in tokens[:end]).decode(errors="ignore")
        assert text.tokens == shared.encode(whole)
        assert text.num_settled <= len(text.tokens)


def test_reading_on_costs_the_same_however_long_the_text_is() -> None:
    """Counted, not timed: at each of 2,000 tokens a few words are encoded again, never the text."""
    shared, tokenizer = shared_between("byte-level", "metaspace"), trained("byte-level", SIZES["byte-level"])
    lengths: list[int] = []
    encode = shared.encode
    shared.encode = lambda text: lengths.append(len(text)) or encode(text)
    tokens = tokenizer(SAMPLE * 4).input_ids[:2000]
    text = Rewritten(shared)
    for end in range(1, len(tokens) + 1):
        text.follow(tokens[:end])
    assert len(text.tokens) > 1000
    assert max(lengths) < 120
    assert sum(lengths) < 12 * len(SAMPLE * 4)


def read(shared: SharedVocabulary, tokens: list[int]) -> list[int]:
    text = Rewritten(shared)
    text.follow(tokens)
    return text.tokens


def test_special_tokens_are_read_as_the_draft_encodes_them() -> None:
    """Those that it has as its own, others as text; some models use the one that begins a text within it, too."""
    tokenizer, other = trained("byte-level", SIZES["byte-level"]), trained("metaspace", SIZES["metaspace"])
    shared, bos = shared_between("byte-level", "metaspace"), tokenizer.bos_token_id
    keeper = tokenizer("the keeper").input_ids
    assert read(shared, [bos, *keeper, tokenizer.eos_token_id, bos]) == shared.encode("<s>the keeper</s><s>")
    assert shared.encode("<s></s>") == [other.bos_token_id, other.eos_token_id]


def test_the_start_of_a_text_is_the_drafts() -> None:
    """It adds its own, or does not know the target's."""
    tokenizer = trained("byte-level", SIZES["byte-level"])
    state = trained("metaspace", SIZES["metaspace"]).backend_tokenizer.to_str()
    adds = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), bos_token="<s>")
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adds.bos_token_id)]
    )
    lacks = wrapped(Tokenizer.from_str(state.replace('"<s>"', '"<b>"')), ["<unk>", "<b>", "</s>"])
    keeper, sizes = tokenizer("the keeper").input_ids, (SIZES["byte-level"], SIZES["metaspace"])
    for draft, prefix in ((adds, [adds.bos_token_id]), (lacks, [])):
        shared = share(tokenizer, draft, sizes)
        assert read(shared, [tokenizer.bos_token_id, *keeper]) == [*prefix, *shared.encode("the keeper")]
        assert read(shared, keeper) == [*prefix, *shared.encode("the keeper")]


# ---- real models


@cache
def llama(kind: str, seed: int) -> CausalLM:
    tokenizer = trained(kind, SIZES[kind])
    model = tiny.make("llama", tiny.GQA | {"vocab_size": SIZES[kind], "max_position_embeddings": 256})
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return CausalLM(model, tokenizer)


PROMPTS = ["The old lighthouse keeper", "x = 5", 'Dear Dr. Williams, "thank you" for the salt. ' * 3, "Der Vertrag"]


@pytest.mark.parametrize("method", ["draft_model", "hybrid", "tree"])
@pytest.mark.parametrize(("target", "draft"), [("byte-level", "prepending"), ("metaspace", "byte-level")])
def test_greedy_output_is_the_targets(target: str, draft: str, method: str) -> None:
    """Four prompts in two slots, float32; the draft is a random model with a tokenizer of another kind."""
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    expected = [c.token_ids for c in Engine(llama(target, 1)).generate(PROMPTS, greedy)]
    engine = Engine(llama(target, 1), method=method, draft=llama(draft, 2), max_batch_size=2)
    completions = engine.generate(PROMPTS, greedy)
    assert [c.token_ids for c in completions] == expected
    assert sum(c.counts.num_drafted for c in completions) > 0


def test_a_sampled_row_does_not_depend_on_its_batch() -> None:
    params = [
        SamplingParams(temperature=0.5 + 0.2 * i, top_p=0.9, frequency_penalty=0.1 * i, max_tokens=9 + 4 * i, seed=i)
        for i in range(4)
    ]
    target, draft = llama("byte-level", 1), llama("prepending", 2)

    def outputs(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
        engine = Engine(target, method="draft_model", draft=draft, max_batch_size=size)
        chosen = engine.generate([PROMPTS[i] for i in rows], [params[i] for i in rows])
        return [c.token_ids for c in chosen]

    assert outputs(range(4), 3) == [outputs([i], 1)[0] for i in range(4)]


def restricted_greedy(lm: CausalLM, shared: SharedVocabulary, tokens: list[int], num_tokens: int) -> list[int]:
    """The draft model's next tokens in the target's ids, from encoding the whole text again for each token."""
    pieces = [shared.target_pieces.get(token, "") for token in tokens]
    spelled = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    own = shared.encode(codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)) or [0]
    drafted = []
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([own]), use_cache=False).logits[0, -1]
        place = int(logits[shared.draft_tokens].argmax())
        drafted.append(int(shared.tokens[place]))
        own = [*own, int(shared.draft_tokens[place])]
    return drafted


@pytest.mark.parametrize("records", [False, True])
def test_the_draft_reads_in_step(records: bool) -> None:
    """Every draft of ragged rows equals that of encoding the text again, though its last words change their tokens."""
    target, draft = llama("byte-level", 1), llama("prepending", 2)
    shared = share(target.tokenizer, draft.tokenizer, (target.vocab_size, draft.vocab_size))
    seen: list[tuple[list[int], list[int]]] = []

    class Watched(DraftModelProposer):
        def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
            made = super().propose(batch, limits)
            for row, drafted, length in zip(batch.rows, made.tokens.tolist(), made.num_proposed.tolist(), strict=True):
                if row:
                    seen.append((list(row.tokens), drafted[:length]))
            return made

    proposer = Watched(draft, uniforms, shared=shared)
    decoder = Decoder(target, proposer, 3, max_batch_size=2, records=records)
    prompts = [tuple(target.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=12)
    list(decoder.run([Request(i, prompt, params) for i, prompt in enumerate(prompts)]))
    assert len(seen) > 20
    for tokens, drafted in seen:
        assert drafted == restricted_greedy(draft, shared, tokens, len(drafted))


@cache
def letters(order: int) -> CausalLM:
    """A model over single ASCII characters, whose ids are in another order; the same model else."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(order)).tolist() if order else list(range(96))
    tokenizer = Tokenizer(models.BPE(dict(zip(characters, ids, strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = tiny.make("llama", tiny.GQA | {"vocab_size": 96, "max_position_embeddings": 256})
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
        weight.data[torch.tensor(ids)] = weight.data.clone()
    return CausalLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_same_model_under_other_ids_is_accepted_always(temperature: float) -> None:
    """Tokens are matched by what they spell; by their ids hardly any would be accepted."""
    params = [SamplingParams(temperature=temperature, max_tokens=30, ignore_eos=True, seed=i) for i in range(3)]
    engine = Engine(letters(0), method="draft_model", draft=letters(1), max_batch_size=2)
    completions = engine.generate(PROMPTS[:3], params)
    assert [c.counts.acceptance_rate for c in completions] == [1.0] * 3


# ---- bad input


def test_the_number_of_shared_tokens_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    vocabularies._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "specdec"):
        for _ in range(2):
            Engine(llama("byte-level", 1), method="draft_model", draft=llama("prepending", 2))
    assert len(caplog.records) == 1
    assert "the draft's tokenizer, of 700 tokens, shares" in caplog.text
    assert "of the target's 500, which make up" in caplog.text
    assert "the output distribution is unchanged" in caplog.text


def test_too_small_an_intersection_is_refused() -> None:
    """Single characters hardly occur in a text of the target's tokens."""
    message = r"shares \d+ of the target's 500, which make up \d+% of a sample text and must make up at least 50%"
    with pytest.raises(ValueError, match=message):
        Engine(llama("byte-level", 1), method="draft_model", draft=letters(0))


def test_nothing_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="must share tokens with the target's, but has none of them"):
        SharedVocabulary({0: b"a"}, {0: b"b"}, longest_match)


def test_a_tokenizer_without_text_per_token_is_refused() -> None:
    word_piece = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="must be byte-level or SentencePiece-like for a draft"):
        pieces_of(PreTrainedTokenizerFast(tokenizer_object=word_piece), 3)
    engine = Engine(tiny.make("llama", tiny.GQA), tokenizer=PreTrainedTokenizerFast(tokenizer_object=word_piece))
    with pytest.raises(ValueError, match="SentencePiece-like for bad_words; forbid tokens by logit_bias instead"):
        engine.generate([0], SamplingParams(max_tokens=2, bad_words="b"))


def test_a_head_needs_the_targets_own_vocabulary() -> None:
    target, head = llama("byte-level", 1), letters(0)
    head.draft_vocabulary, head.format = torch.arange(3), "eagle"
    try:
        with pytest.raises(ValueError, match="the draft's vocabulary of 96 tokens must be the target's, 500"):
            Engine(target, method="eagle", draft=head)
    finally:
        del head.draft_vocabulary, head.format


def test_another_vocabulary_is_checked_before_weights_are_read(tmp_path) -> None:
    """A draft that shares enough is refused for its weights, one that does not before they are looked at."""
    folders = {}
    for name, lm in {"target": llama("byte-level", 1), "near": llama("prepending", 2), "far": letters(0)}.items():
        folders[name] = tmp_path / name
        lm.model.config.save_pretrained(folders[name])
        lm.tokenizer.save_pretrained(folders[name])
        (folders[name] / "model.safetensors").write_bytes(b"not weights")
    for name, error, message in [
        ("near", LoadError, "near' must hold an undamaged transformers model"),
        ("far", ValueError, "which make up .* and must make up at least 50% of it"),
    ]:
        with pytest.raises(error, match=message):
            Engine.load(str(folders["target"]), draft=str(folders[name]), method="draft_model", dtype=torch.float32)
