"""Remove tokens from a fast tokenizer's ``tokenizer.json``, with all tokens that others need kept.

A text whose tokens all stay gets the same tokens afterwards:

- BPE joins two parts at a time, by rank. Each token is built in one way, so it stays usable where
  every part on that way stays. Then a text's joins all exist, and all others have a higher rank.
- Unigram takes the likeliest of all ways to divide a text. With fewer to choose from, that one is
  still the likeliest. The rarest token stays, since unknown characters are scored by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from slimvlm.core.errors import ConfigError, UnsupportedModelError, shortened
from slimvlm.data.chat import tokenizer_of

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MODELS = ("BPE", "Unigram")
_PAIRS = ("BertProcessing", "RobertaProcessing")

Pair = tuple[str, str]


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a ``tokenizer.json``."""

    name: str  # the tokenizer's class, for messages
    values: Mapping[str, Any]
    special: frozenset[int] = frozenset()  # ids of special tokens

    @classmethod
    def of(cls, processor: Any) -> TokenizerFile:
        """Read it from a processor or tokenizer; refuse a kind that cannot lose tokens."""
        tokenizer = tokenizer_of(processor)
        name = type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                f"tokens: {name} is no fast tokenizer; only one with a tokenizer.json can lose some"
            )
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        model = values["model"]
        if model["type"] not in _MODELS:
            raise UnsupportedModelError(
                f"tokens: {name} is of type {model['type']!r}, and only {', '.join(_MODELS)} can "
                "lose some"
            )
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise UnsupportedModelError(
                    f"tokens: {name} has {field} {model[field]!r}, with which none can go"
                )
        found = cls(name, values, frozenset(tokenizer.all_special_ids))
        list(_ids_in(values["post_processor"], name))  # refuses an unknown kind
        return found

    @property
    def _model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.values["model"]
        return model

    @cached_property
    def _pieces(self) -> dict[str, int]:
        """The model's own tokens."""
        vocab = self._model["vocab"]
        named = isinstance(vocab, Mapping)
        return dict(vocab) if named else {piece: i for i, (piece, _) in enumerate(vocab)}

    @cached_property
    def texts(self) -> dict[int, str]:
        """Every token as it is written in the file, by id."""
        added = {token["id"]: token["content"] for token in self.values["added_tokens"]}
        return {index: piece for piece, index in self._pieces.items()} | added

    @cached_property
    def needed(self) -> frozenset[int]:
        """Tokens that always stay: special and added ones, bytes, and single characters.

        With a Unigram model also its rarest token and, if it has no bytes to fall back on, every
        token with a character that has no token of its own.
        """
        found = {token["id"] for token in self.values["added_tokens"]} | self.special
        found |= set(_ids_in(self.values["post_processor"], self.name))
        if self.values["padding"] is not None:
            found.add(self.values["padding"]["pad_id"])
        model, pieces = self._model, self._pieces
        if isinstance(model.get("unk_token"), str) and model["unk_token"] in pieces:
            found.add(pieces[model["unk_token"]])
        found |= {i for piece, i in pieces.items() if len(piece) == 1 or _BYTE.fullmatch(piece)}
        if model["type"] == "Unigram":
            found.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
            if model["unk_id"] is not None:
                found.add(model["unk_id"])
            if not model.get("byte_fallback"):
                found |= {i for piece, i in pieces.items() if set(piece) - pieces.keys()}
        return frozenset(self.with_parts(found))

    @cached_property
    def by_rank(self) -> list[int]:
        """All tokens in the order of the tokenizer's own ranks, the most frequent first."""
        if self._model["type"] == "Unigram":
            scores = {i: -score for i, (_, score) in enumerate(self._model["vocab"])}
            return sorted(self.texts, key=lambda i: (scores.get(i, 0.0), i))
        first = {result: min(map(self._ranks.__getitem__, p)) for result, p in self._makers.items()}
        last = len(self._ranks)
        return sorted(self.texts, key=lambda i: (first.get(self.texts[i], last), i))

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        """The joins of a BPE model and their rank."""
        return {(left, right): n for n, (left, right) in enumerate(self._model.get("merges", ()))}

    @cached_property
    def _makers(self) -> dict[str, list[Pair]]:
        """For each token the joins that could make it."""
        found: dict[str, list[Pair]] = {}
        for pair in self._ranks:
            found.setdefault("".join(pair), []).append(pair)
        return found

    @cached_property
    def _last_joins(self) -> dict[str, Pair | None]:
        return {}

    def _last_join(self, piece: str) -> Pair | None:
        """Return the two parts that the tokenizer joins to a token; None if there are none.

        Where several joins could make it, it is built from its characters as the tokenizer does.
        """
        if piece in self._last_joins:
            return self._last_joins[piece]
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
        return pair

    def with_parts(self, tokens: Iterable[int]) -> set[int]:
        """Return tokens with all tokens that they are made of, step by step."""
        found: set[int] = set()
        waiting = list(tokens)
        while waiting:
            token = waiting.pop()
            if token in found:
                continue
            found.add(token)
            pair = self._last_join(self.texts[token]) if self._ranks else None
            waiting += [self._pieces[part] for part in pair or () if part in self._pieces]
        return found

    def trimmed(self, kept: Iterable[int]) -> str:
        """Return the file's content with fewer tokens, numbered anew in the same order."""
        kept = set(kept)
        if unknown := sorted(kept - self.texts.keys()):
            raise ConfigError(f"tokens: {self.name} has no token {unknown[0]}")
        if lost := sorted(self.needed - kept):
            named = f"{lost[0]} ({shortened(self.texts.get(lost[0], ''))})"
            raise ConfigError(
                f"tokens: {named} must stay, as all special tokens, bytes and single characters"
            )
        new = {old: index for index, old in enumerate(sorted(kept))}
        model = dict(self._model)
        if model["type"] == "Unigram":
            model["vocab"] = [row for index, row in enumerate(model["vocab"]) if index in new]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        else:
            vocab = {piece: new[index] for piece, index in self._pieces.items() if index in new}
            merges = [pair for pair in self._ranks if {*pair, "".join(pair)} <= vocab.keys()]
            model |= {"vocab": vocab, "merges": merges}
        added = [{**t, "id": new[t["id"]]} for t in self.values["added_tokens"]]
        padding = self.values["padding"]
        values = {
            **self.values,
            "model": model,
            "added_tokens": sorted(added, key=lambda token: int(token["id"])),
            "post_processor": _with_ids(self.values["post_processor"], new),
            "padding": padding and {**padding, "pad_id": new[padding["pad_id"]]},
        }
        return json.dumps(values, ensure_ascii=False)

    def numbered(self, kept: Iterable[int]) -> dict[str, int]:
        """Return the numbers of these tokens in the smaller tokenizer, by their texts."""
        new = {old: index for index, old in enumerate(sorted(set(kept)))}
        added = {token["content"]: token["id"] for token in self.values["added_tokens"]}
        return {text: new[i] for text, i in {**self._pieces, **added}.items() if i in new}


def _ids_in(post_processor: Mapping[str, Any] | None, name: str) -> Iterator[int]:
    """Yield the tokens that a post-processor adds; refuse an unknown kind."""
    kind = "ByteLevel" if post_processor is None else post_processor["type"]
    if post_processor is None or kind == "ByteLevel":
        return
    if kind == "Sequence":
        for each in post_processor["processors"]:
            yield from _ids_in(each, name)
    elif kind == "TemplateProcessing":
        for token in post_processor["special_tokens"].values():
            yield from token["ids"]
    elif kind in _PAIRS:
        yield from (post_processor[field][1] for field in ("sep", "cls"))
    else:
        raise UnsupportedModelError(f"tokens: {name} has a post-processor of type {kind!r}")


def _with_ids(post_processor: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor with new numbers for its tokens."""
    kind = None if post_processor is None else post_processor["type"]
    if kind == "Sequence":
        inner = [_with_ids(each, new) for each in post_processor["processors"]]
        return {**post_processor, "processors": inner}
    if kind == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new[index] for index in token["ids"]]}
            for name, token in post_processor["special_tokens"].items()
        }
        return {**post_processor, "special_tokens": tokens}
    if kind in _PAIRS:
        pairs = {field: post_processor[field] for field in ("sep", "cls")}
        return {**post_processor, **{f: [text, new[index]] for f, (text, index) in pairs.items()}}
    return post_processor
