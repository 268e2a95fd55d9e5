"""Tiny complete model folders: random weights, a tokenizer trained on the spot, a processor.

The kinds differ in what chat code must get right: who adds the first token, what ends a turn, and
how many tokens a picture becomes.
"""

import atexit
import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel

from slimvlm.data.samples import Message, Sample
from tests import tiny

VOCAB = 336
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
WORDS = (
    "What is shown here? A field of colours. Which colour is the left part? It is red. Is there "
    "a blue circle in the picture? yes no Answer the question with one word. Count the squares: "
    "one two three four five six seven eight nine ten. USER: ASSISTANT: system user assistant\n"
)

# The templates of llava-hf/llava-1.5-7b-hf, of ChatML (Qwen, InternVL) and of SmolVLM, shortened
# to what text and pictures need.
LLAVA_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
CHATML = (
    "{%% for message in messages %%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}{{ '%s' }}{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{{ '<|im_end|>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
SMOLVLM_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Kind(NamedTuple):
    make: Callable[[], tuple[hf.PreTrainedConfig, Any]]
    """Returns the configuration and the processor (or tokenizer)."""
    image_token: str | None
    answer: str
    """What the labels of an answer decode to."""


def tokenizer(
    specials: Sequence[str] = (), adds_bos: bool = True, bos: str | None = BOS, **named: Any
) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE with exactly `VOCAB` tokens."""
    special_tokens = list(dict.fromkeys([PAD, BOS, EOS, *specials]))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        **{"vocab_size": VOCAB, "min_frequency": 1, "special_tokens": special_tokens},
        **{"initial_alphabet": alphabet, "show_progress": False},
    )
    raw.train_from_iterator([WORDS], trainer)
    assert raw.get_vocab_size() == VOCAB
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
        )
    return _fast(raw, bos, **named)


def _fast(raw: Tokenizer, bos: str | None, **named: Any) -> hf.PreTrainedTokenizerFast:
    ends = {"pad_token": PAD, "bos_token": bos, "eos_token": EOS}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, **ends, **named
    )


def _llava() -> tuple[hf.PreTrainedConfig, Any]:
    words = tokenizer(["<image>"], extra_special_tokens={"image_token": "<image>"})
    config = tiny.llava(text_config=tiny.llama(vocab_size=VOCAB))
    config.image_token_index = words.convert_tokens_to_ids("<image>")
    return config, llava_processor(words)


def llava_processor(words: Any) -> hf.LlavaProcessor:
    """The processor of a tiny LLaVA, around a tokenizer that has ``<image>``."""
    pictures = hf.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    how = {"patch_size": 8, "num_additional_image_tokens": 1, "chat_template": LLAVA_CHAT}
    return hf.LlavaProcessor(pictures, words, vision_feature_select_strategy="default", **how)


def _text() -> tuple[hf.PreTrainedConfig, Any]:
    words = tokenizer()
    words.chat_template = TEXT_CHAT
    return tiny.llama(vocab_size=VOCAB), words


def _qwen2_5_vl() -> tuple[hf.PreTrainedConfig, Any]:
    names = ["vision_start", "vision_end", "image_pad", "video_pad"]
    specials = [f"<|{name}|>" for name in ("im_start", "im_end", *names)]
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    words = tokenizer(specials, adds_bos=False, bos=None, extra_special_tokens=named)
    config = tiny.qwen2_5_vl()
    config.text_config.vocab_size = VOCAB
    config.text_config.bos_token_id = None
    for token in names:
        field = token.replace("_pad", "") + "_token_id"
        setattr(config, field, words.convert_tokens_to_ids(f"<|{token}|>"))
    sizes: dict[str, Any] = {
        **{"patch_size": 8, "temporal_patch_size": 1, "merge_size": 2},
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
    }
    made = hf.Qwen2VLImageProcessor(**sizes), words, hf.Qwen2VLVideoProcessor(**sizes)
    chat = CHATML % "<|vision_start|><|image_pad|><|vision_end|>"
    return config, hf.Qwen2_5_VLProcessor(*made, chat_template=chat)


def _idefics3() -> tuple[hf.PreTrainedConfig, Any]:
    specials = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
    words = tokenizer([*specials, "<global-img>"], adds_bos=False, bos="<|im_start|>")
    config = tiny.idefics3()
    config.text_config.vocab_size = VOCAB
    config.image_token_id = words.convert_tokens_to_ids("<image>")
    pictures = hf.Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    how = {"image_seq_len": 4, "chat_template": SMOLVLM_CHAT}
    return config, hf.Idefics3Processor(pictures, words, **how)


def _internvl() -> tuple[hf.PreTrainedConfig, Any]:
    named = {
        **{"start_image_token": "<img>", "end_image_token": "</img>"},
        **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    }
    specials = ["<|im_start|>", "<|im_end|>", *named.values()]
    words = tokenizer(specials, adds_bos=False, bos=None, extra_special_tokens=named)
    config = tiny.internvl(text_config=tiny.qwen2(vocab_size=VOCAB))
    config.image_token_id = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    size = {"height": 32, "width": 32}
    tiles = {"min_patches": 1, "max_patches": 2, "crop_to_patches": True}
    pictures, videos = hf.GotOcr2ImageProcessor(size=size, **tiles), hf.InternVLVideoProcessor
    how = {"image_seq_length": 4, "chat_template": CHATML % "<IMG_CONTEXT>\n"}
    return config, hf.InternVLProcessor(pictures, words, videos(size=size), **how)


KINDS: dict[str, Kind] = {
    "llava": Kind(_llava, "<image>", " {}" + EOS),
    "text": Kind(_text, None, "{}" + EOS),
    "qwen2_5_vl": Kind(_qwen2_5_vl, "<|image_pad|>", "{}<|im_end|>"),
    "idefics3": Kind(_idefics3, "<image>", " {}<end_of_utterance>"),
    "internvl": Kind(_internvl, "<IMG_CONTEXT>", "{}<|im_end|>"),
}
SEEING = [name for name, kind in KINDS.items() if kind.image_token is not None]


@cache
def root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="slimvlm-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def processor(name: str) -> Any:
    """A kind's processor (its tokenizer, for a text model)."""
    return KINDS[name].make()[1]


@cache
def folder(name: str) -> Path:
    """A complete model folder of a kind. Tests must not change it."""
    config, words = KINDS[name].make()
    model = tiny.made(config)
    specials = getattr(words, "tokenizer", words).all_special_ids
    model.generation_config.suppress_tokens = specials  # random models would say them
    model.generation_config.pad_token_id = 0
    path = root() / name
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def copied(name: str, out: Path) -> Path:
    """A copy of a model folder that a test may spoil."""
    shutil.copytree(folder(name), out)
    return out


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    """Change the values of a JSON file in place."""
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def picture(index: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A picture with something to see: halves of two colours."""
    image = Image.new("RGB", size, ((37 * index) % 256, (91 * index) % 256, 200))
    half = (size[0] // 2, size[1])
    image.paste(Image.new("RGB", half, ((150 + 53 * index) % 256, 20, 60)), (0, 0))
    return image


def turn(role: str, *parts: str | None) -> Message:
    """A turn in chat form; None stands for a picture."""
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


def sample(name: str, *turns: Message, images: int = 0) -> Sample:
    return Sample(name, turns, tuple(picture(index) for index in range(images)))


COLOURS = ("red", "blue", "green", "yellow", "white", "black")


def short_samples(count: int, sees: bool = True) -> list[Sample]:
    made = []
    for index in range(count):
        shown: list[str | None] = [None] if sees else []
        answer = "It is " + " and ".join(COLOURS[(index + k) % 6] for k in range(1 + index % 3))
        question = turn("user", *shown, "Which colour is shown here?" + " please" * (index % 2))
        parts = (question, turn("assistant", answer + "."))
        made.append(Sample(f"s{index}", parts, (picture(index),) * sees))
    return made


def write_llava_data(out: Path, count: int = 12, pictures: bool = True) -> Path:
    """A LLaVA-format JSON with its pictures beside it."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, item in enumerate(short_samples(count)):
        user, assistant = (m["content"][-1]["text"] for m in item.messages)
        asked = {"from": "human", "value": ("<image>\n" if pictures else "") + user}
        row = {"id": item.id, "conversations": [asked, {"from": "gpt", "value": assistant}]}
        if pictures:
            row["image"] = f"{index}.png"
            picture(index).save(out / f"{index}.png")
        rows.append(row)
    path = out / "data.json"
    path.write_text(json.dumps(rows))
    return path


def with_turned_vocabulary(
    model: PreTrainedModel, words: hf.PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, hf.PreTrainedTokenizerFast]:
    """A text model that says the same in a vocabulary whose plain tokens are numbered backwards."""
    raw = json.loads(words.backend_tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    plain = sorted(vocab.values())[len(raw["added_tokens"]) :]
    new = dict(zip(plain, reversed(plain), strict=True))
    raw["model"]["vocab"] = {word: new.get(number, number) for word, number in vocab.items()}
    order = torch.tensor([new.get(number, number) for number in range(VOCAB)])
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for part in (turned.get_input_embeddings(), turned.get_output_embeddings()):
            part.weight.copy_(part.weight[order].clone())
    return turned, _with_backend(words, raw)


def without_merges(words: hf.PreTrainedTokenizerFast) -> hf.PreTrainedTokenizerFast:
    """A tokenizer with the same tokens that only ever uses single bytes."""
    raw = json.loads(words.backend_tokenizer.to_str())
    raw["model"]["merges"] = []
    return _with_backend(words, raw)


def _with_backend(words: hf.PreTrainedTokenizerFast, raw: Any) -> hf.PreTrainedTokenizerFast:
    made = _fast(Tokenizer.from_str(json.dumps(raw)), words.bos_token)
    made.chat_template = words.chat_template
    return made
