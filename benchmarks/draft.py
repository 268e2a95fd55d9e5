"""A pruned model as the draft of its original: what is accepted, and whether it pays.

Command:  PYTHONPATH=. .venv/bin/python benchmarks/draft.py --out runs/draft [--vllm] [--short]
Expect:   four runs of `compress` on the demo model, then its questions; on two quiet cores 1 h
          42 min with --vllm --repeats 3 --questions 4.
          Runs of `compress` that are there are taken. ``--vllm`` asks vLLM, too, whose program is
          on PATH; texts only. ``--short``: one training step, one draft of each axis, few tokens,
          and a tiny shape in place of 0.5b.

The original answers greedily, alone and with the draft (``assistant_model``), in turn, one question
at a time. A draft proposes so many tokens in each round, and the original checks them in one pass.
In vLLM, replies have the same length, whatever ends them.
"speed" is time alone over time with the draft, the median of the rounds [smallest, largest]; a
round yields "tokens" and costs "steps" of the original. It pays where tokens exceed steps. The demo
model's drafts keep the vocabulary. Weights of the shape ``0.5b`` (Qwen2.5-0.5B's) are random, so
that nothing can be said of what is accepted there: only steps count. Rows are JSON lines, then a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

import slimvlm as sv
from shapes import QWEN, SHAPES
from slimvlm.core.options import Axis
from slimvlm.data.chat import encode_questions
from slimvlm.data.samples import Question
from slimvlm.demo.questions import load_passages
from slimvlm.evaluation.bench import Run, in_turn
from slimvlm.export.text_only import export_text
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import as_inputs
from slimvlm.pruning.cut import prune_
from slimvlm.runs.tables import as_markdown

AXES: tuple[Axis, ...] = ("depth", "width")
HEADER = ["model", "questions", "draft", "removed", "proposed", "accepted", "tokens of a round",
          "steps of a round", "speed", "same replies"]  # fmt: skip
Batches = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A draft at one number of proposed tokens."""

    model: str
    questions: str
    draft: str
    removed: float  # of the backbone
    proposed: int  # in a round, at most
    accepted: float  # of those that were proposed
    tokens: float  # that a round yields
    speed: float  # time alone over time with the draft, median of the rounds
    lowest: float
    highest: float
    same: float  # replies that are those of the original alone; NaN if they were not read

    def cells(self, is_trained: bool) -> list[str]:
        """A line of the table; random weights say nothing of what is accepted."""
        steps = self.tokens / self.speed
        said = f"{self.accepted:.0%}", f"{self.tokens:.2f}"
        speed = f"{self.speed:.2f} [{self.lowest:.2f}, {self.highest:.2f}]"
        row = [self.model, self.questions, self.draft, f"{self.removed:.1%}", str(self.proposed)]
        row += [*(said if is_trained else ("", "")), f"{steps:.2f}"]
        same = "" if math.isnan(self.same) else f"{self.same:.0%}"
        return [*row, *((speed, same) if is_trained else ("", ""))]


def row_of(
    names: tuple[str, str, str],
    removed: float,
    proposed: int,
    counts: tuple[int, int, int],
    times: Sequence[Sequence[Run]],
    same: float,
) -> Row:
    """A row from times alone and with the draft; counts are new tokens, rounds and proposals."""
    tokens, rounds, proposals = counts
    speeds = [alone[0] / helped[0] for alone, helped in zip(*times, strict=True)]
    middle = (median(speeds), min(speeds), max(speeds))
    accepted = (tokens - rounds) / proposals
    row = Row(*names, removed, proposed, accepted, tokens / rounds, *middle, same)
    print(json.dumps(asdict(row)), flush=True)
    return row


def removed_from(model: Any, draft: Any) -> float:
    """The share of the backbone that a draft lacks."""
    return 1 - read_anatomy(draft).backbone_params / read_anatomy(model).backbone_params


class Rounds:
    """Passes of a model, and the tokens that were proposed to it."""

    def __init__(self, model: Any) -> None:
        self.passes, self.proposed, self._known = 0, 0, 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def begin(self, prompt_tokens: int) -> None:
        """Say how many tokens of a new question the model has to read."""
        self._known = prompt_tokens

    def _count(self, model: Any, args: Any, given: dict[str, Any]) -> None:
        self.passes += 1
        self.proposed += given["input_ids"].shape[1] - self._known
        self._known = 1

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@contextmanager
def shown(draft: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Give a draft the pictures of a question, which transformers 5.24 keeps from it."""
    pictures = {
        name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")
    }

    def show(module: Any, args: Any, given: dict[str, Any]) -> Any:
        has_picture = pictures and (given["input_ids"] == draft.config.image_token_id).any()
        return args, {**given, **(pictures if has_picture else {})}

    hook = draft.register_forward_pre_hook(show, with_kwargs=True)
    yield
    hook.remove()


def replies(model: Any, batches: Batches, new_tokens: int, **how: Any) -> list[list[int]]:
    """Answer one question after another, greedily."""
    found, rounds = [], how.pop("rounds", None)
    for inputs in batches:
        length = inputs["input_ids"].shape[1]
        if rounds is not None:
            rounds.begin(length)
        draft = how.get("assistant_model")
        with torch.inference_mode(), nullcontext() if draft is None else shown(draft, inputs):
            ids = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **how
            )
        found.append(ids[0, length:].tolist())
    return found


def timed(model: Any, batches: Batches, new_tokens: int, **how: Any) -> Run:
    """Milliseconds of all answers."""
    start = perf_counter()
    replies(model, batches, new_tokens, **how)
    return (1e3 * (perf_counter() - start),)


def compared(
    names: tuple[str, str, str],
    model: Any,
    draft: Any,
    batches: Batches,
    proposed: int,
    options: argparse.Namespace,
) -> Row:
    """Answer alone and with a draft, in turn."""
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.assistant_confidence_threshold = proposed, 0.0
    settings.num_assistant_tokens_schedule = "constant"
    alone = replies(model, batches, options.new_tokens)
    with Rounds(model) as rounds:
        helped = replies(model, batches, options.new_tokens, assistant_model=draft, rounds=rounds)
    ways = ({}, {"assistant_model": draft})
    runs = [partial(timed, model, batches, options.new_tokens, **way) for way in ways]
    times = in_turn(runs, options.repeats)
    counts = (sum(map(len, helped)), rounds.passes, rounds.proposed)
    same = sum(a == b for a, b in zip(alone, helped, strict=True)) / len(alone)
    return row_of(names, removed_from(model, draft), proposed, counts, times, same)


def demo_questions(count: int) -> dict[str, list[Question]]:
    """Questions with long answers, about pictures and about Python."""
    (listed,) = sv.find_tasks("list_objects")
    prompts = [prompt for prompt, _ in load_passages()]
    asked = [Question(p, p, ()) for p in prompts[:: max(1, len(prompts) // count)][:count]]
    return {"pictures": list(listed.load(count)), "text": asked}


def drafts(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Drafts that `compress` makes of the demo model, with the same vocabulary, by axis."""
    for axis in options.axes:
        for ratio in options.ratios:
            out = options.out / f"{axis}-{ratio:g}"
            if not (out / "summary.md").exists():
                few: dict[str, Any] = {"recover": {"max_steps": 1}} if options.short else {}
                sv.compress(
                    "demo",
                    out=out,
                    ratio=ratio,
                    axis=axis,
                    vocab_size="all",
                    data="demo",
                    samples=options.samples,
                    training_samples=options.samples,
                    test_samples=0,
                    **few,
                )
            yield axis, out / "checkpoint"


def demo_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Drafts of the demo model in transformers."""
    model, processor = sv.load("demo", options.dtype)
    for axis, checkpoint in drafts(options):
        draft, _ = sv.load(checkpoint, options.dtype)
        for kind, questions in demo_questions(options.questions).items():
            batches = [as_inputs(model, encode_questions(processor, [q])) for q in questions]
            for proposed in options.proposed:
                names = ("demo", kind, axis)
                yield compared(names, model, draft, batches, proposed, options).cells(True)


def vllm_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Drafts of the demo model's language model in vLLM, which fails with pictures and a draft."""
    from tests.export.engines import ENGINES, Served, interpreter_of

    whole = options.out / "text"
    export_text("demo", whole, force=True)
    model, tokenizer = sv.load(whole, options.dtype)
    prompts = [
        encode_questions(tokenizer, [question])["input_ids"][0].tolist()
        for question in demo_questions(options.questions)["text"]
    ]
    for axis, checkpoint in drafts(options):
        small = checkpoint.with_name("text")
        export_text(checkpoint, small, force=True)
        removed = removed_from(model, sv.load(small, options.dtype)[0])
        for proposed in options.proposed:
            with ExitStack() as stack:
                ways = []
                for draft in (None, str(small.resolve())):
                    work = Path(stack.enter_context(TemporaryDirectory()))
                    request = {
                        "checkpoint": str(whole.resolve()),
                        "draft": draft,
                        "proposed": proposed,
                        "dtype": options.dtype,
                        "sees": False,
                        "max_length": 256,
                        "at_once": 1,
                    }
                    (work / "request.json").write_text(json.dumps(request))
                    served = Served(ENGINES["vllm"], interpreter_of("vllm"), work, "wall")
                    ways.append(stack.enter_context(served))
                    version = served.read()["version"]
                for served in ways:  # to warm up
                    served.steps(prompts[:1], 2)
                rounds = sum(len(ways[1].steps([p], options.new_tokens)[0]) for p in prompts)

                def answer(served: Any) -> Run:
                    came = [served.steps([prompt], options.new_tokens) for prompt in prompts]
                    return (1e3 * sum(steps[-1] for (steps,) in came),)

                times = in_turn([partial(answer, served) for served in ways], options.repeats)
            counts = (options.new_tokens * len(prompts), rounds, proposed * (rounds - len(prompts)))
            names = (f"demo, vLLM {version}", "text", axis)
            yield row_of(names, removed, proposed, counts, times, math.nan).cells(True)


def random_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Drafts of a model with random weights: what a round costs, for one question."""
    options = argparse.Namespace(**{**vars(options), "new_tokens": 12})
    shape, kind = (SHAPES["tiny"], LlamaForCausalLM) if options.short else (QWEN, Qwen2ForCausalLM)
    name = "tiny" if options.short else "0.5b"

    def built() -> Any:
        torch.manual_seed(0)
        made = kind._from_config(shape, dtype=getattr(torch, options.dtype)).eval()
        made.generation_config.eos_token_id = None
        return made

    model = built()
    ids = torch.randint(shape.vocab_size, (1, 16))
    batches = [{"input_ids": each[None], "attention_mask": torch.ones(1, 16)} for each in ids]
    for axis in options.axes:
        for ratio in options.ratios:
            draft = built()
            scores = sv.score(draft, (), "spacing" if axis == "depth" else "random")
            prune_(draft, sv.make_plan(read_anatomy(draft), scores, ratio, axis))
            for proposed in options.proposed:
                names = (name, "random", axis)
                yield compared(names, model, draft, batches, proposed, options).cells(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/draft"))
    parser.add_argument("--axes", choices=AXES, nargs="+", default=AXES)
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.3, 0.6))
    parser.add_argument("--proposed", type=int, nargs="+", default=(2, 4, 8), help="tokens")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate, and to train on")
    parser.add_argument("--questions", type=int, default=8, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--vllm", action="store_true", help="ask vLLM, too")
    options = parser.parse_args()
    if options.short:
        options.samples, options.questions, options.new_tokens, options.repeats = 8, 2, 12, 1
        options.ratios, options.proposed = (0.3,), (4,)
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": options.dtype}
    print(json.dumps(about))
    rows = [*demo_rows(options), *random_rows(options)]
    rows += vllm_rows(options) if options.vllm else []
    print(as_markdown(HEADER, rows))


if __name__ == "__main__":
    main()
