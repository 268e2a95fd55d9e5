"""Choose the tokens that a model needs for some data, by count, then by the model's own ranks.

All special tokens, bytes and single characters stay as well, so that every text can still be
written, and with each token those that it is made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from slimvlm.core.documents import read_text
from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data.chat import render, tokenizer_of
from slimvlm.data.samples import Sample
from slimvlm.data.tokenizer_file import TokenizerFile

HELD_OUT_EVERY = 4
"""Every fourth text is counted separately, to estimate what unseen texts need."""
ENOUGH = 0.99
"""Share of the tokens of unseen texts that ``auto`` keeps."""

_AT_ONCE = 256
_CHARACTERS = 4096


@dataclass(frozen=True)
class Vocabulary:
    """The tokens to keep, and their coverage of unseen texts."""

    tokens: tuple[int, ...]  # sorted ids
    total: int  # tokens of the tokenizer
    seen: int  # different tokens in the texts
    # share of the tokens of a held-out quarter of the texts that a choice of this size from the
    # other three quarters keeps; None with fewer than four texts
    coverage: float | None

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
    """Choose the tokens to keep for some data.

    Args:
        processor: The model's processor or tokenizer.
        samples: Conversations; they are counted as the chat template writes them.
        size: How many; None for as many as the data needs: all that it has, and so many more, in
            the order of the model's own ranks, that 99 % of the tokens of unseen texts stay (as a
            quarter of the data tells that is not counted for it).
        texts: Further texts, or paths of text files and of folders of them.
        keep: Ids that must stay beside special tokens, bytes and single characters.

    Returns:
        Ids, sorted.

    Raises:
        ConfigError: If ``size`` is smaller than what must stay, or a path cannot be read.
        UnsupportedModelError: If the tokenizer is of a kind that cannot lose tokens.
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
    for number, ids in enumerate(_token_ids(processor, samples, texts), 1):
        (shown if number % HELD_OUT_EVERY else unseen).update(ids)
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
        raise ConfigError(
            f"vocab_size {size} must be at least {len(must)}: special tokens, bytes and single "
            "characters stay"
        )
    chosen = set(islice(_in_order(file, must, everything, size), size))
    tried = set(islice(_in_order(file, must, shown, size), size))
    kept = sum(count for token, count in unseen.items() if token in tried)
    coverage = kept / unseen.total() if unseen else None
    return Vocabulary(tuple(sorted(chosen)), len(file.texts), len(everything), coverage)


def read_texts(path: str | Path) -> Iterator[str]:
    """Yield the text of a file, or of a folder's UTF-8 files, some lines at a time."""
    place = Path(path)
    if not place.is_dir():
        yield from _pieces(read_text(place, "vocab_text"))
        return
    found = False
    for file in sorted(place.rglob("*")):
        if not file.is_file() or file.is_symlink():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = True
        yield from _pieces(text)
    if not found:
        raise ConfigError(f"vocab_text {str(path)!r}: no UTF-8 text file in this folder")


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of whole lines."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= _CHARACTERS:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _token_ids(
    processor: Any, samples: Sequence[Sample], texts: Iterable[str | Path]
) -> Iterator[list[int]]:
    """Yield the token ids of each text, those of the rendered samples first."""
    tokenizer = tokenizer_of(processor)
    written = (render(processor, sample.messages) for sample in samples)
    further = (read_texts(text) if isinstance(text, Path) else [text] for text in texts)
    remaining = chain(written, chain.from_iterable(further))
    while some := list(islice(remaining, _AT_ONCE)):
        try:
            rows = tokenizer(some, add_special_tokens=False)["input_ids"]
        except Exception as error:  # settings of tokenizers fail in many ways
            raise DataError(f"vocabulary: the tokenizer refuses a text ({error})") from error
        yield from rows


def _in_order(
    file: TokenizerFile, must: Iterable[int], counts: Counter[int], size: int
) -> Iterator[int]:
    """Yield tokens that must stay, then the others by count, then by the model's own rank.

    Each comes after its parts; a token that does not fit with its parts is left out.
    """
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
