"""Which tokens stay, and what a tokenizer without the others makes of texts."""

import json
import random
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import slimvlm as sv
from slimvlm.data.vocabulary import TokenizerFile, choose_vocabulary
from tests import tiny_folder, tiny_words
from tests.tables import tables

TABLES = tables(__file__)

KINDS = list(tiny_words.KINDS)
SHARES = (0.0, 0.03, 0.3, 0.8)
"""How many of the tokens that could go stay, drawn at random, beside those they are made of."""

words = st.lists(st.one_of(st.sampled_from(tiny_words.WORDS), st.text(max_size=4)), max_size=8)
texts = st.one_of(words.map("".join), words.map(" ".join), st.text())


@cache
def pair(kind, share):
    """A tokenizer, the same with fewer tokens, and what these were."""
    whole = tiny_words.KINDS[kind]()
    file = TokenizerFile("tiny", json.loads(whole.to_str()))
    others = sorted(file.texts.keys() - file.needed)
    drawn = random.Random(0).sample(others, round(share * len(others)))
    kept = tuple(sorted(file.with_parts({*file.needed, *drawn})))
    return whole, Tokenizer.from_str(file.trimmed(kept)), kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
@given(text=texts)
def test_a_text_decodes_as_before_and_one_of_kept_tokens_has_the_same(kind, share, text):
    whole, small, kept = pair(kind, share)
    before, after = whole.encode(text).ids, small.encode(text).ids
    decoded = whole.decode(before, skip_special_tokens=False)
    assert small.decode(after, skip_special_tokens=False) == decoded
    if set(before) <= set(kept):
        assert after == [kept.index(token) for token in before]


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_are_of_kept_tokens_and_without_a_needed_one_nothing_is_written(kind):
    """The property above is about something."""
    whole, _, kept = pair(kind, 0.3)
    told = [set(whole.encode(word).ids) <= set(kept) for word in tiny_words.WORDS]
    assert sum(told) > 20
    assert told.count(False) > 5
    file = TokenizerFile.of(tiny_words.tokenizer(kind))
    lost = max(file.needed)
    with pytest.raises(sv.SlimError, match=rf"tokens: {lost} .* must stay"):
        file.trimmed(file.texts.keys() - {lost})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_token_keeps_its_text_and_the_frame_its_tokens(kind):
    whole, small, kept = pair(kind, 0.3)
    assert [small.id_to_token(n) for n in range(len(kept))] == [whole.id_to_token(i) for i in kept]
    assert small.get_vocab_size() == len(kept)
    added = {i: token.content for i, token in whole.get_added_tokens_decoder().items()}
    now = {kept[i]: token.content for i, token in small.get_added_tokens_decoder().items()}
    assert now == added
    whole, small, kept = pair(kind, 0.0)
    assert small.encode("").ids == [kept.index(token) for token in whole.encode("").ids]
    assert small.encode("").ids, "a frame without tokens shows nothing"
    if whole.padding is not None:
        assert small.padding["pad_id"] == kept.index(whole.padding["pad_id"])


def test_bytes_single_characters_and_added_tokens_are_needed():
    file = TokenizerFile.of(tiny_words.tokenizer("sentencepiece"))
    needed = {file.texts[token] for token in file.needed}
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= needed
    assert {"<s>", "</s>", "<unk>", "<image>", "▁", "世", "ž", "a"} <= needed
    byte_level = TokenizerFile.of(tiny_words.tokenizer("byte_level"))
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    assert letters <= {byte_level.texts[token] for token in byte_level.needed}
    assert "<tool_call>" in {byte_level.texts[token] for token in byte_level.needed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_token_has_its_parts_and_the_size_is_what_was_asked_for(kind):
    whole = tiny_words.tokenizer(kind)
    file = TokenizerFile.of(whole)
    for size in range(len(file.needed), len(file.texts), 17):
        kept = set(sv.choose_tokens(whole, size=size, texts=tiny_words.CORPUS[:3]))
        assert file.with_parts(kept) == kept
    middle = (len(file.needed) + len(file.texts)) // 2
    assert len(sv.choose_tokens(whole, size=middle, texts=tiny_words.CORPUS)) == middle
    assert len(sv.choose_tokens(whole, size=10**6)) == len(file.texts)


def test_tokens_that_the_data_has_or_that_are_asked_for_come_first():
    whole = tiny_words.tokenizer("byte_level")
    least = len(TokenizerFile.of(whole).needed)
    for said in ("kouzelník žluťoučký", "return height"):
        kept = set(sv.choose_tokens(whole, size=least + 12, texts=[said] * 5))
        other = set(sv.choose_tokens(whole, size=least + 12, texts=["1234567890"] * 5))
        seen = set(whole(said, add_special_tokens=False)["input_ids"])
        assert len(seen & kept) > len(seen & other)
    file = TokenizerFile.of(whole)
    wanted = next(i for i in file.by_rank[::-1] if i not in file.needed)
    assert wanted in sv.choose_tokens(whole, size=len(file.needed) + 20, keep=[wanted])


def test_conversations_count_as_the_template_writes_them():
    whole = tiny_folder.processor("text")
    samples = tiny_folder.short_samples(4, sees=False)
    kept = set(sv.choose_tokens(whole, samples))
    for sample in samples:
        rendered = whole.apply_chat_template(
            [
                {"role": m["role"], "content": "".join(p["text"] for p in m["content"])}
                for m in sample.messages
            ],
            tokenize=False,
        )
        assert set(whole(rendered)["input_ids"]) <= kept


def test_auto_keeps_all_that_was_seen_and_more_where_unseen_texts_need_it():
    whole = tiny_words.tokenizer("byte_level")
    found = choose_vocabulary(whole, texts=tiny_words.CORPUS * 4)
    seen = {i for t in tiny_words.CORPUS for i in whole(t, add_special_tokens=False)["input_ids"]}
    assert seen <= set(found.tokens)
    assert found.seen == len(seen)
    assert found.coverage is not None
    assert found.coverage >= 0.99
    assert f"{len(found.tokens):,} of {found.total:,} tokens" in found.line()
    # texts that have nothing in common: what the others lack is made up by rank
    alike = sv.choose_tokens(whole, texts=["1234567890"] * 8)
    unlike = sv.choose_tokens(whole, texts=["1234567890"] * 7 + ["žluťoučký kůň úpěl"])
    assert len(unlike) > len(alike) + 20


def test_every_fourth_of_all_texts_is_held_out_and_its_share_of_kept_tokens_told():
    whole = tiny_words.tokenizer("byte_level")
    said = [tiny_words.CORPUS[i % 9] for i in range(300)]
    counts = [Counter(ids) for ids in whole(said, add_special_tokens=False)["input_ids"]]
    size = len(TokenizerFile.of(whole).needed) + 15
    shown = [text for number, text in enumerate(said, 1) if number % 4]
    tried, held_out = sv.choose_tokens(whole, size=size, texts=shown), sum(counts[3::4], Counter())
    found = choose_vocabulary(whole, texts=said, size=size)
    assert found.seen == len(sum(counts, Counter()))
    assert found.coverage == sum(held_out[token] for token in tried) / held_out.total() < 1


def test_texts_come_from_files_and_folders(tmp_path):
    with pytest.raises(sv.SlimError, match="no text file"):
        sv.choose_tokens(tiny_words.tokenizer("byte_level"), texts=[tmp_path])
    whole = tiny_words.tokenizer("byte_level")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("height " * 2000)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(sv.SlimError, match=r"picture\.png': cannot be read"):
        sv.choose_tokens(whole, texts=[tmp_path])
    (tmp_path / "picture.png").unlink()
    in_file = sv.choose_tokens(whole, texts=[tmp_path / "inner" / "a.txt"])
    assert in_file == sv.choose_tokens(whole, texts=[tmp_path])
    assert set(whole(" height", add_special_tokens=False)["input_ids"]) <= set(in_file)


def changed(**model):
    values = json.loads(tiny_words.tokenizer("sentencepiece").backend_tokenizer.to_str())
    values["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)))


def word_piece():
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize(
    ("tokenizer", "size", "message"),
    [
        (word_piece, 300, "type 'WordPiece', and only BPE"),
        (lambda: changed(dropout=0.1), 300, "dropout 0.1"),
        (lambda: object(), 300, "object is no fast tokenizer"),
        (lambda: tiny_words.tokenizer("byte_level"), None, "vocab_size 'auto' needs texts"),
    ],
)
def test_what_cannot_lose_tokens_is_refused_by_name(tokenizer, size, message):
    with pytest.raises(sv.SlimError, match=message):
        sv.choose_tokens(tokenizer(), size=size)


def small_bpe(merges):
    pieces = ["a", "b", "c", *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(models.BPE(vocab, merges))


@pytest.mark.parametrize(("merges", "inner"), TABLES["merges"])
def test_a_token_keeps_the_parts_that_it_is_really_made_of(merges, inner):
    raw = small_bpe([tuple(pair) for pair in merges])
    file = TokenizerFile("tiny", json.loads(raw.to_str()))
    whole, part = raw.token_to_id("abc"), raw.token_to_id(inner)
    kept = file.with_parts([*file.needed, whole])
    assert kept == {*range(3), whole, part}
    small = Tokenizer.from_str(file.trimmed(kept))
    assert small.encode("abc").tokens == raw.encode("abc").tokens == ["abc"]
