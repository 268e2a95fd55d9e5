"""Peak memory and speed of recovery: plain SFT, and SFT + hidden L2 with each kind of teacher.

Command:  .venv/bin/python benchmarks/distill_memory.py [--shape demo 1b] [--steps 4] [--ratio 0.2]
          .venv/bin/python benchmarks/distill_memory.py --pretend [--shape demo]
Expect:   about 6 minutes on one core of a recent CPU, 6 GB of disk in the temporary folder.
Goal:     the shared teacher needs at most 1.15 times the memory of SFT, at 0.6 times its speed or
          more; on a card at most 1.1 times.

LoRA on a model without a fifth of its units, one sample a step, every job in a process of its own.
Weights are read from files, which are mapped into memory, so two peaks are shown: "training" is
that of the resident set from the first step on, "process" also counts the time of loading and
comparing. "nothing" loads the pruned model and stops. On an accelerator the same two peaks of what
tensors held there stand beside them. Results are JSON lines, then ratios to SFT.

With ``--pretend`` the jobs run on the card that tests pretend: what it holds is counted exactly, is
memory of the process, too, and takes times that mean nothing and are not shown.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from own_process import card_peak, measured
from shapes import SHAPES
from slimvlm.core.options import RecoverConfig
from slimvlm.data.read import load_samples
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE
from slimvlm.training.recover import recover
from slimvlm.training.trainer import DistillationTrainer

VOCABULARY = SHAPES["1b"].vocab_size
MEASURED = ("demo", "1b")
JOBS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sft": {"loss": "sft"},
    "shared teacher": {"loss": "sft+hidden"},
    "separate teacher": {"loss": "sft+hidden"},
}


def random_words() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def samples(shape: str, count: int, tokens: int) -> list[Sample]:
    """Conversations of a fixed length whose second half is the answer."""
    if shape == "demo":
        return load_samples("demo", limit=count)
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(2, VOCABULARY, (2, tokens // 2), generator=generator).tolist()
        turns = [
            {"role": role, "content": [{"type": "text", "text": " ".join(map(str, half))}]}
            for role, half in zip(("user", "assistant"), ids, strict=True)
        ]
        made.append(Sample(str(index), tuple(turns)))
    return made


def prepare(shape: str, folder: Path, ratio: float) -> None:
    """Write teacher, student and plan."""
    if shape == "demo":
        teacher, words = load("demo")
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        teacher, words = LlamaForCausalLM(SHAPES["1b"]).eval(), random_words()
        torch.set_default_dtype(torch.float32)
    teacher.save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    before = read_anatomy(teacher)
    plan = Plan(
        before=before,
        layers=tuple(range(before.num_layers)),
        kv_groups=tuple(_spread(s.num_kv_heads, ratio) for s in before.layers),
        neurons=tuple(_spread(s.intermediate_size, ratio) for s in before.layers),
        axis="width",
    )
    prune_(teacher, plan)
    teacher.save_pretrained(folder / "student")
    words.save_pretrained(folder / "student")
    plan.save(folder / "student" / PLAN_FILE)


def _spread(count: int, ratio: float) -> tuple[int, ...]:
    """Kept units, evenly spaced."""
    kept = count - round(count * ratio)
    return tuple(index * count // kept for index in range(kept))


class Watch:
    """Peak memory from the first training step on, and the speed of all but this one."""

    def __init__(self) -> None:
        self.before_gib = self.training_gib = self.seconds = self.cpu_seconds = 0.0
        self.card_before_gib = self.card_training_gib = 0.0
        self.tokens = 0
        self._step = DistillationTrainer.training_step
        DistillationTrainer.training_step = lambda *args: self.step(*args)

    def step(self, trainer: DistillationTrainer, model: Any, inputs: Any, *others: Any) -> Any:
        """One measured training step."""
        is_first = trainer.state.global_step == 0
        if is_first:
            gc.collect()
            self.before_gib = peak_gib()
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            self.card_before_gib = card_peak()
        count = int(inputs["attention_mask"].sum())
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = self._step(trainer, model, inputs, *others)
        if not is_first:
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start
            self.tokens += count
        self.training_gib = peak_gib()
        self.card_training_gib = max(self.card_training_gib, card_peak())
        return loss


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) / 2**20 for row in rows if row.startswith("VmHWM:"))


def run_job(name: str, shape: str, folder: Path, steps: int, tokens: int) -> None:
    """Run one job in this process and print its figures."""
    student, words = load(folder / "student")
    if name == "nothing":
        weights = sum(p.float().sum() for p in student.parameters())  # reads them all
        print(json.dumps({"job": name, "training_gib": peak_gib(), "sum": float(weights)}))
        return
    teacher: Any = None
    if name != "sft":
        teacher, _ = load(folder / "teacher", device="cpu")
    watch = Watch()
    options = RecoverConfig(train="lora", batch_size=1, trainer={"logging_steps": 1}, **JOBS[name])
    plan = Plan.load(folder / "student" / PLAN_FILE)
    data, share = samples(shape, steps, tokens), name == "shared teacher"
    history = recover(student, teacher, data, options, words, plan=plan, share=share)
    figures = {
        "job": name,
        "training_gib": watch.training_gib,
        "process_gib": max(watch.before_gib, peak_gib()),
        "card_training_gib": watch.card_training_gib,
        "card_gib": max(watch.card_before_gib, watch.card_training_gib, card_peak()),
        "tokens_per_s": watch.tokens / watch.seconds,
        "tokens_per_cpu_s": watch.tokens / watch.cpu_seconds,
        "last_loss": history.steps[-1]["loss"],
        "teacher": history.teacher,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=MEASURED, nargs="+", default=MEASURED)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pretend", action="store_true", help="on the card that tests pretend")
    options = parser.parse_args()
    if options.job:
        run_job(options.job, options.shape[0], options.folder, options.steps, options.tokens)
        return
    about = {
        **{name: getattr(options, name) for name in ("steps", "tokens", "ratio")},
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about))
    for shape in options.shape:
        compare_jobs(shape, options.steps, options.tokens, options.ratio, options.pretend)


def compare_jobs(shape: str, steps: int, tokens: int, ratio: float, pretend: bool) -> None:
    """Run every job on one model and print its figures as multiples of SFT's."""
    print(shape)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(shape, folder, ratio)
        rows = [_in_own_process(job, shape, steps, tokens, folder, pretend) for job in JOBS]
    base = next(row for row in rows if row["job"] == "sft")
    compared = {
        "training memory": "training_gib",
        "process": "process_gib",
        "tokens/s": "tokens_per_s",
        "tokens/s of CPU time": "tokens_per_cpu_s",
    }
    if base["card_gib"]:
        on_card = {"card in training": "card_training_gib", "card at most": "card_gib"}
        compared = on_card if pretend else {**compared, **on_card}
    for row in rows[1:]:
        told = [f"{name} {row[key] / base[key]:.2f}x" for name, key in compared.items()]
        print(f"{row['job']:18} {', '.join(told)} of sft")


def _in_own_process(
    job: str, shape: str, steps: int, tokens: int, folder: Path, pretend: bool
) -> dict[str, Any]:
    asked = {"job": job, "shape": shape, "steps": steps, "tokens": tokens, "folder": folder}
    options = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    row: dict[str, Any] = measured(__file__, options, pretend)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
