"""What fewer tokens cost beside fewer channels, at the same number of parameters.

Command:  .venv/bin/python benchmarks/tokens.py --out runs/tokens
          .venv/bin/python benchmarks/tokens.py --model demo --questions 20 --out runs/tokens-demo
Expect:   a quarter of an hour on one core for each. A stopped run goes on.

``text`` is the untouched SmolLM2-135M on passages of Python's docstrings, ``demo`` the demo model
on its conversations. Tokens are chosen, and widths walked (no local steps), on one part of them;
loss is measured on another. To choose tokens for ``text``, the docstrings of the whole standard
library count, too, but for those with a passage that is measured. Loss is in nats per character, of
all the text or of the answers, since a text has other tokens with fewer to choose from. "lost" is
how much it rose, and AVG how the demo's questions were answered. Nothing is trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import slimvlm as sv
from slimvlm.core.files import write_text
from slimvlm.data.chat import process
from slimvlm.data.roles import IGNORE
from slimvlm.data.vocabulary import Vocabulary, choose_vocabulary
from slimvlm.evaluation.on_data import Given, evaluate_data
from slimvlm.models.devices import computes_bfloat16
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import token_ids_of, trimmed_processor
from slimvlm.runs.tables import as_markdown

SHOWN, UNSEEN, LONGEST = 48, 48, 700
"""Samples that widths are walked on, and that losses are measured on; characters of a passage."""
DTYPE = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
SIZES = (16384, 8192, 4096)
RATIOS = (0.15, 0.3)
LEFT_OUT, BEGINNING = {"site-packages", "test", "tests", "lib2to3", "idlelib"}, 150
"""Folders of the standard library that are not counted; characters that tell a passage."""
SMALL = 12288
"""Tokens that stay where those alone do not reach a ratio."""


@dataclass(frozen=True)
class Subject:
    """A model with data: what is counted and fitted, and what is measured."""

    model: Any
    processor: Any
    known: Sequence[Any]
    unseen: Sequence[Given]
    counted: Sequence[str] = ()

    def vocabulary(self, size: int | None) -> Vocabulary:
        """The tokens for what is known."""
        named = token_ids_of(self.model.config, self.model.generation_config)
        samples = [each for each in self.known if not isinstance(each, str)]
        texts = [*(each for each in self.known if isinstance(each, str)), *self.counted]
        return choose_vocabulary(self.processor, samples, size, texts, named)

    def batches(self) -> list[dict[str, Any]]:
        """What widths are walked on."""
        shown = self.known[:SHOWN]
        if not isinstance(shown[0], str):
            return list(sv.calibration_batches(self.processor, shown))
        alike = [sorted(shown, key=len)[i : i + 4] for i in range(0, len(shown), 4)]
        found = []
        for texts in alike:
            inputs = process(self.processor, texts, [[] for _ in texts], "right")
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
            found.append({**inputs, "labels": labels})
        return found


def text_subject() -> Subject:
    from slimvlm.demo.build import make_base
    from slimvlm.demo.questions import docstrings, load_passages

    model, tokenizer = make_base()
    passages = [text[:LONGEST] for _, text in load_passages() if len(text) > 200]
    random.Random(0).shuffle(passages)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not LEFT_OUT & {*p.relative_to(root).parts}]
    texts = [text for path in files for _, text in docstrings(path)]
    begun = [text[:BEGINNING] for text in passages[:UNSEEN]]
    counted = [text for text in texts if not any(begin in text for begin in begun)]
    known, unseen = passages[UNSEEN:], passages[:UNSEEN]
    return Subject(model.to(DTYPE).eval(), tokenizer, known, unseen, counted)


def demo_subject() -> Subject:
    model, processor = sv.load("demo", str(DTYPE).removeprefix("torch."), "cpu")
    samples = sv.load_samples("demo", limit=512 + UNSEEN)
    return Subject(model, processor, samples[UNSEEN:], samples[:UNSEEN])


def characters(given: Given) -> int:
    if isinstance(given, str):
        return len(given)
    answers = [m["content"] for m in given.messages if m["role"] == "assistant"]
    return sum(len(part["text"]) for parts in answers for part in parts)


def plans(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried, by a name: tokens to keep, and a ratio for widths and tokens together."""
    whole = sv.anatomy(subject.model)
    yield "original", {}
    for size in (*SIZES, None):
        name = "as many as the data needs" if size is None else f"{size:,}"
        yield f"tokens: {name}", {"size": size, "ratio": 0.0}
    for ratio in RATIOS:
        yield f"width: {ratio:.0%}", {"ratio": ratio}
        rows = round(ratio * whole.backbone_params / whole.token_params)
        size = max(SMALL, whole.vocab_size - rows)
        yield f"tokens, then width: {ratio:.0%}", {"size": size, "ratio": ratio}


def measured(subject: Subject, asked: dict[str, Any], questions: int) -> dict[str, Any]:
    """Prune a copy as asked and measure it."""
    model, processor, notes = copy.deepcopy(subject.model), subject.processor, ""
    whole = sv.anatomy(model)
    if asked:
        tokens, plan = None, Plan.everything(whole)
        if "size" in asked:
            found = subject.vocabulary(asked["size"])
            tokens, notes = found.tokens, f"{len(found.tokens):,} tokens"
            plan = replace(plan, tokens=tokens)
        if plan.ratio < asked["ratio"]:
            walked = sv.walk_(model, subject.batches(), asked["ratio"], tokens=tokens)
            plan = walked.plan
        else:
            sv.prune_(model, plan)
        processor = trimmed_processor(processor, plan)
    result = evaluate_data(model, processor, subject.unseen, batch_size=4)
    nats = sum(sample.loss * sample.tokens for sample in result.samples)
    row = {
        "backbone": sv.anatomy(model).backbone_params,
        "removed": 1 - sv.anatomy(model).backbone_params / whole.backbone_params,
        "nats": nats / sum(map(characters, subject.unseen)),
        "notes": notes,
    }
    if questions:
        row["avg"] = sv.evaluate(model, processor, "demo", limit=questions).average
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("text", "demo"), default="text")
    parser.add_argument("--questions", type=int, default=0, help="of each task, for the demo")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    subject = text_subject() if options.model == "text" else demo_subject()
    rows: list[list[str]] = []
    original = None
    for name, asked in plans(subject):
        path = options.out / f"{name.replace(':', '').replace(' ', '-')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(measured(subject, asked, options.questions)) + "\n")
        row = json.loads(path.read_text())
        original = original or row
        told = name if row["notes"] in ("", name) else f"{name} ({row['notes']})"
        cells = [told, f"{row['backbone'] / 1e6:.1f} M", f"{row['removed']:.1%}"]
        cells += [f"{row['nats']:.4f}", f"{row['nats'] / original['nats'] - 1:+.1%}"]
        rows.append([*cells, *([f"{row['avg']:.1f}"] if "avg" in row else [])])
        print(" | ".join(rows[-1]), flush=True)
    header = ["kept", "backbone", "removed", "nats per character", "lost"]
    table = as_markdown([*header, *(["AVG"] if "avg" in original else [])], rows)
    write_text(options.out / "table.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
