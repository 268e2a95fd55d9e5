"""Tokenizers of the original folders as native ones that give the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm_tools.convert.source import pick, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
COPIED = ("model_max_length", "padding_side", "clean_up_tokenization_spaces")
SPACE = "▁"
PROBE = "The zyzzyva's  naïve ﬁnal  ½ hexameters, Ａ\u00a0猫 (42)!\n unforgettably "
"""Text that other kinds of SentencePiece models split otherwise, or write anew before that."""


class TokenizerFiles:
    """What the tokenizer files of a folder say.

    Attributes:
        folder: The folder.
        settings: ``tokenizer_config.json``, with ``special_tokens_map.json`` over it where the
            original reads that file.
        named: The named tokens (beginning, end, unknown, padding) that the folder sets.
        special: What the original counts as special: named tokens and the additional ones.
        added: Added tokens by id, with their flags.
        legacy: Whether every stretch of text between special tokens gets a leading space, as the
            slow Llama tokenizer does unless ``legacy`` is false.
        prefix: Whether text gets a leading space at all.
    """

    def __init__(self, folder: Path) -> None:
        """Read the small files; the vocabulary stays unread."""
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json")
        stated = self.settings.get("added_tokens_decoder")
        if stated is None:
            self.settings |= read_json(folder / "special_tokens_map.json")
        named = {name: _content(value) for name, value in pick(self.settings, NAMED).items()}
        more = self.settings.get("additional_special_tokens") or ()
        self.special = {*named.values(), *map(_content, more)}
        if not stated:
            plain = read_json(folder / "added_tokens.json")
            stated = {i: {"content": t, "special": t in self.special} for t, i in plain.items()}
        self.added = {int(i): _token(**stated[i]) for i in sorted(stated, key=int)}
        by_content = {token.content: token for token in self.added.values()}
        self.named = {n: by_content.get(t) or _token(t, special=True) for n, t in named.items()}
        self.legacy = self.settings.get("legacy") is not False
        self.prefix = self.settings.get("add_prefix_space") is not False


def llama_tokenizer(
    files: TokenizerFiles, attributes: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """The slow Llama tokenizer of a folder, from its ``tokenizer.model``."""
    path = files.folder / "tokenizer.model"
    if not path.is_file():
        return _wrap(files, _from_json(files.folder), attributes)
    unknown = files.named.get("unk_token", "<unk>")
    tokenizer, adds_prefix = _read_pieces(path, str(unknown))
    _write_spaces_(tokenizer, files.legacy, adds_prefix if files.legacy else files.prefix)
    return _wrap(
        files,
        tokenizer,
        attributes,
        defaults={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        add_bos_token=files.settings.get("add_bos_token", True),
        add_eos_token=files.settings.get("add_eos_token", False),
    )


def byte_level_tokenizer(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    """The fast byte-level BPE tokenizer of a folder (GPT-2 style)."""
    vocab, merges = files.folder / "vocab.json", files.folder / "merges.txt"
    spaced = bool(files.settings.get("add_prefix_space", False))
    if (files.folder / "tokenizer.json").is_file() or not (vocab.is_file() and merges.is_file()):
        return _wrap(files, _from_json(files.folder, spaced))
    tokenizer = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(files, tokenizer)


def add_new_tokens(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> None:
    """Add special tokens at the end of the vocabulary; those that exist keep their ids."""
    known = tokenizer.get_vocab()
    new = [_token(name, special=True) for name in names if name not in known]
    tokenizer.add_tokens(new, special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ConfigError(f"tokenizer: it has no {token!r}, which the conversation style needs")
    return int(found)


def _read_pieces(path: Path, unknown: str) -> tuple[Tokenizer, bool]:
    """A SentencePiece BPE model as a `tokenizers` model without a word on spaces.

    Pairs whose union is a piece are merged in the order of its score: BPE by rank does what BPE by
    score does. The result is compared with SentencePiece's own on a sentence.
    """
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{str(path)!r} is not a SentencePiece model") from error
    tokenizer = _merging(model, unknown)
    adds_prefix = model.normalize("a") == f"{SPACE}a"
    plain = model.normalize(PROBE)
    if plain != SPACE * adds_prefix + PROBE.replace(" ", SPACE):
        raise UnsupportedModelError(
            f"{str(path)!r}: it normalizes text or removes whitespace, which the LLaVA and Phi-3 "
            "tokenizers do not"
        )
    if _weighs_splits(model) or tokenizer.encode(plain).ids != model.encode(PROBE):
        raise UnsupportedModelError(f"{str(path)!r}: only SentencePiece BPE can be converted")
    return tokenizer, adds_prefix


def _merging(model: SentencePieceProcessor, unknown: str) -> Tokenizer:
    """BPE by rank does what BPE by score does: merge pairs whose union is a piece, best first."""
    ids = list(range(model.get_piece_size()))
    names, scores, is_byte = model.id_to_piece(ids), model.get_score(ids), model.is_byte(ids)
    is_special = model.is_unknown(ids), model.is_control(ids), model.is_unused(ids), is_byte
    legal = {names[i]: i for i in ids if not any(kind[i] for kind in is_special)}
    merges = sorted(
        (-scores[i], i, legal[name[:cut]], legal[name[cut:]])
        for name, i in legal.items()
        for cut in range(1, len(name))
        if name[:cut] in legal and name[cut:] in legal
    )
    return Tokenizer(
        BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(names[left], names[right]) for _, _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(is_byte),
        )
    )


def _weighs_splits(model: SentencePieceProcessor) -> bool:
    """Whether a model ranks all splits of a text, as unigram models do and BPE does not."""
    try:
        model.nbest_encode("a", nbest_size=1)
    except RuntimeError:
        return False
    return True


def _write_spaces_(tokenizer: Tokenizer, legacy: bool, prefix: bool) -> None:
    """Let ``▁`` stand for spaces."""
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


def _from_json(folder: Path, spaced: bool | None = None) -> Tokenizer:
    """A fast tokenizer as it is; ``spaced`` overrides its switch for a leading space."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{str(folder)!r} has no tokenizer.model, tokenizer.json, or vocab.json with merges.txt"
        )
    try:
        content = read_json(path)
        splitter = content.get("pre_tokenizer") or {}
        if spaced is not None and splitter.get("type") == "ByteLevel":
            splitter["add_prefix_space"] = spaced
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the bindings raise plain Exception
        raise ConfigError(f"{str(path)!r} cannot be read ({error})") from error


def _wrap(
    files: TokenizerFiles,
    tokenizer: Tokenizer,
    attributes: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    **switches: Any,
) -> PreTrainedTokenizerFast:
    """The native tokenizer, with the folder's added tokens under their ids."""
    known, attributes = tokenizer.get_vocab(), dict(attributes or {})
    fixed = [token for token in files.named.values() if token.content in known]
    tokenizer.add_tokens([*fixed, *files.added.values()])
    for i, token in files.added.items():
        if (found := tokenizer.token_to_id(token.content)) != i:
            raise UnsupportedModelError(
                f"tokenizer: the added token {token.content!r} has id {i}, and would get {found}"
            )
    names: dict[str, Any] = {**(defaults or {}), **files.named}
    for wanted in map(str, (*names.values(), *attributes.values())):
        if tokenizer.token_to_id(wanted) is None:
            raise ConfigError(f"tokenizer: the token {wanted!r} is not in its vocabulary")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=attributes,
        **pick(files.settings, COPIED),
        **names,
        **switches,
    )


def _token(content: str, special: bool = False, **flags: Any) -> AddedToken:
    """An added token with its flags. The slow tokenizer finds it in raw text: never normalized."""
    kept = {name: bool(flags.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, special=special, normalized=False, **kept)


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)
