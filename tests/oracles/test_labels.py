"""What a conversation teaches, in every layout: the answers, their ends, and nothing else."""

import re
from itertools import groupby

import pytest

from slimvlm.data.chat import encode_questions, encode_samples
from slimvlm.data.samples import Question
from tests import tiny_folder as folders
from tests.oracles.layouts import LAYOUTS, Layout
from tests.tiny_folder import picture, sample, turn

SPECIAL = r"<\|?[a-zA-Z_/0-9]+\|?>|\[/?[A-Za-z]+\]"
TALK = sample(
    "talk",
    *(turn("user", None, "What is shown?"), turn("assistant", "A cat.")),
    *(turn("user", "Which colour?"), turn("assistant", "Grey.")),
    images=1,
)


def chat_template(layout: Layout) -> str:
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


def processor_of(layout: Layout):
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
