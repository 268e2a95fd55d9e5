"""Choose the tokens that a model needs for some data, and remove the others from its tokenizer.

Tokens are chosen by count, then by the model's own ranks. All special tokens, bytes and single
characters stay as well, so that every text can still be written, and with each token those that it
is made of. A text whose tokens all stay gets the same tokens afterwards: BPE joins two parts at a
time, by rank. Each token is built in one way, so it stays usable where every part on that way
stays. Then a text's joins all exist, and all others have a higher rank.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from slimvlm.core.documents import read_text
from slimvlm.core.errors import ConfigError, DataError, UnsupportedModelError, raised_as, shortened
from slimvlm.core.files import path_of
from slimvlm.data.chat import render, tokenizer_of
from slimvlm.data.samples import VALIDATION_EVERY, Sample
from slimvlm.data.templates import check_texts

ENOUGH = 0.99  # share of the tokens of unseen texts that ``auto`` keeps
_AT_ONCE = 256
_SOME_LINES = re.compile(r"(?s:.{1,4096})[^\n]*\n?")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PAIRS = ("BertProcessing", "RobertaProcessing")

Pair = tuple[str, str]


@dataclass
class TokenizerFile:
    """The content of a ``tokenizer.json``."""

    name: str  # the tokenizer's class, for messages
    values: Mapping[str, Any]
    special: frozenset[int] = frozenset()  # ids of special tokens
    texts: dict[int, str] = field(init=False)  # every token as it is written in the file, by id
    _pieces: dict[str, int] = field(init=False)  # the model's own tokens
    _ranks: dict[Pair, int] = field(init=False)  # the joins of a BPE model
    _makers: dict[str, list[Pair]] = field(init=False)  # for each token the joins that may make it
    _last_joins: dict[str, Pair | None] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, processor: Any) -> "TokenizerFile":
        """Read it from a processor or tokenizer; refuse a kind that cannot be trimmed."""
        tokenizer = tokenizer_of(processor)
        name = type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            told = "is no fast tokenizer; only one with a tokenizer.json can be trimmed"
            raise UnsupportedModelError(f"tokens: {name} {told}")
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        model = values["model"]
        if model["type"] != "BPE":
            told = f"is of type {model['type']!r}, and only BPE can be trimmed"
            raise UnsupportedModelError(f"tokens: {name} {told}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                told = f"has {option} {model[option]!r}, with which it cannot be trimmed"
                raise UnsupportedModelError(f"tokens: {name} {told}")
        _with_ids(values["post_processor"], int, name)  # refuses an unknown kind
        return cls(name, values, frozenset(tokenizer.all_special_ids))

    def __post_init__(self) -> None:
        self._pieces = dict(self.values["model"]["vocab"])
        self.texts = {index: piece for piece, index in self._pieces.items()}
        self.texts |= {token["id"]: token["content"] for token in self.values["added_tokens"]}
        self._ranks = {(a, b): rank for rank, (a, b) in enumerate(self.values["model"]["merges"])}
        self._makers = defaultdict(list)
        for pair in self._ranks:
            self._makers["".join(pair)].append(pair)

    @cached_property
    def needed(self) -> frozenset[int]:
        """Tokens that always stay: special and added ones, bytes, and single characters."""
        found = {token["id"] for token in self.values["added_tokens"]} | self.special
        added: dict[int, int] = {}
        _with_ids(self.values["post_processor"], lambda i: added.setdefault(i, i), self.name)
        found |= added.keys()
        if self.values["padding"] is not None:
            found.add(self.values["padding"]["pad_id"])
        model, pieces = self.values["model"], self._pieces
        if isinstance(model.get("unk_token"), str) and model["unk_token"] in pieces:
            found.add(pieces[model["unk_token"]])
        found |= {i for piece, i in pieces.items() if len(piece) == 1 or _BYTE.fullmatch(piece)}
        return frozenset(self.with_parts(found))

    @cached_property
    def by_rank(self) -> list[int]:
        """All tokens in the order of the tokenizer's own ranks, the most frequent first."""
        first = {result: min(map(self._ranks.__getitem__, p)) for result, p in self._makers.items()}
        last = len(self._ranks)
        return sorted(self.texts, key=lambda i: (first.get(self.texts[i], last), i))

    def with_parts(self, tokens: Iterable[int]) -> set[int]:
        """Return tokens with all tokens that they are made of, step by step."""
        found: set[int] = set()
        waiting = list(tokens)
        while waiting:
            token = waiting.pop()
            if token in found:
                continue
            found.add(token)
            piece = self.texts[token]
            if piece not in self._last_joins:  # the parts that are joined last to make it, if any
                makers = self._makers.get(piece, [])
                pair = makers[0] if len(makers) == 1 else None
                parts = list(piece) if len(makers) > 1 else []
                while len(parts) > 1:
                    pairs = list(pairwise(parts))
                    ranks = [self._ranks.get(each, len(self._ranks)) for each in pairs]
                    at = min(range(len(pairs)), key=ranks.__getitem__)
                    pair = pairs[at] if pairs[at] in self._ranks else None
                    if pair is None:
                        break
                    parts[at : at + 2] = ["".join(pair)]
                self._last_joins[piece] = pair
            pair = self._last_joins[piece]
            waiting += [self._pieces[part] for part in pair or () if part in self._pieces]
        return found

    def trimmed(self, kept: Iterable[int]) -> str:
        """Return the file's content with fewer tokens, numbered anew in the same order."""
        kept = set(kept)
        if unknown := sorted(kept - self.texts.keys()):
            raise ConfigError(f"tokens: {self.name} has no token {unknown[0]}")
        if lost := sorted(self.needed - kept):
            named = f"{lost[0]} ({shortened(self.texts.get(lost[0], ''))})"
            told = "must stay, as all special tokens, bytes and single characters"
            raise ConfigError(f"tokens: {named} {told}")
        new = {old: index for index, old in enumerate(sorted(kept))}
        vocab = {piece: new[index] for piece, index in self._pieces.items() if index in new}
        merges = [pair for pair in self._ranks if {*pair, "".join(pair)} <= vocab.keys()]
        model = {**self.values["model"], "vocab": vocab, "merges": merges}
        added = [{**t, "id": new[t["id"]]} for t in self.values["added_tokens"]]
        padding = self.values["padding"]
        values = {
            **self.values,
            "model": model,
            "added_tokens": sorted(added, key=lambda token: int(token["id"])),
            "post_processor": _with_ids(self.values["post_processor"], new.__getitem__, self.name),
            "padding": padding and {**padding, "pad_id": new[padding["pad_id"]]},
        }
        return json.dumps(values, ensure_ascii=False)


def _with_ids(processor: Any, new: Callable[[int], int], name: str) -> Any:
    """Return a post-processor with other ids of the tokens that it adds; refuse an unknown kind."""
    kind = "ByteLevel" if processor is None else processor["type"]
    if kind == "Sequence":
        inner = [_with_ids(each, new, name) for each in processor["processors"]]
        return {**processor, "processors": inner}
    if kind == "TemplateProcessing":
        old = processor["special_tokens"].items()
        tokens = {text: {**token, "ids": list(map(new, token["ids"]))} for text, token in old}
        return {**processor, "special_tokens": tokens}
    if kind in _PAIRS:
        pairs = {part: processor[part] for part in ("sep", "cls")}
        return {**processor, **{f: [text, new(index)] for f, (text, index) in pairs.items()}}
    if kind != "ByteLevel":
        raise UnsupportedModelError(f"tokens: {name} has a post-processor of type {kind!r}")
    return processor


class Vocabulary(NamedTuple):
    """The tokens to keep, and their coverage of unseen texts."""

    tokens: tuple[int, ...]  # sorted ids
    total: int  # tokens of the tokenizer
    seen: int  # different tokens in the texts
    # share of the tokens of a quarter of the texts that a choice of this size from the others keeps
    coverage: float | None  # None with fewer than four texts

    def line(self) -> str:
        """Summarise it in one line."""
        known = "" if self.coverage is None else f"; they cover {self.coverage:.2%} of unseen text"
        return (
            f"vocabulary: {len(self.tokens):,} of {self.total:,} tokens stay; the data has "
            f"{self.seen:,} different ones{known}"
        )


def choose_tokens(
    processor: Any,
    samples: Sequence[Sample] = (),
    size: int | None = None,
    texts: Iterable[str | Path] = (),
    keep: Iterable[int] = (),
) -> tuple[int, ...]:
    """Choose the tokens to keep for some data; return their ids, sorted.

    Counted are conversations as the chat template of ``processor`` writes them, and ``texts`` or
    paths of text files and folders. ``size`` is how many tokens stay; None for as many as the data
    needs: all that it has, and more, in the order of the model's own ranks, to cover 99 % of unseen
    text (measured on a quarter). Ids in ``keep`` stay beside special tokens, bytes and characters.

    Raises:
        ConfigError: If ``size`` is smaller than what must stay, or a path cannot be read.
        UnsupportedModelError: If the tokenizer is of a kind that cannot be trimmed.
    """
    return choose_vocabulary(processor, samples, size, texts, keep).tokens


def choose_vocabulary(
    processor: Any,
    samples: Sequence[Sample] = (),
    size: int | None = None,
    texts: Iterable[str | Path] = (),
    keep: Iterable[int] = (),
    fewest: int = 0,
) -> Vocabulary:
    """`choose_tokens` with their coverage; with ``size`` None at least ``fewest`` tokens."""
    file = TokenizerFile.of(processor)
    must = file.with_parts({*file.needed, *(i for i in keep if i in file.texts)})
    shown, unseen = Counter[int](), Counter[int]()
    written = (render(processor, sample.messages) for sample in samples)
    further = (read_texts(text) if isinstance(text, Path) else [text] for text in texts)
    remaining, numbers = chain(written, chain.from_iterable(further)), count(1)
    while some := list(islice(remaining, _AT_ONCE)):
        # settings of tokenizers fail in many ways
        with raised_as(DataError, Exception, "vocabulary: the tokenizer refuses a text"):
            check_texts(tokenizer_of(processor).name_or_path, some)
            rows = tokenizer_of(processor)(some, add_special_tokens=False)["input_ids"]
        for ids in rows:  # every fourth text is counted apart, to estimate what unseen texts need
            (shown if next(numbers) % VALIDATION_EVERY else unseen).update(ids)
    everything = shown + unseen
    if size is None:
        if not everything:
            raise ConfigError("vocab_size 'auto' needs texts: give --data or --vocab-text")
        # enough are the first of those in the order of the shown texts that cover the unseen ones
        covered = accumulate(unseen[i] for i in _in_order(file, must, shown, len(file.texts)))
        wanted, numbered = ENOUGH * unseen.total(), enumerate(covered, 1)
        enough = next((number for number, part in numbered if part >= wanted), len(file.texts))
        seen = len(file.with_parts({*must, *everything}))
        size = max(seen, enough, min(fewest, len(file.texts)))
    if len(must) > size:
        told = f"at least {len(must)}: special tokens, bytes and single characters stay"
        raise ConfigError(f"vocab_size {size} must be {told}")
    chosen = set(islice(_in_order(file, must, everything, size), size))
    tried = set(islice(_in_order(file, must, shown, size), size))
    kept = sum(times for token, times in unseen.items() if token in tried)
    coverage = kept / unseen.total() if unseen else None
    return Vocabulary(tuple(sorted(chosen)), len(file.texts), len(everything), coverage)


def read_texts(path: str | Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file, or of a folder of such files, some lines at a time."""
    place = path_of(path, "vocab_text")
    inside = (each for each in sorted(place.rglob("*")) if each.is_file() and not each.is_symlink())
    files = [*inside] if place.is_dir() else [place]
    if not files:
        raise ConfigError(f"vocab_text {str(path)!r}: no text file in this folder")
    for file in files:
        yield from _SOME_LINES.findall(read_text(file, "vocab_text"))


def _in_order(
    file: TokenizerFile, must: Iterable[int], counts: Counter[int], size: int
) -> Iterator[int]:
    """Yield tokens that must stay, then the others by count and rank, each after its parts."""
    kept = set(must)
    yield from sorted(kept)
    for token in sorted(file.by_rank, key=lambda token: -counts[token]):
        if token in kept:
            continue
        new = file.with_parts([token]) - kept
        if len(kept) + len(new) <= size:
            kept |= new
            yield from sorted(new - {token})
            yield token
