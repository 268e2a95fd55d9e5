"""Compress a model that was fine-tuned on easy-vqa, and ask it every test question.

Command:  pip install 'slimvlm[demo]' easy-vqa==1.0 && python examples/easy_vqa/run.py
Expect:   about six hours of one CPU core, with --short minutes. A stopped run goes on.

easy-vqa (MIT licence, by Victor Zhou) has 4,000 training and 1,000 test pictures of one coloured
shape. The demo model is fine-tuned on a share of the training split, as a user fine-tunes a model
on data of theirs. Then `slimvlm compress` makes it smaller with the same split. Three other ways to
the same size stand beside it: ShortGPT's choice of layers and LLM-Pruner's choice of widths, both
as they are, and random widths that are trained like slimvlm's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import easy_vqa
import matplotlib.pyplot as plt
import yaml

RATIOS = (0.15, 0.30, 0.45, 0.60)
TURNS = 3  # questions in a conversation about one picture
T_OF_THREE = 4.303
"""Quantile of Student's t for the 95 % interval of a mean of three."""
BATCH_GRADIENT = "batch_gradient.yaml"
"""Scores of LLM-Pruner are gradients of a whole batch, which a file says."""
UNTRAINED = ["--train", "none", "--repair", "none", "--vocab-size", "all", "--test-samples", "0"]
ARMS = {
    "slimvlm": [],  # its defaults
    "random widths, same training": [
        *("--axis", "width", "--criterion", "random", "--allocation", "uniform"),
        *("--repair", "none", "--vocab-size", "all", "--test-samples", "0"),
    ],
    "LLM-Pruner": [
        *("--axis", "width", "--criterion", "taylor", "--config", BATCH_GRADIENT),
        *("--allocation", "protect", *UNTRAINED),
    ],
    "ShortGPT": ["--axis", "depth", "--criterion", "block_influence", *UNTRAINED],
}
IMPOSSIBLE = [("LLM-Pruner", 0.6)]  # its protected layers leave 57.6 % that can go
KINDS = ("yes or no", "negated yes or no", "colour", "shape")


def kind_of(question: str, answer: str) -> str:
    """Sort a question by what it asks for."""
    if answer in ("yes", "no"):
        is_negated = " not " in question or " no " in question
        return "negated yes or no" if is_negated else "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def write_data(out: Path, limit: int | None) -> tuple[Path, list[str]]:
    """Write conversations of the training split, and a task for each kind of test question."""
    for split in ("train", "test"):
        pictures = Path(easy_vqa.__file__).parent / "data" / split / "images"
        shutil.copytree(pictures, out / split, dirs_exist_ok=True)
    turns: dict[int, list[dict[str, str]]] = {}
    for question, answer, number in zip(*easy_vqa.get_train_questions(), strict=True):
        said = [("user", question), ("assistant", answer)]
        turns.setdefault(number, []).extend({"role": r, "content": c} for r, c in said)
    rows = [
        {"images": [f"train/{number}.png"], "messages": said[i : i + 2 * TURNS]}
        for number, said in turns.items()
        for i in range(0, len(said), 2 * TURNS)
    ]
    data = out / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for question, answer, number in zip(*easy_vqa.get_test_questions(), strict=True):
        row = {"question": question, "answer": answer, "image": f"test/{number}.png"}
        asked[kind_of(question, answer)].append(row)
    tasks = []
    for kind, rows in asked.items():
        stem = kind.replace(" ", "_")
        (out / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:limit]))
        task = {"name": kind, "data": f"{stem}.jsonl", "prompt": "{question}", "answer": "answer"}
        (out / f"{stem}.yaml").write_text(yaml.safe_dump({**task, "max_new_tokens": 4}))
        tasks.append(str(out / f"{stem}.yaml"))
    return data, tasks


def slimvlm(*words: object) -> None:
    """Run a command of slimvlm, and show it."""
    command = ["slimvlm", *map(str, words)]
    print("$", *command, flush=True)
    if failed := subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        sys.exit(failed)


def ask_once(run: Path, result: Path, ask: list[object]) -> None:
    """Ask a run's model, or take the answers of another seed's model that has the same weights."""
    with (run / "checkpoint" / "model.safetensors").open("rb") as weights:
        same = result.parent / f"{hashlib.file_digest(weights, 'sha256').hexdigest()[:16]}.json"
    if not same.exists():
        slimvlm("evaluate", run, *ask, "--out", same)
    shutil.copy(same, result)


def correct(result: Path) -> dict[str, list[float]]:
    """Read the score of every question, by kind."""
    return {name: task["scores"] for name, task in json.loads(result.read_text())["tasks"].items()}


def percent(scores: dict[str, list[float]], kinds: tuple[str, ...] = KINDS) -> float:
    """Give the share of right answers to all questions of these kinds."""
    return 100 * statistics.fmean(score for kind in kinds for score in scores[kind])


def table(out: Path, seeds: int) -> str:
    """Make the table of all results that are there, and the plot beside it."""
    tuned = correct(out / "results" / "tuned.json")
    cells = [f"{percent(tuned, kinds):.1f}" for kinds in (KINDS, *((kind,) for kind in KINDS))]
    lines = [f"| ratio | model | all questions | {' | '.join(KINDS)} |", "|---" * 7 + "|"]
    lines.append(f"| 0 | fine-tuned, whole | {' | '.join(cells)} |")
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for arm in ARMS:
        points = []
        for ratio in RATIOS:
            paths = [out / "results" / f"{arm}-{ratio}-{seed}.json" for seed in range(seeds)]
            found = [correct(path) for path in paths if path.exists()]
            if not found:
                continue
            totals = [percent(each) for each in found]
            spread = T_OF_THREE * statistics.stdev(totals) / 3**0.5 if len(totals) == 3 else None
            points.append((100 * ratio, statistics.fmean(totals), spread or 0))
            shown = f"{points[-1][1]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
            shown += "" if len(totals) == 3 else f" ({len(totals)} seeds)"
            kinds = [f"{statistics.fmean(percent(s, (k,)) for s in found):.1f}" for k in KINDS]
            lines.append(f"| {ratio:.0%} | {arm} | {shown} | {' | '.join(kinds)} |")
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=arm)
    axes.axhline(percent(tuned), color="grey", linestyle=":", label="fine-tuned, whole")
    axes.set_xlabel("removed share of the backbone, %")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    axes.set_xticks([100 * ratio for ratio in RATIOS])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    figure.savefig(out / "easy_vqa.png", dpi=150, bbox_inches="tight")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the options, then make, ask and compare the models that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="default: runs/easy_vqa, short: runs/easy_vqa_short"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=96, help="calibration samples")
    parser.add_argument("--training-samples", type=int, default=96)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine computes it")
    parser.add_argument("--short", action="store_true", help="one small cell of each kind")
    options = parser.parse_args()
    short, ratios = options.short, RATIOS[1:2] if options.short else RATIOS
    out = options.out or Path("runs/easy_vqa_short" if short else "runs/easy_vqa")
    (out / "results").mkdir(parents=True, exist_ok=True)
    data, tasks = write_data(out, limit=8 if short else None)
    sizes = [8, 8] if short else [options.samples, options.training_samples]
    dtype = ["--dtype", options.dtype]
    quick = {"slimvlm": ["--axis", "width", "--vocab-size", "all"], "ShortGPT": ARMS["ShortGPT"]}
    arms = quick if short else ARMS
    ask = ["--tasks", ",".join(tasks), "--batch-size", 64, *dtype]
    tuned, result = out / "tuned", out / "results" / "tuned.json"
    if not tuned.exists():
        train = ["--train", "full", "--loss", "sft", "--learning-rate", 1e-4]
        share = 0.001 if short else 0.1
        slimvlm(
            "recover", "demo", "--data", data, *train, "--fraction", share, "--out", tuned, *dtype
        )
    (out / BATCH_GRADIENT).write_text(yaml.safe_dump({"model": str(tuned), "gradient": "batch"}))
    if not result.exists():
        slimvlm("evaluate", tuned, *ask, "--out", result)
    for seed in range(1 if short else options.seeds):
        for ratio in ratios:
            for arm, words in arms.items():
                run = out / f"{arm}-{ratio}-{seed}".replace(" ", "_").replace(",", "")
                result = out / "results" / f"{arm}-{ratio}-{seed}.json"
                if result.exists() or (arm, ratio) in IMPOSSIBLE:
                    continue
                words = [out / word if word == BATCH_GRADIENT else word for word in words]
                learnt = [] if {*UNTRAINED} <= {*words} else ["--training-samples", sizes[1]]
                how = ["--samples", sizes[0], *learnt, *words, "--seed", seed]
                how += ["--local-steps", 0] if short else []
                where = ["--data", data, "--out", run]
                if not (run / "summary.md").exists():
                    slimvlm("compress", tuned, "--ratio", ratio, *where, *how, *dtype)
                ask_once(run, result, ask)
                shutil.rmtree(run / "checkpoint")
        (out / "table.md").write_text(found := table(out, options.seeds))
        print(found)


if __name__ == "__main__":
    main()
