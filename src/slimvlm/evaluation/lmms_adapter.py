"""A model as lmms-eval's runner wants it: its requests, answered through our own chat code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import progress
from slimvlm.data import chat
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import answer, on_device
from slimvlm.models import losses

LONGEST_REPLY = 1024
"""No reply is longer, in tokens. MathVista allows 16384, which only a model that rambles needs."""


def adapter(
    model: PreTrainedModel, processor: Any, batch_size: int, replies: dict[int, str]
) -> Any:
    """The model as lmms-eval's runner wants it, for one run of one task."""
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

    class Adapter(lmms):  # type: ignore[misc]
        accelerator = None  # else the runner makes one, and with it global state

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            said = _generate(model, processor, requests, self.task_dict, batch_size)
            replies.update((r.args[3], text) for r, text in zip(requests, said, strict=True))
            return said

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            found = _likelihoods(model, processor, requests, self.task_dict, batch_size)
            replies.update(_likeliest(requests, [value for value, _ in found]))
            # The runner (0.7.3) makes text of a bare pair, but not of one in a wrapper.
            signs = [-1 if isinstance(r.args[1], str) else 1 for r in requests]
            pairs = zip(signs, found, strict=True)
            return [GenerationResult((sign * value, greedy)) for sign, (value, greedy) in pairs]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise ConfigError("tasks with several rounds are not supported")

    return Adapter()


def _generate(
    model: PreTrainedModel,
    processor: Any,
    requests: Sequence[Any],
    documents: Mapping[str, Any],
    batch_size: int,
) -> list[str]:
    """Greedy replies. All requests are of one task, so they share its options."""
    options = requests[0].args[1]
    longest = min(int(options.get("max_new_tokens", LONGEST_REPLY)), LONGEST_REPLY)
    replies = [""] * len(requests)
    for batch in batches_by_length(requests, batch_size):
        questions = [_question(requests[i].args, documents) for i in batch]
        texts = answer(model, processor, questions, longest)
        for index, text in zip(batch, texts, strict=True):
            replies[index] = _until(text, options.get("until") or ())
    return replies


@torch.no_grad()
def _likelihoods(
    model: PreTrainedModel,
    processor: Any,
    requests: Sequence[Any],
    documents: Mapping[str, Any],
    batch_size: int,
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation as a whole answer turn; whether greed would say it."""
    found = [(0.0, False)] * len(requests)
    for batch in batches_by_length(requests, batch_size):
        asked = [requests[i].args for i in batch]
        samples = [
            chat.answered_sample(_question(a, documents), _continuation(a, documents))
            for a in asked
        ]
        inputs = on_device(model, chat.encode_samples(processor, samples))
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        sums = -losses.token_cross_entropy(logits, labels).sum(1)
        wanted = labels[:, 1:]
        greedy = ((logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORE)).all(1)
        for index, value, said in zip(batch, sums.tolist(), greedy.tolist(), strict=True):
            found[index] = (value, said)
    return found


def _likeliest(requests: Sequence[Any], values: Sequence[float]) -> dict[int, str]:
    """The continuation with the highest log-probability, by index of the question."""
    best: dict[int, tuple[float, str]] = {}
    for request, value in zip(requests, values, strict=True):
        index, text = request.args[3], str(request.args[1]).strip()
        if index not in best or value > best[index][0]:
            best[index] = (value, text)
    return {index: text for index, (_, text) in best.items()}


def batches_by_length(requests: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices whose prompts have similar lengths, longest first; a progress bar."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from progress(batches, str(requests[0].args[4]))


def _question(arguments: tuple[Any, ...], documents: Mapping[str, Any]) -> Question:
    """A request of lmms-eval as a question of ours."""
    prompt, _, pictures_of, index, task, split = arguments
    shown = pictures_of(documents[task][split][index]) or ()
    if not all(isinstance(picture, Image.Image) for picture in shown):
        raise ConfigError(f"task {task!r} shows something else than pictures")
    return Question(id=str(index), prompt=prompt, answers=(), images=tuple(shown))


def _continuation(arguments: tuple[Any, ...], documents: Mapping[str, Any]) -> str:
    """The text whose likelihood is asked for. The chat template sets its own space before it."""
    _, text, _, index, task, split = arguments
    return str(text(documents[task][split][index]) if callable(text) else text).strip()


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop sequence."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
