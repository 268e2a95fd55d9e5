"""A SentencePiece BPE ``tokenizer.model`` as a `tokenizers` object, without the sentencepiece code.

The file is a protocol-buffer message of which four parts matter: the pieces with their scores,
the kind of model, and two switches about whitespace.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from slimvlm.core.errors import ConfigError, UnsupportedModelError

SPACE = "▁"
NORMAL, USER_DEFINED = 1, 4
BPE_MODEL = 2


@dataclass(frozen=True)
class Pieces:
    """The content of a ``tokenizer.model``: pieces in the order of their ids."""

    names: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    byte_fallback: bool
    adds_prefix: bool


def read_pieces(path: Path) -> Pieces:
    """Read a ``tokenizer.model``.

    Raises:
        ConfigError: If it is no such file.
        UnsupportedModelError: If it is not BPE, or rewrites text before it is split.
    """
    rows: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                rows.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is not a SentencePiece model") from error
    if not rows:
        raise ConfigError(f"{str(path)!r} is not a SentencePiece model")
    if trainer.get(3, 1) != BPE_MODEL:
        raise UnsupportedModelError(f"{str(path)!r}: only SentencePiece BPE can be converted")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UnsupportedModelError(
            f"{str(path)!r}: it normalizes text or removes whitespace, which the LLaVA and Phi-3 "
            "tokenizers do not"
        )
    names, scores, kinds = zip(*rows, strict=True)
    return Pieces(names, scores, kinds, bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)))


def build_tokenizer(pieces: Pieces, unknown: str, legacy: bool, prefix: bool) -> Tokenizer:
    """The same segmentation as a `tokenizers` object.

    Args:
        pieces: The model.
        unknown: The unknown token.
        legacy: Whether every stretch of text between special tokens gets a leading ``▁``. Without,
            only the start of the whole text does.
        prefix: Whether there is a leading ``▁`` at all.
    """
    vocab = {name: i for i, name in enumerate(pieces.names)}
    if len(vocab) != len(pieces.names):
        raise UnsupportedModelError("tokenizer.model: two ids have the same piece")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(pieces, vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=pieces.byte_fallback,
        )
    )
    if legacy:
        steps: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    steps_back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps_back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps_back)
    return tokenizer


def _merges(pieces: Pieces, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs whose union is a piece, best score first: BPE by rank does what BPE by score does."""
    legal = {
        name
        for name, kind in zip(pieces.names, pieces.kinds, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    found: list[tuple[float, int, int, int]] = []
    for name, score in zip(pieces.names, pieces.scores, strict=True):
        if name not in legal:
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in legal and right in legal:
                found.append((-score, vocab[name], vocab[left], vocab[right]))
    return [(pieces.names[left], pieces.names[right]) for _, _, left, right in sorted(found)]


def _piece(data: bytes) -> tuple[str, float, int]:
    values = dict(_fields(data))
    name, score, kind = values.get(1, b""), values.get(2, b"\0\0\0\0"), values.get(3, NORMAL)
    if not (isinstance(name, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise ValueError("not a piece")
    return name.decode(), float(struct.unpack("<f", score)[0]), kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbered fields of a protocol-buffer message: varints as int, the others as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(data):
            raise ValueError("message ends early")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
