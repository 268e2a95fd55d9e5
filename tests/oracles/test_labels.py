"""What a conversation teaches, in every layout: the answers, their ends, and nothing else."""

import re
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from slimvlm.core.options import RecoverConfig
from slimvlm.data.chat import encode_questions, encode_samples
from slimvlm.data.samples import Question
from slimvlm.models.hidden import hold_in_
from slimvlm.models.load import load
from slimvlm.scoring.batches import answer_loss
from slimvlm.training import trainer
from slimvlm.training.recover import recover
from tests import tiny
from tests import tiny_folder as folders
from tests.tables import tables
from tests.tiers import tiered
from tests.tiny_folder import picture, sample, short_samples, turn

PLAIN = {"first": "", "last": ""}
LAYOUTS = {name: SimpleNamespace(**PLAIN | row) for name, row in tables(__file__).items()}
SPECIAL = r"<\|?[a-zA-Z_/0-9]+\|?>|\[/?[A-Za-z]+\]"
TALK = sample(
    "talk",
    *(turn("user", None, "What is shown?"), turn("assistant", "A cat.")),
    *(turn("user", "Which colour?"), turn("assistant", "Grey.")),
    images=1,
)


def chat_template(layout) -> str:
    """The layout in Jinja."""
    each = "{% for p in m['content'] if p['type'] == 'KIND' %}{{ VALUE }}{% endfor %}"
    parts = {
        "$": each.replace("KIND", "image").replace("VALUE", repr(layout.picture)),
        "@": each.replace("KIND", "text").replace("VALUE", "p['text']"),
    }

    def written(text: str) -> str:
        pieces = filter(None, re.split(r"([$@]|{%.*?%})", text))
        return "".join(p if p[:2] == "{%" else parts.get(p, f"{{{{ {p!r} }}}}") for p in pieces)

    first, user, assistant, prompt, last = map(written, (layout.first, *layout.turns, layout.last))
    return (
        f"{first}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% else %}}"
        f"{assistant}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}"
        f"{{% else %}}{last}{{% endif %}}"
    )


def processor_of(layout):
    """A processor that makes 16 tokens of the one that stands for a picture."""
    word = next(
        w for w in re.findall(SPECIAL, layout.picture) if re.search("im(ag|g)(?!.*of)", w.lower())
    )
    specials = [*re.findall(SPECIAL, layout.expected), layout.eos]
    words = folders.tokenizer(specials, layout.bos == "<s>", layout.bos)
    words.eos_token = layout.eos
    made = folders.llava_processor(words)
    made.image_token, made.image_token_id = word, words.convert_tokens_to_ids(word)
    made.chat_template = chat_template(layout)
    return made


def decoded(processor, ids):
    word = processor.image_token
    return re.sub(f"({re.escape(word)})+", word, processor.tokenizer.decode(ids))


def marked(processor, item) -> str:
    """What the model reads, with one token for each picture, and marks around the labels."""
    batch = encode_samples(processor, [item])
    pairs = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    runs = [
        (is_label, decoded(processor, [token for token, _ in run]))
        for is_label, run in groupby(pairs, lambda pair: pair[1] != -100)
    ]
    return "".join(f"«{text}»" if is_label else text for is_label, text in runs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_and_their_ends_are_learnt(name):
    layout = LAYOUTS[name]
    processor = processor_of(layout)
    assert marked(processor, TALK) == layout.expected
    question = Question("q", "What is shown?", ("A cat.",), (picture(),))
    asked = decoded(processor, encode_questions(processor, [question])["input_ids"][0])
    if name != "llava-onevision":  # whose template asks with other white space than it shows
        assert asked == layout.expected.partition("«")[0]


def learnt(**changes):
    how = {"train": "full", "loss": "sft", "learning_rate": 1e-2, "bf16": False}
    return RecoverConfig(**how, trainer={"logging_steps": 1}, **changes)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_model_stops_where_it_was_taught_to(kind):
    """Whether the template writes an end token or, as LLaVA's, none."""
    model, processor = load(folders.folder(kind))
    samples = short_samples(2)
    recover(model, None, samples, learnt(max_steps=24, batch_size=2), processor)
    end = processor.tokenizer.convert_tokens_to_ids("</s>" if kind == "llava" else "<|im_end|>")
    model.generation_config.suppress_tokens = None
    for item in samples:
        texts = [message["content"][-1]["text"] for message in item.messages]
        asked = encode_questions(processor, [Question("q", texts[0], (texts[1],), item.images)])
        said = model.generate(**asked, do_sample=False, max_new_tokens=24, eos_token_id=end)
        reply = said[0, asked["input_ids"].shape[1] :]
        assert reply[-1] == end
        assert processor.tokenizer.decode(reply[:-1]).strip() == texts[1]


def batches_of(model):
    """A batch with a picture and one without, and what encodes samples as these."""
    seen = tiny.batch(model)
    names = ("input_ids", "attention_mask", "labels")
    places = seen["input_ids"][0] != tiny.IMAGE_TOKEN
    blind = {name: tiny.batch(model, seed=1)[name][:, places][:, 3:] for name in names}

    def encode(processor, samples):
        (item,) = samples  # one kind alone
        return dict(seen if item.images else blind)

    return seen, blind, encode


def trained(model, monkeypatch, **changes):
    *batches, encode = batches_of(model)
    monkeypatch.setattr(trainer, "encode_samples", encode)
    shown = [*short_samples(1), *short_samples(2, sees=False)[1:]]
    before = {name: value.clone() for name, value in model.named_buffers()}
    expected = answer_loss(model, batches)
    history = recover(model, None, shown, learnt(batch_size=2, **changes), object())
    return history, expected, before


MIXED = [
    "mllama",
    "llama4",
    *tiered(["idefics2", "qwen3_vl_moe", "gemma3", "llava_onevision"], lambda *_: False),
]


@pytest.mark.parametrize("name", MIXED)
def test_pictures_and_texts_of_a_batch_count_as_each_alone(name, monkeypatch):
    history, expected, _ = trained(tiny.build(name), monkeypatch, max_steps=1)
    assert history.steps[0]["loss_sft"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["fast_vlm"])
def test_training_leaves_the_statistics_of_frozen_towers(name, monkeypatch):
    model = tiny.build(name)
    _, _, before = trained(model, monkeypatch, max_steps=2)
    assert any("running_mean" in buffer for buffer in before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("name", ["llama4", "mllama"])
def test_pictures_come_in_the_model_s_own_data_type(name):
    hold_in_(model := tiny.build(name), torch.bfloat16)
    assert answer_loss(model, [tiny.batch(model)]) > 0
