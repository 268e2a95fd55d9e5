"""Run the demo: remove 30 % of the model, tokens first, then widths; recover; compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimvlm.core.options import Axis, CompressConfig, Dtype, RecoverConfig
from slimvlm.core.progress import Say
from slimvlm.evaluation.results import Result
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.runs import compress

RATIO = 0.3
TOKENS = 8192  # kept; the others, which the data lacks, are three fifths of what is removed
ASKED = ("name", "object_letter", "presence", "locate", "read_digits", "list_objects")
# small steps towards the direction of the teacher's hidden states, at every position and layer;
# larger steps undo what the walk retained (docs/log.md)
STEPS: Any = {"learning_rate": 1e-4, "trainer": {"warmup_steps": 0.1}, "batch_size": 2}
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
) -> Mapping[str, Result]:
    """Prune, recover and evaluate the demo model; a stopped demo resumes.

    The run folder is ``out/axis``. ``short`` takes fewer samples; ``limit`` is the number of
    questions of each task.
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
    return found or compress.compress(model, config, folder, force, say).results
