"""Encode conversations as model inputs, through the processor's own chat template.

Labels are the assistant turns. They are located in the template's output: it is rendered a second
time with a mark in place of every text, which shows what the template writes around the texts. A
label begins where generation would begin, and ends with the token that ends an answer.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from PIL import Image
from torch import Tensor

from slimvlm.core import errors
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, raised_as
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Message, Question, Sample, open_image
from slimvlm.data.templates import check_texts, limited

TOKENS_PER_BYTE = 64  # tokens that a byte of text may become, beside a thousand for the whole text
USUAL_SIZE = (336, 336)  # of a picture that stands for any
_MARK = "\ue000{}\ue001"
"""Placeholder of a text, between two characters of Unicode's private use area."""
_MARKS = _MARK.format(r"(\d+)")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself for a text model."""
    return getattr(processor, "tokenizer", processor)


def can_see(processor: Any) -> bool:
    """Return whether the processor takes pictures."""
    return getattr(processor, "image_processor", None) is not None


def question_messages(question: Question) -> list[Message]:
    """The user turn of a question: pictures first, then the text."""
    pictures = [{"type": "image"} for _ in question.images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question.prompt}]}]


def plain_question(processor: Any, size: tuple[int, int] = USUAL_SIZE) -> Question:
    """Ask about a grey picture, or about none if the model takes no pictures."""
    shown = (Image.new("RGB", size, "grey"),) if can_see(processor) else ()
    return Question("latency", "What is shown here?", ("",), shown)


def answered_sample(question: Question, reply: str) -> Sample:
    """A question with a reply, as a conversation."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return Sample(question.id, (*question_messages(question), answer), question.images)


def render(processor: Any, messages: Sequence[Message], generate: bool = False) -> str:
    """Render a conversation as the model's input text, with a placeholder for each picture."""
    if processor is None:
        raise ConfigError("model: its folder has neither a processor nor a tokenizer")
    chat = list(messages) if can_see(processor) else [_text_only(m) for m in messages]
    if getattr(processor, "chat_template", None) is None:
        turns = [str(_text_only(message)["content"]) for message in messages]
        return "\n".join(turns) + ("\n" if generate else "")
    how = {"tokenize": False, "add_generation_prompt": generate}
    how |= getattr(processor, "template_args", {})
    try:
        with limited():
            return str(processor.apply_chat_template(chat, **how))
    except TemplateSyntaxError as error:
        raise ConfigError(f"model: its chat template is malformed ({one_line(error)})") from error
    except errors.SlimError:
        raise
    except Exception as error:  # a template is a program
        raise DataError(
            f"the chat template refuses the conversation ({one_line(error)})"
        ) from error


def _text_only(message: Message) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            raise DataError("a conversation has pictures, but the model cannot see")
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def encode_samples(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Encode conversations as right-padded inputs with ``labels`` on the assistant turns."""
    texts = [rendered(processor, sample) for sample in samples]
    images = [[open_image(image) for image in sample.images] for sample in samples]
    names = ", ".join(repr(sample.id) for sample in samples)
    with raised_as(DataError, DataError, f"sample {names}:"):
        inputs = process(processor, texts, images, padding_side="right")
    labels, tokenizer = torch.full_like(inputs["input_ids"], IGNORE), tokenizer_of(processor)
    for row, (sample, text, pictures) in enumerate(zip(samples, texts, images, strict=True)):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row, :length].tolist()
        adds = adds_special_tokens(tokenizer, text)
        plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds)
        left, right = torch.tensor(plain["offset_mapping"]).reshape(-1, 2).T
        added = {0: 0, len(pictures): len(ids) - len(left)}  # tokens that so many pictures add
        behind, stop = 0, 0  # where the last answer ends: among the plain tokens, and among all
        for first, last, shown in _answers(processor, sample, text):
            hits = ((left < last) & (right > first)).nonzero().flatten().tolist()
            if not hits:
                continue
            if shown not in added:
                before = text[:first]
                with_pictures = process(processor, [before], [pictures[:shown]], "right")
                alone = tokenizer(before, add_special_tokens=adds)
                added[shown] = with_pictures["input_ids"].shape[1] - len(alone["input_ids"])
            answer = plain["input_ids"][hits[0] : hits[-1] + 1]
            start = hits[0] + added[shown]
            if ids[start : start + len(answer)] != answer:
                starts = range(hits[0] - behind + stop, len(ids) - len(answer) + 1)
                start = next((at for at in starts if ids[at : at + len(answer)] == answer), -1)
            if start < 0:
                raise DataError(f"sample {sample.id!r}: an answer cannot be found among its tokens")
            behind, stop = hits[-1] + 1, start + len(answer)
            labels[row, start:stop] = inputs["input_ids"][row, start:stop]
        if not (labels[row] != IGNORE).any():
            raise DataError(f"sample {sample.id!r} has no assistant turn to learn from")
    if "labels" in inputs:  # PaliGemma's: tokens of type 0, the prompt's, see each other both ways
        inputs["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).long()
    return {**inputs, "labels": labels}


def require_readable(processor: Any, sample: Sample) -> None:
    """Raise a `DataError` if `encode_samples` would refuse a sample's text; skip its pictures."""
    _answers(processor, sample, rendered(processor, sample))


def length_of(processor: Any, sample: Sample) -> int:
    """Count the tokens of a sample, those of its pictures included."""
    text, images = rendered(processor, sample), [open_image(image) for image in sample.images]
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        return int(process(processor, [text], [images], "right")["input_ids"].shape[1])


def rendered(processor: Any, sample: Sample) -> str:
    """Render a sample; name it in errors."""
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        return render(processor, sample.messages)


def encode_questions(processor: Any, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Encode questions as left-padded model inputs for generation."""
    texts = [render(processor, question_messages(each), generate=True) for each in questions]
    images = [[open_image(image) for image in each.images] for each in questions]
    return process(processor, texts, images, padding_side="left")


def process(
    processor: Any, texts: list[str], images: list[list[Image.Image]], padding_side: str
) -> dict[str, Tensor]:
    """Run the processor over a batch of rendered conversations."""
    tokenizer = tokenizer_of(processor)
    side, pad = tokenizer.padding_side, tokenizer.pad_token  # the model's own, written beside it
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    padding = None if backend is None else backend.padding
    tokenizer.pad_token, tokenizer.padding_side = pad or tokenizer.eos_token, padding_side
    # some processors have a default side that beats the tokenizer's
    how = {"return_tensors": "pt", "padding": True, "padding_side": padding_side}
    adds = adds_special_tokens(tokenizer, texts[0])
    try:
        check_texts(tokenizer.name_or_path, texts)
        with errors.panics_raised():
            if any(images):
                given = {"text": texts, "images": images, "add_special_tokens": adds}
                return dict(processor(**given, **how))
            inputs = dict(tokenizer(texts, add_special_tokens=adds, **how))
        most = TOKENS_PER_BYTE * max(len(text.encode()) for text in texts) + 1000
        if not 1 <= inputs["input_ids"].shape[1] <= most:
            raise ValueError(f"its tokenizer makes {inputs['input_ids'].shape[1]:,} tokens of it")
        return inputs
    except Exception as error:  # a text with the model's own token for pictures, wrong settings
        reason = one_line(error)[:LONGEST]
        raise DataError(f"the processor refuses the conversation ({reason})") from error
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        if backend is not None:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer must add its first token, which the template did not write."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def _answers(processor: Any, sample: Sample, text: str) -> list[tuple[int, int, int]]:
    """Return each answer's span in ``text`` (with its end token) and the pictures before it."""
    texts, texts_of_turns, marked = list[str](), list[range](), list[Message]()
    for message in sample.messages:
        first, content = len(texts), message["content"]
        parts = []
        for part in [{"text": content}] if isinstance(content, str) else content:
            if "text" in part:
                texts.append(part["text"])
                part = {**part, "text": _MARK.format(len(texts) - 1)}
            parts.append(part)
        texts_of_turns.append(range(first, len(texts)))
        told = parts[0]["text"] if isinstance(content, str) else parts
        marked.append({**message, "content": told})
    # two renders of the whole conversation are enough, however many turns it has
    pieces = re.split(_MARKS, render(processor, marked))
    around, order = pieces[::2], [int(number) for number in pieces[1::2]]
    places = _places(texts, around, order, text)
    if places is None:
        raise DataError(
            f"sample {sample.id!r}: the chat template rewrites what was said, so answers cannot be "
            "located"
        )
    prompt = ""  # what the template writes before the first answer begins
    if first := next((i for i, m in enumerate(marked) if m["role"] == "assistant"), 0):
        asked, waiting = (
            re.split(_MARKS, render(processor, marked[:first], generate))[-1]
            for generate in (False, True)
        )
        same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, waiting, strict=False))
        prompt = waiting[len(list(same)) :] or waiting
    # an answer ends as the conversation does, up to its first special token
    last, added = around[-1], tokenizer_of(processor).added_tokens_decoder.values()
    count = max((n for n, m in enumerate(marked, 1) if m["role"] == "assistant"), default=0)
    if 0 < count < len(marked):  # a question stands last, and may end in another way
        last = re.split(_MARKS, render(processor, marked[:count]))[-1]
    ends = [(last.find(t.content), -len(t.content)) for t in added if t.content in last]
    at, negative_length = min(ends, default=(len(last.rstrip()), 0))
    end = last[: at - negative_length]
    answers, images = [], 0
    for message, numbers in zip(sample.messages, texts_of_turns, strict=True):
        images += num_images(message)
        written = [i for i in numbers if i in places]
        if message["role"] != "assistant" or not written:
            continue
        start, stop = places[written[0]][0], places[written[-1]][1]
        before, after = (around[order.index(written[i]) - i] for i in (0, -1))
        prompted = before.rfind(prompt)
        start -= len(before) - prompted - len(prompt) if prompted >= 0 else 0
        stop += len(end) if after.startswith(end) else 0
        answers.append((start, stop, images))
    return answers


def _places(
    texts: list[str], around: list[str], order: list[int], text: str
) -> dict[int, tuple[int, int]] | None:
    """Return the characters of each text, which the template may strip; None if they differ."""
    if len(set(order)) != len(order) or not text.startswith(around[0]):
        return None
    places: dict[int, tuple[int, int]] = {}
    position = len(around[0])
    for number, after in zip(order, around[1:], strict=True):
        raw = texts[number]
        forms = (raw, raw.rstrip(), raw.lstrip(), raw.strip())
        form = next((f for f in forms if text.startswith(f + after, position)), None)
        if form is None:
            return None
        places[number] = (position, position + len(form))
        position += len(form) + len(after)
    return places if position == len(text) else None


def num_images(message: Message) -> int:
    """Count the pictures of a turn."""
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
