"""Run the demo: remove 30 % of the model, tokens first, then widths; recover; compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from slimvlm.core.options import Axis, CompressConfig, Dtype, RecoverConfig
from slimvlm.core.progress import Say
from slimvlm.demo.questions import TASKS
from slimvlm.demo.scenes import DATA
from slimvlm.evaluation.results import Result
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.runs import compress

RATIO = 0.3
TOKENS = 8192  # kept; the others, which the data lacks, are three fifths of what is removed
ASKED = ("name", "object_letter", "presence", "locate", "read_digits", "list_objects")
SHOWN = ("name", "locate", "list_objects")  # the images of their first questions are written
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
) -> tuple[Mapping[str, Result], list[str]]:
    """Prune, recover and evaluate the demo model; return the results, and lines on what to do next.

    Writes the run folder ``out/axis``, and some images for questions of one's own; a stopped demo
    resumes. ``short`` takes fewer samples; ``limit`` is the number of questions of each task.
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
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        (image,) = TASKS[name].load(1)[0].images
        assert isinstance(image, Image.Image)  # the demo draws its images
        image.save(out / "pictures" / f"{name}.png")
    return found, [line.format(folder=folder, out=out, model=model) for line in DATA["next"]]
