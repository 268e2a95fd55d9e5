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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from slimvlm.core import errors
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, raised_as
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Message, Question, Sample, open_image
from slimvlm.data.templates import check_texts, rendered

TOKENS_PER_BYTE = 64  # tokens that a byte of text may become, plus a thousand for the whole text
USUAL_SIZE = (640, 480)  # width and height of a usual photo, where no data says it
_MARK = "\ue000{}\ue001"
"""Placeholder of a text, between two characters of Unicode's private use area."""
_MARKS = _MARK.format(r"(\d+)")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself for a text model."""
    return getattr(processor, "tokenizer", processor)


def can_see(processor: Any) -> bool:
    """Return whether the processor takes images."""
    return getattr(processor, "image_processor", None) is not None


def question_messages(question: Question) -> list[Message]:
    """Make the user turn of a question: images first, then the text."""
    images = [{"type": "image"} for _ in question.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.prompt}]}]


def plain_question(processor: Any, size: tuple[int, int] = USUAL_SIZE) -> Question:
    """Ask about a grey image, or about none if the model takes no images."""
    shown = (Image.new("RGB", size, "grey"),) if can_see(processor) else ()
    return Question("latency", "What is shown here?", ("",), shown)


def answered_sample(question: Question, reply: str) -> Sample:
    """Make a conversation of a question and a reply."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return Sample(question.id, (*question_messages(question), answer), question.images)


def render(processor: Any, messages: Sequence[Message], generate: bool = False) -> str:
    """Render a conversation as the model's input text, with a placeholder for each image."""
    if processor is None:
        raise ConfigError("model: its folder has neither a processor nor a tokenizer")
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):  # templates by name
        template = template.get("default", "{{ raise_exception('none is named default') }}")
    chat, picture = list(messages), _picture_word(processor)
    if template is None or not can_see(processor):  # contents are texts, not lists of parts
        for place, message in enumerate(messages):
            content = message["content"]
            if not isinstance(content, str):
                if picture is None and any(part["type"] != "text" for part in content):
                    raise DataError("a sample has images, but the model cannot see")
                content = "".join(part.get("text", picture) for part in content)
            chat[place] = {"role": message["role"], "content": content}
    if template is None:
        return "\n".join(turn["content"] for turn in chat) + ("\n" if generate else "")
    values = {"tools": None, "documents": None, **tokenizer_of(processor).special_tokens_map}
    return rendered(template, values | {"messages": chat, "add_generation_prompt": generate})


def _picture_word(processor: Any) -> str | None:
    """Return what stands for an image in a text, if no template says so; None if nothing does."""
    if getattr(processor, "chat_template", None) is not None or not can_see(processor):
        return None
    if type(processor).__name__ == "Kosmos2_5Processor":  # puts the image before the text
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
    found = [located(processor, sample) for sample in samples]
    texts = [text for text, _ in found]
    names = ", ".join(repr(sample.id) for sample in samples)
    with raised_as(DataError, DataError, f"sample {names}:"):
        inputs = process(processor, texts, [sample.images for sample in samples], "right")
    labels, tokenizer = torch.full_like(inputs["input_ids"], IGNORE), tokenizer_of(processor)
    for row, (sample, (text, answers)) in enumerate(zip(samples, found, strict=True)):
        ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())].tolist()
        adds = adds_special_tokens(tokenizer, text)
        plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds)
        tokens = plain["input_ids"]
        left, right = torch.tensor(plain["offset_mapping"]).reshape(-1, 2).T
        # tokens that so many images add: only of none and of all it is known at once
        added, least = {0: 0, len(sample.images): len(ids) - len(tokens)}, 0
        for answer in answers:
            hits = ((left < answer.stop) & (right > answer.start)).nonzero().flatten().tolist()
            if not hits:
                continue
            start, stop = hits[0], hits[-1] + 1
            more = added.get(answer.images)
            if more is None or ids[start + more : stop + more] != tokens[start:stop]:
                # the text between two images is found as a whole, behind what was found before;
                # its first token may differ next to an image
                since = int((left < answer.since).sum())
                places = range(least, len(ids) - stop + 1)
                fitting = (
                    n
                    for first in range(since, min(since + 2, start) + 1)
                    for n in places
                    if ids[first + n : stop + n] == tokens[first:stop]
                )
                more = next(fitting, None)
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
    """Count the tokens of a sample, with those of its images."""
    text, _ = located(processor, sample)
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        return int(process(processor, [text], [sample.images], "right")["input_ids"].shape[1])


def encode_questions(processor: Any, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Encode questions as left-padded model inputs for generation."""
    texts = [render(processor, question_messages(each), generate=True) for each in questions]
    return process(processor, texts, [question.images for question in questions], "left")


def process(
    processor: Any,
    texts: list[str],
    images: Sequence[Sequence[Image.Image | Path]],
    padding_side: str,
) -> dict[str, Tensor]:
    """Run the processor over a batch of rendered conversations."""
    opened = [[open_image(image) for image in each] for each in images]
    tokenizer = tokenizer_of(processor)
    side, pad = tokenizer.padding_side, tokenizer.pad_token  # the model's own, restored below
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    padding = None if backend is None else backend.padding
    tokenizer.pad_token, tokenizer.padding_side = pad or tokenizer.eos_token, padding_side
    # some processors have a default side that beats the tokenizer's
    how = {"return_tensors": "pt", "padding": True, "padding_side": padding_side}
    adds = adds_special_tokens(tokenizer, texts[0])
    if any(opened) and type(processor).__name__ == "PaliGemmaProcessor":  # adds a line break
        texts = [text.removesuffix("\n") for text in texts]
    try:
        check_texts(tokenizer.name_or_path, texts)
        with errors.panics_raised():
            if any(opened):
                given = {"text": texts, "images": opened, "add_special_tokens": adds}
                return dict(processor(**given, **how))
            inputs = dict(tokenizer(texts, add_special_tokens=adds, **how))
        most = TOKENS_PER_BYTE * max(len(text.encode()) for text in texts) + 1000
        if not 1 <= inputs["input_ids"].shape[1] <= most:
            raise ValueError(f"its tokenizer makes {inputs['input_ids'].shape[1]:,} tokens of it")
        return inputs
    except Exception as error:  # a text with the model's own token for images, wrong settings
        reason = one_line(error)[:LONGEST]
        raise DataError(f"the processor refuses the sample ({reason})") from error
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        if backend is not None:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer must add its first token, which the template did not write."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


class _Text(NamedTuple):
    """Where a text of a conversation is in its rendering, and what the template wrote around it."""

    images: int  # so many images stand before it
    start: int
    stop: int
    before: str  # up to the text before it
    behind: str  # up to the text behind it


def _texts(
    processor: Any, sample: Sample, text: str
) -> tuple[list[Message], list[list[_Text]], str]:
    """Find the texts of each turn in a sample's rendering.

    Returns the turns with marks as their texts, the texts, and what stands behind the last one.
    """
    marked, turns, texts, images = list[Message](), list[range](), list[tuple[int, str]](), 0
    for message in sample.messages:
        first, content, parts = len(texts), message["content"], []
        for part in [{"text": content}] if isinstance(content, str) else content:
            if "text" in part:
                texts.append((images, part["text"]))
                part = {**part, "text": _MARK.format(len(texts) - 1)}
            images += part.get("type") == "image"
            parts.append(part)
        marks = parts[0]["text"] if isinstance(content, str) else parts
        marked.append({**message, "content": marks})
        turns.append(range(first, len(texts)))
    pieces = re.split(_MARKS, render(processor, marked))
    around, order = pieces[::2], [int(number) for number in pieces[1::2]]
    found, position = dict[int, _Text](), len(around[0])
    is_same = sorted(order) == [*range(len(texts))] and text.startswith(around[0])
    for number, before, behind in zip(order, around, around[1:], strict=False) if is_same else ():
        images, raw = texts[number]
        forms = (raw, raw.rstrip(), raw.lstrip(), raw.strip())  # templates may strip it
        form = next((f for f in forms if text.startswith(f + behind, position)), None)
        if form is None:
            break
        stop = position + len(form)
        found[number] = _Text(images, position, stop, before, behind)
        position = stop + len(behind)
    if len(found) < len(texts) or position != len(text):
        raise DataError(
            f"sample {sample.id!r}: the chat template rewrites or leaves out a text, so answers "
            "cannot be located"
        )
    return marked, [[found[number] for number in turn] for turn in turns], around[-1]


@lru_cache(4)  # of Gemma's tokenizer it takes 27 ms
def _special_tokens(tokenizer: Any, size: int) -> list[str]:
    """List the tokens that are no plain text, longest first; ``size`` tells changes."""
    words = (token.content for token in tokenizer.added_tokens_decoder.values())
    return sorted((word for word in words if word.strip()), key=len, reverse=True)


class _Answer(NamedTuple):
    """Where an answer is in a text, with the token that ends it, and what stands before it."""

    start: int
    stop: int
    images: int  # so many images stand before it
    since: int  # where the text behind the last of these begins


def located(processor: Any, sample: Sample) -> tuple[str, list[_Answer]]:
    """Render a sample, with an end token behind each answer, and find the answers in the text.

    Raises a `DataError` if the template refuses it or changes its texts.
    """
    with raised_as(DataError, DataError, f"sample {sample.id!r}:"):
        text = render(processor, sample.messages)
    # two renders of the whole conversation are enough, however many turns it has
    marked, turns, last = _texts(processor, sample, text)
    tokenizer, picture = tokenizer_of(processor), _picture_word(processor)
    special = _special_tokens(tokenizer, len(tokenizer))
    prompt, end = _around_answers(processor, marked, last, special)
    answers, since = list[_Answer](), dict[int, int]()
    made, done = "", 0  # the text up to a character, with end tokens
    final = max((n for n, m in enumerate(marked) if m["role"] == "assistant"), default=0)
    for number, (message, texts) in enumerate(zip(marked, turns, strict=True)):
        added = len(made) - done
        for each in texts:
            since.setdefault(each.images, each.start + added)
        if message["role"] != "assistant" or not texts:
            continue
        start, stop, shown = texts[0].start, texts[-1].stop, texts[0].images
        header, after = texts[0].before, texts[-1].behind
        if (prompted := header.rfind(prompt)) >= 0:
            start -= len(header) - prompted - len(prompt)
        since[shown] = min(since[shown], start - len(prompt) * (prompted >= 0) + added)
        if not (sample.is_cut and number == final):
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


def _around_answers(
    processor: Any, marked: list[Message], last: str, special: list[str]
) -> tuple[str, str]:
    """Find what the template writes before the first answer begins, and behind the last one.

    ``last`` is what stands behind the last text: a question may end in another way.
    """
    turns = [number for number, message in enumerate(marked) if message["role"] == "assistant"]
    prompt = ""
    if first := min(turns, default=0):
        asked, waiting = (
            re.split(_MARKS, render(processor, marked[:first], generate))[-1]
            for generate in (False, True)
        )
        same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, waiting, strict=False))
        prompt = waiting[len(list(same)) :] or waiting
    if turns and turns[-1] + 1 < len(marked):
        last = re.split(_MARKS, render(processor, marked[: turns[-1] + 1]))[-1]
    # its first special token, and those that follow it
    found = [(last.find(word), -len(word)) for word in special if word in last]
    at, negative_length = min(found, default=(0, 0))
    at -= negative_length
    while at and (word := next((word for word in special if last.startswith(word, at)), "")):
        at += len(word)
    return prompt, last[:at]
