"""Encode conversations as model inputs, through the processor's own chat template.

Labels are the assistant turns. They are located in the template's output: it is rendered a second
time with a mark in place of every text, which shows what the template writes around the texts. A
label begins where generation would begin, and ends with the token that ends an answer: the first
special token behind it or, where the template writes none, the tokenizer's end token, which is put
there.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
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
    if getattr(processor, "chat_template", None) is None:
        picture = _picture_word(processor)
        turns = [str(_text_only(message, picture)["content"]) for message in messages]
        return "\n".join(turns) + ("\n" if generate else "")
    chat = list(messages) if can_see(processor) else [_text_only(m) for m in messages]
    how = {"tokenize": False, "add_generation_prompt": generate}
    how |= getattr(processor, "template_args", {})
    try:
        with limited():
            return str(processor.apply_chat_template(chat, **how))
    except errors.SlimError:
        raise
    except Exception as error:  # a template is a program
        raise DataError(
            f"the chat template refuses the conversation ({one_line(error)})"
        ) from error


def _text_only(message: Message, picture: str | None = None) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        if picture is None and any(part["type"] != "text" for part in content):
            raise DataError("a conversation has pictures, but the model cannot see")
        content = "".join(part.get("text", picture) for part in content)
    return {"role": message["role"], "content": content}


def _picture_word(processor: Any) -> str | None:
    """Return what stands for a picture in a text, if no template says so; None if nothing does."""
    if getattr(processor, "chat_template", None) is not None or not can_see(processor):
        return None
    if type(processor).__name__ == "Kosmos2_5Processor":  # puts the picture before the text
        return ""
    for name in ("boi_token", "image_token"):  # Gemma 3 makes the second of the first
        if word := getattr(processor, name, None):
            return str(word)
    raise ConfigError("model: its processor has neither a chat template nor an image_token")


def batches_by_kind(order: Sequence[int], sees: Sequence[bool], size: int) -> list[list[int]]:
    """Divide an order into batches with images or without: some processors refuse both in one."""
    kinds = dict.fromkeys(sees[i] for i in order)
    groups = [[i for i in order if sees[i] == kind] for kind in kinds]
    return [each[i : i + size] for each in groups for i in range(0, len(each), size)]


def encode_samples(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Encode conversations as right-padded inputs with ``labels`` on the assistant turns."""
    located = [_located(processor, sample) for sample in samples]
    texts = [text for text, _ in located]
    images = [[open_image(image) for image in sample.images] for sample in samples]
    names = ", ".join(repr(sample.id) for sample in samples)
    with raised_as(DataError, DataError, f"sample {names}:"):
        inputs = process(processor, texts, images, padding_side="right")
    labels, tokenizer = torch.full_like(inputs["input_ids"], IGNORE), tokenizer_of(processor)
    for row, (sample, (text, answers)) in enumerate(zip(samples, located, strict=True)):
        ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())].tolist()
        adds = adds_special_tokens(tokenizer, text)
        plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds)
        tokens = plain["input_ids"]
        left, right = torch.tensor(plain["offset_mapping"]).reshape(-1, 2).T
        # tokens that so many pictures add: only of none and of all it is known at once
        added, least = {0: 0, len(sample.images): len(ids) - len(tokens)}, 0
        for answer in answers:
            hits = ((left < answer.stop) & (right > answer.start)).nonzero().flatten().tolist()
            if not hits:
                continue
            start, stop = hits[0], hits[-1] + 1
            more = added.get(answer.images)
            if more is None or ids[start + more : stop + more] != tokens[start:stop]:
                # all that stands between two pictures is found as a whole, behind what was found;
                # the first token may have become another beside the picture's
                since = int((left < answer.since).sum())
                places = range(least, len(ids) - stop + 1)
                found = (
                    n
                    for first in range(since, min(since + 2, start) + 1)
                    for n in places
                    if ids[first + n : stop + n] == tokens[first:stop]
                )
                more = next(found, None)
            if more is None:
                raise DataError(f"sample {sample.id!r}: an answer cannot be found among its tokens")
            least = added[answer.images] = more
            where = slice(start + more, stop + more)
            labels[row, where] = inputs["input_ids"][row, where]
        if not (labels[row] != IGNORE).any():
            raise DataError(f"sample {sample.id!r} has no assistant turn to learn from")
    if "labels" in inputs:  # PaliGemma's: tokens of type 0, the prompt's, see each other both ways
        inputs["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).long()
    return {**inputs, "labels": labels}


def length_of(processor: Any, sample: Sample) -> int:
    """Count the tokens of a sample, those of its pictures included."""
    text, images = rendered(processor, sample), [open_image(image) for image in sample.images]
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        return int(process(processor, [text], [images], "right")["input_ids"].shape[1])


def rendered(processor: Any, sample: Sample) -> str:
    """Render a sample, with the token that ends an answer behind each; refuse an unfit text."""
    return _located(processor, sample)[0]


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
    if any(images) and type(processor).__name__ == "PaliGemmaProcessor":  # adds a line break
        texts = [text.removesuffix("\n") for text in texts]
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


class _Answer(NamedTuple):
    """Where an answer is in a text, with the token that ends it, and what stands before it."""

    start: int
    stop: int
    images: int  # so many pictures stand before it
    since: int  # where the words behind the last of these begin


def _located(processor: Any, sample: Sample) -> tuple[str, list[_Answer]]:
    """Render a sample, with an end token behind each answer, and find the answers in the text."""
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        text = render(processor, sample.messages)
    marked, texts, pictures, turns = _marked(sample.messages)
    # two renders of the whole conversation are enough, however many turns it has
    pieces = re.split(_MARKS, render(processor, marked))
    around, order = pieces[::2], [int(number) for number in pieces[1::2]]
    places = _places(texts, around, order, text)
    if places is None:
        raise DataError(
            f"sample {sample.id!r}: the chat template rewrites or leaves out what was said, so "
            "answers cannot be located"
        )
    before, behind = (dict(zip(order, part, strict=False)) for part in (around, around[1:]))
    prompt = ""  # what the template writes before the first answer begins
    if first := next((i for i, m in enumerate(marked) if m["role"] == "assistant"), 0):
        asked, waiting = (
            re.split(_MARKS, render(processor, marked[:first], generate))[-1]
            for generate in (False, True)
        )
        same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, waiting, strict=False))
        prompt = waiting[len(list(same)) :] or waiting
    tokenizer = tokenizer_of(processor)
    last, special = around[-1], _special_tokens(tokenizer, len(tokenizer))
    count = max((n for n, m in enumerate(marked, 1) if m["role"] == "assistant"), default=0)
    if 0 < count < len(marked):  # a question stands last, and may end in another way
        last = re.split(_MARKS, render(processor, marked[:count]))[-1]
    end, picture = _ending(last, special), _picture_word(processor)
    answers, since = list[_Answer](), dict[int, int]()
    made, done = "", 0  # the text up to a character, with end tokens
    for number, (turn, message) in enumerate(zip(turns, sample.messages, strict=True), 1):
        added = len(made) - done
        for i in turn:
            since.setdefault(pictures[i], places[i][0] + added)
        if message["role"] != "assistant" or not turn:
            continue
        start, stop = places[turn[0]][0], places[turn[-1]][1]
        header, after = before[turn[0]], behind[turn[-1]]
        if (prompted := header.rfind(prompt)) >= 0:
            start -= len(header) - prompted - len(prompt)
        shown = pictures[turn[0]]
        since[shown] = min(since[shown], start - len(prompt) * (prompted >= 0) + added)
        if not (sample.is_cut and number == count):
            rest = after.lstrip()
            following = next((word for word in special if rest.startswith(word)), picture)
            if end and after.startswith(end):
                stop += len(end)
            elif following != picture:  # GLM's answers end where the next turn begins
                stop += len(after) - len(rest) + len(str(following))
            elif tokenizer.eos_token is None:
                raise ConfigError(
                    "model: its chat template writes no token behind an answer and its tokenizer "
                    "has no eos_token, so the end of an answer cannot be taught"
                )
            else:
                made, done = made + text[done:stop] + str(tokenizer.eos_token), stop
        answers.append(_Answer(start + added, stop + len(made) - done, shown, since[shown]))
    return made + text[done:], answers


def _marked(
    messages: Sequence[Message],
) -> tuple[list[Message], list[str], list[int], list[range]]:
    """Mark the texts; return messages, texts, pictures before each, and texts of each turn."""
    marked, texts, pictures, turns = list[Message](), list[str](), list[int](), list[range]()
    images = 0
    for message in messages:
        first, content = len(texts), message["content"]
        parts = []
        for part in [{"text": content}] if isinstance(content, str) else content:
            if "text" in part:
                texts.append(part["text"])
                pictures.append(images)
                part = {**part, "text": _MARK.format(len(texts) - 1)}
            images += part.get("type") == "image"
            parts.append(part)
        turns.append(range(first, len(texts)))
        told = parts[0]["text"] if isinstance(content, str) else parts
        marked.append({**message, "content": told})
    return marked, texts, pictures, turns


def _ending(text: str, special: Sequence[str]) -> str:
    """Return the beginning of a text up to its first special token and those that follow it."""
    found = [(text.find(word), -len(word)) for word in special if word in text]
    at, negative_length = min(found, default=(0, 0))
    at -= negative_length
    while at and (word := next((word for word in special if text.startswith(word, at)), "")):
        at += len(word)
    return text[:at]


@lru_cache(4)  # of Gemma's tokenizer it takes 27 ms
def _special_tokens(tokenizer: Any, size: int) -> list[str]:
    """List the tokens that are no plain text, longest first; ``size`` tells changes."""
    words = (token.content for token in tokenizer.added_tokens_decoder.values())
    return sorted((word for word in words if word.strip()), key=len, reverse=True)


def _places(
    texts: list[str], around: list[str], order: list[int], text: str
) -> dict[int, tuple[int, int]] | None:
    """Return the characters of each text, which the template may strip; None if they differ."""
    if sorted(order) != [*range(len(texts))] or not text.startswith(around[0]):
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
