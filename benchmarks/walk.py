"""What the default recipe costs: `compress --train none` against one plain forward pass.

Command:  .venv/bin/python benchmarks/walk.py [--shapes qwen2 gemma3 demo] [--local-steps N]
          .venv/bin/python benchmarks/walk.py --pretend --conversations 8 [--card-gib 2.6]
Expect:   about ten minutes on two cores with bfloat16 units, and as long on a pretended card.

For each shape (random bfloat16 weights but for the demo) and 64 conversations of 180 tokens, four
fresh processes: one plain forward pass of the model over the batches, one of its backbone alone,
`slimvlm.compress` at 20 % width without training, reload check included, and the same by
`slimvlm prune --low-memory`. Times are wall clock without imports, peaks are ru_maxrss of the
process (Python and torch included; mapped file pages count), and on an accelerator what tensors
held there at most. The parts of the walk are timed by wrapping its functions; beside each stands
what its arithmetic takes at the rate of matrix products measured in the same process, in the data
type that the part computes in.

With ``--pretend`` the steps run on the card that tests pretend, of 24 GiB or as many as
``--card-gib`` says: its peaks are counted exactly, its times mean nothing and are not shown. What
that card holds is memory of the process, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import slimvlm as sv
from own_process import card_peak, measured
from shapes import GEMMA, QWEN
from slimvlm.cli import steps
from slimvlm.core.options import CompressConfig, MemoryOptions, PruneConfig
from slimvlm.models.load import auto_class, resolve
from slimvlm.runs.tables import as_markdown

SHAPES = {"qwen2": QWEN, "gemma3": GEMMA}
CONVERSATIONS, TOKENS, RATIO, BATCH = 64, 180, 0.2, 4
STEPS = ("write", "backbone", "forward", "compress", "low-memory")
WORDS = [
    *("the", "of", "and", "to", "in", "is", "for", "on", "that"),
    *("by", "this", "with", "you", "it", "not", "or", "be", "are"),
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def write(shape: str, folder: Path) -> Path:
    """A checkpoint of random weights with the demo's tokenizer; the demo is there already."""
    out = folder / shape
    if shape == "demo":
        return Path(resolve("demo"))
    if not out.exists():
        torch.manual_seed(0)
        config = SHAPES[shape]
        model = auto_class(config).from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(resolve("demo"))
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out)
    return out


def write_data(model: Path, folder: Path, conversations: int = CONVERSATIONS) -> Path:
    """Conversations of about so many tokens: common words, which are a token each."""
    path, draw = folder / f"{model.name}.jsonl", random.Random(0)
    rows = []
    for _ in range(conversations):
        question, answer = (" ".join(draw.choices(WORDS, k=TOKENS // 2 - 6)) for _ in range(2))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


def rates() -> dict[str, float]:
    """The most operations a second of products of several shapes, by data type."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        best = 0.0
        for rows, inner, columns in ((2048, 2048, 2048), (4096, 896, 4864), (4864, 2048, 4864)):
            a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
            for _ in range(5):
                start = time.perf_counter()
                a @ b
                seconds = time.perf_counter() - start
                best = max(best, 2 * rows * inner * columns / seconds)
        found[str(dtype).removeprefix("torch.")] = best
    return found


def forward(model: Path, data: Path, backbone: bool) -> dict[str, Any]:
    """One pass over all conversations, with the logits or without."""
    loaded, processor = sv.load(model)
    samples = sv.load_samples(str(data))
    batches = list(sv.calibration_batches(processor, samples, BATCH))
    runs = loaded.base_model if backbone else loaded
    tokens = sum(batch["attention_mask"].sum().item() for batch in batches)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            inputs = {k: v.to(loaded.device) for k, v in batch.items() if k != "labels"}
            runs(**inputs, use_cache=False)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


PAIRED = "paired times"
PARTS = {
    "inputs": ("slimvlm.pruning.walk.streams", "Streams", "keep_inputs"),
    "moments": ("slimvlm.pruning.walk.streams", "Streams", "moments"),
    "states": ("slimvlm.pruning.walk.streams", "Streams", "pass_on"),
    "choice": ("slimvlm.pruning.walk.engine", "removal_order"),
    "refit": ("slimvlm.pruning.repair", "refit"),
    "confirmation": ("slimvlm.pruning.repair", "confirmed"),
    "trial": ("slimvlm.pruning.walk.engine", "cheapest_plan"),
    "local distillation": ("slimvlm.pruning.walk.engine", "distil_"),
    "held-out samples": ("slimvlm.runs.compress", "_measure"),
    "writing": ("slimvlm.runs.compress", "save"),
    "loading": ("slimvlm.runs.stages", "load_original"),
    PAIRED: ("slimvlm.runs.compress", "_time"),
}
"""What is timed: functions by module and name."""


def watch(spent: dict[str, float], held: dict[str, float]) -> None:
    """Add up what the parts take, and note what the card held; a part in another counts there."""
    running: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if running:
                return function(*args, **kwargs)
            running.append(name)
            held["rest"] = max(held["rest"], card_peak())
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                spent[name] += time.perf_counter() - start
                held[name] = max(held[name], card_peak())

        return run

    for name, (module, *path) in PARTS.items():
        owner: Any = import_module(module)
        for step in path[:-1]:
            owner = getattr(owner, step)
        setattr(owner, path[-1], timed(name, getattr(owner, path[-1])))


def arithmetic(model: Path, tokens: int, kept: dict[str, int]) -> dict[str, tuple[str, float]]:
    """Data type and operations of the parts that are made of matrix products.

    A layer runs once, and its last matrices a second time on the inputs that were kept; a block
    that loses nothing runs again. Every fourth conversation is held out.
    """
    anatomy = sv.anatomy(model)
    inputs = moments = states = choice = confirmation = 0.0
    hidden, held_out = anatomy.hidden_size, tokens / 4
    for shape in anatomy.layers:
        for channels, units, unit_params, left in (
            (
                shape.num_heads * shape.head_dim,
                shape.num_kv_heads,
                shape.kv_group_params,
                kept["kv_group"],
            ),
            (shape.intermediate_size, shape.intermediate_size, shape.neuron_params, kept["neuron"]),
        ):
            stays = channels * left // units
            gone, block, writer = channels - stays, units * unit_params, channels * hidden
            states += 2 * held_out * block * left / units  # through plain slices
            if not gone:
                inputs += 2 * tokens * block
                states += 2 * tokens * block
                continue
            inputs += 2 * tokens * (block - writer)
            moments += (tokens - held_out) * channels**2
            states += 2 * tokens * writer * left / units
            choice += channels**3 + gone * channels * (4 * hidden + gone)
            confirmation += 3 * 2 * held_out * writer
    return {
        "inputs": ("bfloat16", inputs),
        "moments": ("bfloat16", moments),
        "states": ("bfloat16", states),
        "choice": ("float32", choice),
        "confirmation": ("bfloat16", confirmation),
    }


def compress(model: Path, data: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The default recipe without training."""
    spent: dict[str, float] = defaultdict(float)
    held: dict[str, float] = defaultdict(float)
    watch(spent, held)
    config = CompressConfig(
        ratio=RATIO,
        data=str(data),
        axis="width",
        samples=options.conversations,
        local_steps=options.local_steps,
    )
    start = time.perf_counter()
    sv.compress(str(model), config, out, force=True, say=tell)
    seconds = time.perf_counter() - start
    held["rest"] = max(held["rest"], card_peak())
    plan = sv.Plan.load(out / "plan.json")
    kept = {"kv_group": len(plan.kv_groups[0]), "neuron": len(plan.neurons[0])}
    return {
        "seconds": seconds,
        "parts": dict(spent),
        "card_parts": dict(held),
        "kept": kept,
        "rates": {} if options.pretend else rates(),
    }


def low_memory(model: Path, data: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same layer by layer from files."""
    config = PruneConfig(
        ratio=RATIO,
        data=str(data),
        axis="width",
        samples=options.conversations,
        local_steps=options.local_steps,
    )
    start = time.perf_counter()
    steps.to_log = tell
    steps.prune(str(model), out, None, config, MemoryOptions(low_memory=True), force=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "card_parts": {"all": card_peak()}}


def tell(line: str) -> None:
    """Show where hidden states are kept."""
    if line.startswith("hidden states"):
        print(line, file=sys.stderr, flush=True)


def step(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    (shape,), folder = options.shapes, options.folder
    model = write(shape, folder)
    data = write_data(model, folder, options.conversations)
    if options.step == "compress":
        found = compress(model, data, folder / f"{shape}-run", options)
    elif options.step == "low-memory":
        found = low_memory(model, data, folder / f"{shape}-low-memory", options)
    elif options.step in ("forward", "backbone"):
        found = forward(model, data, options.step == "backbone")
    else:
        found = {"gib": sum(f.stat().st_size for f in model.glob("*.safetensors")) / 2**30}
        found["layer_gib"] = 2 * max(each.params for each in sv.anatomy(model).layers) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**found, "peak_gib": peak, "threads": torch.get_num_threads()}


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of a shape, on a pretended card only those of memory."""
    found = {}
    words = ["--shapes", shape, "--folder", str(options.folder)]
    words += ["--local-steps", str(options.local_steps)]
    words += ["--conversations", str(options.conversations), *["--pretend"] * options.pretend]
    for name in STEPS:
        if not options.pretend or name not in ("backbone", "forward"):
            asked = [*words, "--step", name]
            found[name] = measured(__file__, asked, options.pretend, options.card_gib)
    return found


def report(shape: str, found: dict[str, Any], options: argparse.Namespace) -> str:
    """The figures of a shape as text."""
    weights, run = found["write"]["gib"], found["compress"]
    lines = [
        f"## {shape}: {weights:.2f} GiB of weights, {options.conversations} conversations, "
        f"{run['threads']} threads, kept {run['kept']}",
        "",
        peaks(found),
    ]
    if options.pretend:
        of_parts = sorted(run["card_parts"].items(), key=lambda pair: -pair[1])
        rows = [[name, f"{gib:.2f}"] for name, gib in of_parts]
        return "\n".join([*lines, as_markdown(["part of compress", "card, GiB"], rows)])
    ratio = run["seconds"] / found["forward"]["seconds"]
    lines += [
        ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in run["rates"].items()),
        "",
        f"compress {run['seconds']:.1f} s, forward pass {found['forward']['seconds']:.1f} s "
        f"(backbone alone {found['backbone']['seconds']:.1f} s): **{ratio:.1f} x**; "
        f"prune --low-memory {found['low-memory']['seconds']:.1f} s",
        "",
    ]
    model = write(shape, options.folder)
    needs = arithmetic(model, found["forward"]["tokens"], run["kept"])
    rows = []
    rest = run["seconds"] - sum(run["parts"].values())
    for name, seconds in sorted({**run["parts"], "rest": rest}.items(), key=lambda p: -p[1]):
        row = [name, f"{seconds:.1f}", f"{seconds / run['seconds']:.0%}", "", ""]
        if name in needs:
            dtype, operations = needs[name]
            ideal = operations / run["rates"][dtype]
            row[3:] = [f"{ideal:.1f} ({dtype})", f"{ideal / seconds:.0%}"]
        rows.append(row)
    header = ["part", "seconds", "share", "its arithmetic, s", "of the matmul rate"]
    return "\n".join([*lines, as_markdown(header, rows)])


def peaks(found: dict[str, Any]) -> str:
    """A table of what each step held at most, beside the aims.

    The paired times of a whole run, with both models on the card, have a row of their own: they are
    left out where there is no room.
    """
    weights, two_layers = found["write"]["gib"], 2 * found["write"]["layer_gib"]
    aims = {
        "compress": (1.5 * weights + 1.5, 1.15 * weights + 1.5),
        "low-memory": (None, 2 + two_layers),
    }
    rows = []
    for name, each in found.items():
        of_process, of_card = aims.get(name, (None, None))
        on_card = dict(each.get("card_parts", {}))
        paired = on_card.pop(PAIRED, 0.0)
        values = [each["peak_gib"], of_process, max(on_card.values(), default=0.0), of_card]
        rows.append([name, *(f"{value:.2f}" if value else "" for value in values)])
        if paired:
            rows.append([f"{name}, {PAIRED}", "", "", f"{paired:.2f}", ""])
    return as_markdown(["step", "process, GiB", "aim", "card, GiB", "aim"], rows)


def main() -> None:
    """Measure one step, or all shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "demo"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "walk")
    parser.add_argument("--local-steps", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--pretend", action="store_true", help="on the card that tests pretend")
    parser.add_argument("--card-gib", type=float, default=0.0, help="how large that card is")
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        print(json.dumps(step(options)))
        return
    for shape in options.shapes:
        print(report(shape, measure(shape, options), options), flush=True)


if __name__ == "__main__":
    main()
