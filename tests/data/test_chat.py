"""Labels stand on the assistant turns, exactly; every processor expands pictures its own way."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data import chat
from slimvlm.data.read import fitted
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Question, Sample
from tests import tiny_folder as folders
from tests.tiny_folder import KINDS, SEEING, picture, sample, turn

every_kind = pytest.mark.parametrize("kind", KINDS)


def samples_of(kind):
    """Conversations of every shape that a kind can take."""
    first, second = turn("assistant", "It is red."), turn("assistant", "No, it is blue, not red.")
    again, seen = turn("user", "Is it red?"), turn("user", None, "Which colour?")
    turns = {
        "single": (turn("user", "Which colour is shown?"), first),
        "multi": (turn("user", "Which colour?"), first, again, second),
        "same": (turn("user", "It is red."), first, again, first),
    }
    if kind != "text":
        turns |= {
            "seen": (seen, first),
            "seen-multi": (turn("user", None, "Which?"), first, again, second),
            "two": (turn("user", None, None, "Which colours?"), second),
            "later": (turn("user", "Are you there?"), first, turn("user", None, "And?"), second),
            "each": (seen, first, turn("user", None, "And here?"), second),
        }
    counts = {name: str(each).count("'image'") for name, each in turns.items()}
    return {name: sample(name, *each, images=counts[name]) for name, each in turns.items()}


@every_kind
def test_tokenizers_are_written_as_they_were_read(kind):
    """Sides and tokens of padding are the model's own, whatever batches need."""
    processor = copy.deepcopy(folders.processor(kind))
    words = chat.tokenizer_of(processor)

    def said():
        return words.padding_side, words.pad_token, words.backend_tokenizer.to_str()

    for pad in (words.pad_token, None):
        words.pad_token = pad
        before = said()
        for name in ("multi", "single"):
            chat.encode_samples(processor, [samples_of(kind)[name]] * 2)
            chat.encode_questions(processor, [Question("q", "Which?", ("red",))] * 2)
            assert said() == before


@every_kind
def test_an_answer_ends_alike_whoever_speaks_last(kind):
    processor, item = folders.processor(kind), samples_of(kind)["single"]
    asks = replace(item, messages=(*item.messages, turn("user", "Sure?")))
    alone, both = (chat.encode_samples(processor, [each])["labels"][0] for each in (item, asks))
    assert labelled_runs(both) == labelled_runs(alone)


def paligemma():
    words = copy.deepcopy(folders.processor("llava").tokenizer)
    pictures = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 4
    return hf.PaliGemmaProcessor(pictures, words)


def test_paligemma_reads_the_prompt_in_both_directions_and_never_answers():
    processor = paligemma()
    processor.chat_template = folders.LLAVA_CHAT
    batch = chat.encode_samples(processor, [samples_of("llava")["seen"]])
    first = int((batch["labels"][0] != IGNORE).nonzero()[0])
    rest = batch["labels"].shape[1] - first
    assert batch["token_type_ids"][0].tolist() == [0] * first + [1] * rest


def kosmos():
    named = {"image_token": "<s>", "boi_token": "<image>", "eoi_token": "</image>"}
    words = folders.tokenizer(["<image>", "</image>"], adds_bos=False, extra_special_tokens=named)
    pictures = hf.Kosmos2_5ImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=16)
    return hf.Kosmos2_5Processor(pictures, words, num_image_tokens=4)


@pytest.mark.parametrize(
    ("make", "asked"),
    [(paligemma, "<image>" * 4 + "<s>"), (kosmos, "<s><image><s><s><s><s></image>")],
    ids=["paligemma", "kosmos-2.5"],
)
def test_models_that_are_published_without_a_template_see_pictures(make, asked):
    """A line break stands between question and answer, and neither is asked in another way."""
    processor, item = make(), samples_of("llava")["seen"]
    batch = chat.encode_samples(processor, [item])
    assert decoded_labels(processor, batch["labels"][0]) == ["It is red.</s>"]
    question = chat.encode_questions(
        processor, [Question("q", "Which colour?", ("",), (picture(),))]
    )
    first = int((batch["labels"][0] != IGNORE).nonzero()[0])
    for ids in (question["input_ids"][0], batch["input_ids"][0, :first]):
        assert processor.tokenizer.decode(ids) == f"{asked}Which colour?\n"


def test_a_cut_answer_has_no_end():
    words, item = folders.processor("text"), samples_of("text")["single"]
    whole = chat.encode_samples(words, [item])["labels"][0]
    cut = fitted(words, item, len(whole) - 3, cuts=True)
    (said,) = decoded_labels(words, chat.encode_samples(words, [cut])["labels"][0])
    assert said
    assert answers_of(item)[0].startswith(said)


def test_a_tokenizer_that_cannot_end_an_answer_is_refused():
    words = copy.deepcopy(folders.processor("llava"))
    words.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token, so the end of an answer cannot"):
        chat.located(words, samples_of("llava")["single"])


CASES = [(kind, name) for kind in KINDS for name in samples_of(kind)]


def answers_of(item):
    return [m["content"][0]["text"] for m in item.messages if m["role"] == "assistant"]


def labelled_runs(labels):
    """Token ids of each stretch of labels."""
    runs = []
    inside = False
    for value in labels.tolist():
        if value != IGNORE:
            if not inside:
                runs.append([])
            runs[-1].append(value)
        inside = value != IGNORE
    return runs


def decoded_labels(processor, labels):
    tokenizer = chat.tokenizer_of(processor)
    return [tokenizer.decode(run) for run in labelled_runs(labels)]


def expected_labels(kind, item):
    return [KINDS[kind].answer.format(answer) for answer in answers_of(item)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_labels_are_the_answers_and_lengths_those_of_the_encoded_sample(kind, name):
    processor, item = folders.processor(kind), samples_of(kind)[name]
    batch = chat.encode_samples(processor, [item])
    assert decoded_labels(processor, batch["labels"][0]) == expected_labels(kind, item)
    labelled = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    length = batch["input_ids"].shape[1]
    chat.located(processor, item)
    assert chat.length_of(processor, item) == length
    assert fitted(processor, item, length) is item
    with pytest.raises(
        DataError, match=rf"'{name}' has {length} tokens, --max-length is {length - 1}"
    ):
        fitted(processor, item, length - 1)


@every_kind
def test_a_batch_is_its_samples_padded_on_the_right(kind):
    processor = folders.processor(kind)
    items = list(samples_of(kind).values())
    seen = [item for item in items if item.images]
    for group in (items, seen) if seen else (items,):
        batch = chat.encode_samples(processor, group)
        longest = batch["input_ids"].shape[1]
        for row, item in enumerate(group):
            alone = chat.encode_samples(processor, [item])
            length = alone["input_ids"].shape[1]
            for key in ("input_ids", "labels", "attention_mask"):
                assert torch.equal(batch[key][row, :length], alone[key][0]), (item.id, key)
            assert not batch["attention_mask"][row, length:].any()
            assert (batch["labels"][row, length:] == IGNORE).all()
            assert (batch["input_ids"][row, length:] == 0).all()
        assert longest == int(batch["attention_mask"].sum(1).max())


@every_kind
def test_questions_end_at_the_right_edge_and_samples_after_them_do_not(kind):
    """The tokenizer keeps its padding side between calls; neither call may depend on it."""
    processor, items = folders.processor(kind), list(samples_of(kind).values())[:2]
    before = chat.encode_samples(processor, items)
    pictures = (picture(),) if kind in SEEING else ()
    questions = [
        Question("short", "Which?", ("red",), pictures),
        Question("long", "Which of all these many colours is shown here?", ("red",), pictures),
    ]
    batch = chat.encode_questions(processor, questions)
    assert torch.equal(before["labels"], chat.encode_samples(processor, items)["labels"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[0, 0]
    for row, question in enumerate(questions):
        alone = chat.encode_questions(processor, [question])["input_ids"][0]
        assert torch.equal(ids[row, -len(alone) :], alone)
        assert not mask[row, : -len(alone)].any()
        text = chat.tokenizer_of(processor).decode(alone)
        assert question.prompt in text
        assert text.rstrip().lower().endswith(("assistant:", "assistant", "[assistant]"))
    assert "labels" not in batch


@every_kind
def test_a_question_is_the_beginning_of_its_sample(kind):
    """What is asked in evaluation is what was learnt in recovery, token by token."""
    processor = folders.processor(kind)
    sees = kind in SEEING
    pictures = (picture(),) if sees else ()
    shown = [None] if sees else []
    question = Question("q", "Which colour is shown?", ("red",), pictures)
    item = Sample(
        "s", (turn("user", *shown, "Which colour is shown?"), turn("assistant", "red")), pictures
    )
    asked = chat.encode_questions(processor, [question])["input_ids"][0]
    learnt = chat.encode_samples(processor, [item])
    start = int((learnt["labels"][0] != IGNORE).nonzero()[0])
    assert torch.equal(learnt["input_ids"][0, :start], asked)


@every_kind
def test_a_conversation_without_an_answer_is_refused(kind):
    with pytest.raises(DataError, match="'silent' has no assistant turn"):
        chat.encode_samples(folders.processor(kind), [sample("silent", turn("user", "Hello?"))])


def test_a_model_without_eyes_or_words_is_refused():
    seen, none = [samples_of("llava")["seen"]], "neither a processor nor a tokenizer"
    with pytest.raises(DataError, match="cannot see"):
        chat.encode_samples(folders.processor("text"), seen)
    with pytest.raises(ConfigError, match=none):
        chat.encode_samples(None, seen)


TEXT, PROMPT = "m['content']", "{%% if add_generation_prompt %%}{{ '%sassistant\n' }}{%% endif %%}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT % "<|im_start|>"
)
GEMMA = (  # which trims, and writes a date as Llama 3 does
    "{{ bos_token + strftime_now('%d %b %Y') }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}" + PROMPT % "<start_of_turn>"
)


@cache
def plain_words():
    return folders.tokenizer(["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"])


def with_template(monkeypatch, chat_template):
    monkeypatch.setattr(plain_words(), "chat_template", chat_template)
    return plain_words()


@pytest.mark.parametrize(
    ("chat_template", "end", "strips"),
    [(GEMMA, "<end_of_turn>", True), (CHATML, "<|im_end|>", False)],
    ids=["gemma", "chatml"],
)
def test_an_answer_may_be_stripped_and_repeat_what_was_asked(
    chat_template, end, strips, monkeypatch
):
    words = with_template(monkeypatch, chat_template)
    said = [" It is red. ", "It is red.", "red"]
    rows = [turn(role, text) for text in said for role in ("user", "assistant")]
    batch = chat.encode_samples(words, [Sample("s", tuple(rows))])
    expected = [(text.strip() if strips else text) + end for text in said]
    assert decoded_labels(words, batch["labels"][0]) == expected


def test_a_text_with_a_token_for_pictures_is_the_sample_s_fault():
    item = sample("odd", turn("user", None, "<image> is what?"), turn("assistant", "A."), images=1)
    words, told = folders.processor("llava"), r"sample 'odd': the processor refuses .*<image>"
    with pytest.raises(DataError, match=told):
        chat.encode_samples(words, [item])
    with pytest.raises(DataError, match=told):
        fitted(words, item, 1)


def test_a_template_that_refuses_is_the_sample_s_fault(monkeypatch):
    words = with_template(monkeypatch, GEMMA)
    item = Sample("briefed", (turn("system", "Be brief."), *samples_of("text")["single"].messages))
    for read in (chat.located, lambda words, item: chat.encode_samples(words, [item])):
        with pytest.raises(DataError, match=r"sample 'briefed': .*System role not supported"):
            read(words, item)


def test_a_system_turn_is_not_learnt_and_rewritten_words_are_refused(monkeypatch):
    words, item = with_template(monkeypatch, CHATML), samples_of("text")["multi"]
    briefed = Sample("briefed", (turn("system", "It is red."), *item.messages))
    labels = chat.encode_samples(words, [briefed])["labels"][0]
    assert decoded_labels(words, labels) == [f"{said}<|im_end|>" for said in answers_of(item)]
    for old, new in ((TEXT, f"{TEXT} | upper"), ("in messages", "in messages[1:]")):
        assert old in CHATML
        words = with_template(monkeypatch, CHATML.replace(old, new))
        with pytest.raises(DataError, match=r"'multi'.*rewrites or leaves out a text"):
            chat.located(words, item)


def test_special_tokens_reach_a_template_as_in_transformers(monkeypatch):
    words = with_template(monkeypatch, CHATML + "{{ tools }} {{ more }} {{ eos_token }}")
    said = [{"role": "user", "content": "Hi"}]
    plain = words.apply_chat_template(said, tokenize=False)
    assert chat.render(words, said) == plain
    assert "None  </s>" in plain


def test_what_stands_before_the_last_answer_alone_is_learnt_there_alone(monkeypatch):
    """Thinking models write an empty thought, but only in the last turn of a conversation."""
    thought = "{{ '<think></think>' if loop.last and m['role'] == 'assistant' else '' }}"
    text = "{{ m['content'] }}"
    assert text in CHATML
    words = with_template(monkeypatch, CHATML.replace(text, thought + text))
    item = samples_of("text")["multi"]
    first, second = answers_of(item)
    labels = chat.encode_samples(words, [item])["labels"][0]
    assert decoded_labels(words, labels) == [
        f"{first}<|im_end|>",
        f"<think></think>{second}<|im_end|>",
    ]


def test_a_long_conversation_is_not_rendered_turn_by_turn(monkeypatch):
    words = with_template(monkeypatch, CHATML)
    said = tuple(turn(("user", "assistant")[i % 2], f"It is {i}.") for i in range(300))
    renders = []
    render = chat.render

    def counted(processor, messages, generate=False):
        renders.append(len(messages))
        return render(processor, messages, generate)

    monkeypatch.setattr(chat, "render", counted)
    labels = chat.encode_samples(words, [Sample("long", said)])["labels"][0]
    assert decoded_labels(words, labels) == [f"It is {i}.<|im_end|>" for i in range(1, 300, 2)]
    assert sorted(renders) == [1, 1, 300, 300]


@pytest.mark.parametrize("alone", [False, True])
def test_answers_between_pictures_are_found_without_processing_these_again(alone, monkeypatch):
    """Also where each takes more tokens in company, and the user says the answers before."""
    words = folders.processor("qwen2_5_vl")
    said = ["It is one.", "It is two.", "It is one." if alone else "It is three."]
    asked = said if alone else ["Which?"] * 3
    rows = [
        each
        for ask, text in zip(asked, said, strict=True)
        for each in (
            turn("user", *((None,) if alone else (ask, None, ask))),
            turn("assistant", text),
        )
    ]
    item = sample("s", *rows, images=3)
    processed = []
    process = chat.process

    def counted(processor, texts, images, padding_side):
        processed.append(len(images[0]))
        return process(processor, texts, images, padding_side)

    monkeypatch.setattr(chat, "process", counted)
    labels = chat.encode_samples(words, [item])["labels"][0]
    assert decoded_labels(words, labels) == expected_labels("qwen2_5_vl", item)
    assert processed == [3]


def test_a_tokenizer_without_template_gets_lines_and_one_without_pad_token_can_pad(monkeypatch):
    words = folders.processor("text")
    monkeypatch.setattr(words, "chat_template", None)
    item = samples_of("text")["multi"]
    batch = chat.encode_samples(words, [item])
    assert decoded_labels(words, batch["labels"][0]) == [f"{a}</s>" for a in answers_of(item)]
    asked = chat.encode_questions(words, [Question("q", "Which?", ("red",))])
    assert words.decode(asked["input_ids"][0], skip_special_tokens=True) == "Which?\n"
    words = folders.tokenizer()
    words.chat_template = folders.TEXT_CHAT
    words.pad_token = None
    items = list(samples_of("text").values())
    batch = chat.encode_samples(words, items)
    for row, item in enumerate(items):
        assert decoded_labels(words, batch["labels"][row]) == expected_labels("text", item)


def test_pictures_come_as_rgb_and_one_that_broke_since_is_named(tmp_path):
    path = tmp_path / "palette.png"
    picture(size=(200, 200)).convert("P").save(path)
    assert chat.open_image(path).mode == "RGB"
    path.write_bytes(path.read_bytes()[:-120])
    item = Sample("s", samples_of("llava")["seen"].messages, (path,))
    with pytest.raises(DataError, match=r"palette\.png.*cannot be read"):
        chat.encode_samples(folders.processor("llava"), [item])
    assert chat.open_image(picture().convert("RGBA")).mode == "RGB"
