"""Run the demo: remove 30 % of the model, tokens first, then widths; recover; compare."""

from pathlib import Path
from typing import Any

from PIL import Image

from slimvlm.core.files import write_text
from slimvlm.core.options import Axis, CompressConfig, Dtype, RecoverConfig
from slimvlm.core.progress import Say
from slimvlm.demo.questions import TASKS
from slimvlm.demo.scenes import DATA
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.runs import compress, tables

RATIO = 0.3
TOKENS = 8192  # kept; the others, which the data lacks, are three fifths of what is removed
ASKED = ("name", "object_letter", "presence", "locate", "read_digits", "list_objects")
SHOWN = ("name", "locate", "list_objects")  # their first questions, with the replies of both models
# small steps towards the direction of the teacher's hidden states, at every position and layer;
# larger steps undo what the walk retained (docs/log.md)
STEPS: dict[str, Any] = {"learning_rate": 1e-4, "trainer": {"warmup_steps": 0.1}, "batch_size": 2}
RECOVERY = RecoverConfig(train="full", loss="cosine", epochs=1, **STEPS)


def run_demo(
    out: Path,
    short: bool,
    force: bool,
    say: Say,
    model: str = "demo",
    device: str | None = None,
    axis: Axis = "width",
    limit: int | None = None,
) -> tuple[list[str], list[list[str]], list[str]]:
    """Prune, recover and evaluate the demo model, and compare it with the original.

    Returns the header and rows of a table, and lines with questions and what to do next. Writes
    the run folder ``out/axis``, the images shown and ``out/summary.md``; a stopped demo resumes.
    ``short`` takes fewer samples; ``limit`` is the number of questions of each task.
    """
    folder = out / axis
    dtype: Dtype = "bfloat16" if computes_bfloat16(device_named(device)) else "float32"
    config = CompressConfig(
        ratio=RATIO,
        axis=axis,
        vocab_size=TOKENS,
        data="demo",
        dtype=dtype,
        device=device,
        samples=16 if short else 64,
        training_samples=16 if short else 64,
        test_samples=8 if short else 32,
        local_steps=0,  # with few samples they take long and gain little (docs/log.md)
        recover=RECOVERY,
        tasks=",".join(ASKED),
        limit=limit or (4 if short else 20),
    )
    found = None if force else compress.results_of(model, config, folder)
    if found is None:
        found = compress.compress(model, config, folder, force, say).results
    original, small = both = found["original"], found["recovered"]
    header = ["", "original", "compressed"]
    rows = [[name, *(f"{each.tasks[name].score:.1f}" for each in both)] for name in small.tasks]
    rows.append(["score retained, %", "100", str(small.retention(original))])
    for kind, kept in small.retention_by_kind(original).items():
        label = "multiple-choice" if kind == "chosen" else "open-ended"
        rows.append([f"  {label} (floor {kept.floor:.1f})", "100", str(kept)])
    rows += [
        ["parameters", *(tables.millions(each.total_params) for each in both)],
        ["weights", *(tables.size(each.weight_bytes or 0) for each in both)],
        ["prefill, image included, ms", *(f"{each.prefill_ms:.1f}" for each in both)],
        ["decode per token, ms", *(f"{each.decode_ms:.1f}" for each in both)],
    ]
    if (same := compress.read_held_out(folder)["recovered"].figures.agreement) is not None:
        rows.append(["same next token, test samples, %", "100", f"{same.value:.1f}"])

    lines = ["The first question of three tasks:", ""]
    for name in SHOWN:
        (question,) = TASKS[name].load(1)
        picture = out / "pictures" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        (image,) = question.images
        assert isinstance(image, Image.Image)  # the demo draws its images
        image.save(picture)
        lines += [f"{question.prompt}  (image: {picture})", f"  expected: {question.answers[0]}"]
        for label, each in (("original", original), ("compressed", small)):
            reply = each.tasks[name].replies[each.tasks[name].ids.index(question.id)]
            lines.append(f"  {label}: {reply}")
        lines.append("")
    lines += [line.format(folder=folder, out=out, model=model) for line in DATA["next"]]
    text = "\n".join([tables.as_markdown(header, rows), "```text", *lines, "```", ""])
    write_text(out / "summary.md", text)
    return header, rows, lines
