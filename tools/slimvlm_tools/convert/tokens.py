"""Tokenizers of the original folders as native ones that give the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm_tools.convert.sentencepiece import build_tokenizer, read_pieces
from slimvlm_tools.convert.source import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
COPIED = ("model_max_length", "padding_side", "clean_up_tokenization_spaces")


class TokenizerFiles:
    """What the tokenizer files of a folder say.

    Attributes:
        folder: The folder.
        settings: ``tokenizer_config.json``, with ``special_tokens_map.json`` over it where the
            original reads that file.
        added: Added tokens by id, with their flags.
        legacy: Whether every stretch of text between special tokens gets a leading space, as the
            slow Llama tokenizer does unless ``legacy`` is false.
        prefix: Whether text gets a leading space at all.
    """

    def __init__(self, folder: Path) -> None:
        """Read the small files; the vocabulary stays unread."""
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.settings:
            self.settings |= read_json(folder / "special_tokens_map.json")
        self.added = self._added_tokens()
        self.legacy = self.settings.get("legacy") is not False
        self.prefix = self.settings.get("add_prefix_space") is not False

    @property
    def special(self) -> set[str]:
        """Tokens that the original counts as special: the named ones and the additional ones."""
        more = self.settings.get("additional_special_tokens") or []
        values = [self.settings.get(name) for name in NAMED] + list(more)
        return {_content(value) for value in values if value is not None}

    def named_tokens(self) -> dict[str, AddedToken]:
        """The named tokens (beginning, end, unknown, padding) that the folder sets."""
        found = {}
        for name in NAMED:
            if self.settings.get(name) is not None:
                content = _content(self.settings[name])
                flags = next((t for t in self.added.values() if t.content == content), None)
                found[name] = flags or AddedToken(content, special=True, normalized=False)
        return found

    def _added_tokens(self) -> dict[int, AddedToken]:
        stated: Mapping[str, Any] = self.settings.get("added_tokens_decoder", {})
        if stated:
            return {int(i): _token(value) for i, value in sorted(stated.items(), key=_by_number)}
        plain = read_json(self.folder / "added_tokens.json")
        special = self.special
        return {
            int(i): AddedToken(content, normalized=False, special=content in special)
            for content, i in sorted(plain.items(), key=lambda item: int(item[1]))
        }


def llama_tokenizer(
    files: TokenizerFiles, attributes: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """The slow Llama tokenizer of a folder, from its ``tokenizer.model``.

    Args:
        files: The folder's files.
        attributes: Tokens that the native tokenizer must have as attributes, by attribute.

    Raises:
        ConfigError: If the folder has no tokenizer files, or they cannot be read.
        UnsupportedModelError: If added tokens cannot keep their ids.
    """
    path = files.folder / "tokenizer.model"
    if not path.is_file():
        return _from_json(files, attributes)
    pieces = read_pieces(path)
    named = files.named_tokens()
    unknown = named["unk_token"].content if "unk_token" in named else "<unk>"
    prefix = pieces.adds_prefix if files.legacy else files.prefix
    tokenizer = build_tokenizer(pieces, unknown, files.legacy, prefix)
    _add_tokens(tokenizer, files)
    return _wrap(
        files,
        tokenizer,
        attributes,
        defaults={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        add_bos_token=files.settings.get("add_bos_token", True),
        add_eos_token=files.settings.get("add_eos_token", False),
    )


def byte_level_tokenizer(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    """The fast byte-level BPE tokenizer of a folder (GPT-2 style).

    Raises:
        ConfigError: If the folder has no tokenizer files, or they cannot be read.
    """
    vocab, merges = files.folder / "vocab.json", files.folder / "merges.txt"
    spaced = bool(files.settings.get("add_prefix_space", False))
    if (files.folder / "tokenizer.json").is_file() or not (vocab.is_file() and merges.is_file()):
        return _from_json(files, spaced=spaced)
    tokenizer = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, files)
    return _wrap(files, tokenizer)


def add_new_tokens(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> None:
    """Add special tokens at the end of the vocabulary; those that exist keep their ids."""
    known = tokenizer.get_vocab()
    new = [AddedToken(n, special=True, normalized=False) for n in names if n not in known]
    tokenizer.add_tokens(new, special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token that must exist.

    Raises:
        ConfigError: If it does not.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ConfigError(f"tokenizer: it has no {token!r}, which the conversation style needs")
    return int(found)


def _from_json(
    files: TokenizerFiles,
    attributes: Mapping[str, str] | None = None,
    spaced: bool | None = None,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer as it is; ``spaced`` overrides its switch for a leading space."""
    path = files.folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{str(files.folder)!r} has no tokenizer.model, tokenizer.json, or vocab.json with "
            "merges.txt"
        )
    try:
        content = read_json(path)
        splitter = content.get("pre_tokenizer") or {}
        if spaced is not None and splitter.get("type") == "ByteLevel":
            splitter["add_prefix_space"] = spaced
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the bindings raise plain Exception
        raise ConfigError(f"{str(path)!r} cannot be read ({error})") from error
    _add_tokens(tokenizer, files)
    return _wrap(files, tokenizer, attributes)


def _add_tokens(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    known = tokenizer.get_vocab()
    fixed = [token for token in files.named_tokens().values() if token.content in known]
    tokenizer.add_tokens([*fixed, *files.added.values()])
    for i, token in files.added.items():
        if (found := tokenizer.token_to_id(token.content)) != i:
            raise UnsupportedModelError(
                f"tokenizer: the added token {token.content!r} has id {i}, and would get {found}"
            )


def _wrap(
    files: TokenizerFiles,
    tokenizer: Tokenizer,
    attributes: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    **switches: Any,
) -> PreTrainedTokenizerFast:
    names: dict[str, Any] = dict(defaults or {}) | files.named_tokens()
    wanted = [str(token) for token in (*names.values(), *(attributes or {}).values())]
    if missing := [token for token in wanted if tokenizer.token_to_id(token) is None]:
        raise ConfigError(f"tokenizer: the token {missing[0]!r} is not in its vocabulary")
    copied = {name: files.settings[name] for name in COPIED if files.settings.get(name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=dict(attributes or {}),
        **copied,
        **names,
        **switches,
    )


def _token(value: Mapping[str, Any]) -> AddedToken:
    """An added token with its flags. The slow tokenizer finds it in raw text: never normalized."""
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(
        value["content"], special=bool(value.get("special", False)), normalized=False, **flags
    )


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _by_number(item: tuple[str, Any]) -> int:
    return int(item[0])
