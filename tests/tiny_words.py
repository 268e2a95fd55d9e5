"""Small tokenizers of every kind that can lose tokens, trained on the spot; folders with them."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers import processors as ends

from tests import tiny, tiny_folder

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on the warm stone.",
    "def area(width, height):\n    return width * height  # in metres\n",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Kůň je žlutý a žluťoučký kůň je kůň.",
    "你好，世界。你好，朋友。世界很大，世界很美。",
    "Ελληνικά γράμματα: το γρήγορο καφέ κουτάβι και το γρήγορο κουτάβι.",
    "🙂🙂 smile 👩‍🚀 and 🚀🚀 and 🙂 again",
    "    four spaces,\ttabs\t\tand\n\n\nempty lines   ",
    "1234567890 12 123 1234 3.14159 1,000,000",
    "the the the and and and width width height height return return",
)
WORDS = sorted({word for line in CORPUS for word in line.split(" ")} | {" ", "\n", "  ", "\t"})
SIZE = 620
SPECIALS = ("<unk>", "<s>", "</s>")
_LATER = ("<|im_start|>", "<|im_end|>", "<image>")


def _byte_level(ignore_merges: bool = False) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    raw.add_special_tokens(list(_LATER))
    raw.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    if ignore_merges:
        values = json.loads(raw.to_str())
        values["model"]["ignore_merges"] = True
        values["model"]["merges"] = _every_split(values["model"]["vocab"])
        raw = Tokenizer.from_str(json.dumps(values))
    start = raw.token_to_id("<|im_start|>")
    first = ends.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    raw.post_processor = ends.Sequence([ends.ByteLevel(trim_offsets=False), first])
    if ignore_merges:
        raw.post_processor = ends.BertProcessing(("<|im_end|>", start + 1), ("<|im_start|>", start))
    raw.enable_padding(pad_id=raw.token_to_id("<|im_end|>"), pad_token="<|im_end|>")
    return raw


def _every_split(vocab: dict[str, int]) -> list[list[str]]:
    """Merges as a conversion from a bare list of tokens writes them: all that are possible."""
    pairs = [
        (index, word[:cut], word[cut:])
        for word, index in vocab.items()
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    return [[left, right] for _, left, right in sorted(pairs)]


def _sentencepiece(every_split: bool = True) -> Tokenizer:
    """As Llama 2 and Gemma have it: no words, a byte where a character has no token."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 259, min_frequency=1, show_progress=False)
    trained.train_from_iterator(CORPUS[:4] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = _every_split(vocab) if every_split else model["merges"]
    unknown = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    raw = Tokenizer(models.BPE(vocab, [tuple(m) for m in merges], **unknown))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = decoders.Replace("▁", " ")
    raw.decoder = decoders.Sequence(
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(list(SPECIALS))
    raw.add_special_tokens(["<image>"])
    raw.post_processor = ends.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_level, every split, whole words first": lambda: _byte_level(ignore_merges=True),
    "sentencepiece": lambda: _sentencepiece(every_split=False),
    "sentencepiece, every split": _sentencepiece,
}


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a kind. Tests must not change it."""
    raw = KINDS[kind]()
    if kind.startswith("byte_level"):
        named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    else:
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, **named
    )


# Complete folders, whose special tokens have high numbers.
def _text() -> tuple[Any, Any]:
    words = copy.deepcopy(tokenizer("byte_level"))
    words.chat_template = tiny_folder.TEXT_CHAT
    return tiny.llama(vocab_size=len(words) + 9, tie_word_embeddings=True), words


def _qwen2() -> tuple[Any, Any]:
    """With a class of its own, which builds its tokenizer anew when it is read."""
    model = json.loads(_byte_level().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    words = hf.Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    words.add_special_tokens({"extra_special_tokens": list(_LATER)})
    return tiny.qwen2(vocab_size=len(words) + 3), words


def _llava() -> tuple[Any, Any]:
    """Likewise; its token for pictures comes after all others."""
    model = json.loads(_sentencepiece().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    words = hf.LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<pad>")
    words.add_special_tokens({"extra_special_tokens": ["<image>"]})
    config = tiny.llava(text_config=tiny.llama(vocab_size=len(words) + 1))
    config.image_token_index = words.convert_tokens_to_ids("<image>")
    words.image_token = "<image>"
    return config, tiny_folder.llava_processor(words)


FOLDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    **{"text": _text, "qwen2": _qwen2, "llava": _llava}
}


@cache
def folder(kind: str) -> Path:
    """A complete model folder. Tests must not change it."""
    config, words = FOLDERS[kind]()
    raw = getattr(words, "tokenizer", words)
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(raw, name))
    model = tiny.made(config)
    model.generation_config.eos_token_id = [raw.eos_token_id, raw.all_special_ids[-1]]
    model.generation_config.suppress_tokens = [300, raw.all_special_ids[-1]]
    path = tiny_folder.root() / f"words-{kind}"
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path
