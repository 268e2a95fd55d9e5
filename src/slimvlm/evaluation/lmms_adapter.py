"""A model as lmms-eval's runner wants it: its requests, answered through our own chat code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import answer, batches_by_length, likelihoods

LONGEST_REPLY = 1024
"""No reply is longer, in tokens. MathVista allows 16384, which only a model that rambles needs."""


def adapter(
    model: PreTrainedModel, processor: Any, batch_size: int, replies: dict[int, str]
) -> Any:
    """The model as lmms-eval's runner wants it, for one run of one task.

    Args:
        model: The model.
        processor: Its processor or tokenizer.
        batch_size: Questions answered at once.
        replies: Takes what the model says, by index of the question.
    """
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

    class Adapter(lmms):  # type: ignore[misc]
        accelerator = None  # else the runner makes one, and with it global state

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Greedy replies. All requests are of one task, so they share its options."""
            options = requests[0].args[1]
            longest = min(int(options.get("max_new_tokens", LONGEST_REPLY)), LONGEST_REPLY)
            stops = options.get("until") or ()
            said = [""] * len(requests)
            for batch in _batches(requests, batch_size):
                asked = [_question(requests[i].args, self.task_dict) for i in batch]
                texts = answer(model, processor, asked, longest)
                for index, text in zip(batch, texts, strict=True):
                    said[index] = _until(text, stops)
            replies.update((r.args[3], text) for r, text in zip(requests, said, strict=True))
            return said

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            found = [(0.0, False)] * len(requests)
            for batch in _batches(requests, batch_size):
                asked = [requests[i].args for i in batch]
                pairs = [(_question(a, self.task_dict), _said(a, self.task_dict)) for a in asked]
                for index, value in zip(batch, likelihoods(model, processor, pairs), strict=True):
                    found[index] = value
            replies.update(_likeliest(requests, [value for value, _ in found]))
            # The runner (0.7.3) makes text of a bare pair, but not of one in a wrapper.
            signs = [-1 if isinstance(r.args[1], str) else 1 for r in requests]
            signed = zip(signs, found, strict=True)
            return [GenerationResult((sign * value, greedy)) for sign, (value, greedy) in signed]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise ConfigError("tasks with several rounds are not supported")

    return Adapter()


def _batches(requests: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    prompts, task = [request.args[0] for request in requests], requests[0].args[4]
    return batches_by_length(prompts, batch_size, str(task))


def _likeliest(requests: Sequence[Any], values: Sequence[float]) -> dict[int, str]:
    """The continuation with the highest log-probability, by index of the question."""
    best: dict[int, tuple[float, str]] = {}
    for request, value in zip(requests, values, strict=True):
        index, text = request.args[3], str(request.args[1]).strip()
        if index not in best or value > best[index][0]:
            best[index] = (value, text)
    return {index: text for index, (_, text) in best.items()}


def _question(arguments: tuple[Any, ...], documents: Mapping[str, Any]) -> Question:
    """A request of lmms-eval as a question of ours."""
    prompt, _, pictures_of, index, task, split = arguments
    shown = pictures_of(documents[task][split][index]) or ()
    if not all(isinstance(picture, Image.Image) for picture in shown):
        raise ConfigError(f"task {task!r} shows something else than pictures")
    return Question(id=str(index), prompt=prompt, answers=(), images=tuple(shown))


def _said(arguments: tuple[Any, ...], documents: Mapping[str, Any]) -> str:
    """The text whose likelihood is asked for. The chat template sets its own space before it."""
    _, text, _, index, task, split = arguments
    return str(text(documents[task][split][index]) if callable(text) else text).strip()


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop sequence."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
