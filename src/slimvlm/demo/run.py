"""Run the demo: remove 30 %, first tokens, then layers or widths; recover and evaluate."""

from __future__ import annotations

from pathlib import Path

from slimvlm.core.files import write_text
from slimvlm.core.options import Axis, CompressConfig, Dtype, RecoverConfig
from slimvlm.core.progress import Say
from slimvlm.evaluation.results import Result
from slimvlm.models.load import computes_bfloat16, device_named
from slimvlm.runs.compress import compress, read_times, results_of
from slimvlm.runs.tables import as_markdown, result_rows

RATIO = 0.3
TOKENS = 8192
"""Tokens that stay. The others are three fifths of what is removed; the data has none of them."""
AXES: tuple[Axis, ...] = ("depth", "width")
RECOVERY = RecoverConfig(
    train="full",
    loss="cosine",
    learning_rate=1e-4,
    trainer={"warmup_steps": 0.1},
    batch_size=2,
    epochs=1,
)
"""Small steps towards the direction of the teacher's hidden states, at every position and layer;
larger steps lose what the walk kept (``docs/log.md``)."""


def run_demo(
    out: Path, short: bool, force: bool, say: Say, model: str = "demo", device: str | None = None
) -> dict[str, Result]:
    """Prune, recover and evaluate the demo model along both axes.

    Writes a run folder for each axis and ``summary.md`` to ``out``; a stopped demo resumes.
    ``short`` takes only a few questions and training samples.
    """
    results: dict[str, Result] = {}
    speeds: list[str] = []
    if force and (out / "summary.md").exists():
        for folder in (out, *(out / axis for axis in AXES)):
            (folder / "summary.md").unlink(missing_ok=True)
    dtype: Dtype = "bfloat16" if computes_bfloat16(device_named(device)) else "float32"
    for axis in AXES:
        original = out / AXES[0] / "results" / "original.json"
        config = CompressConfig(
            ratio=RATIO,
            axis=axis,
            vocab_size=TOKENS,
            data="demo",
            dtype=dtype,
            device=device,
            samples=16 if short else 128,
            training_samples=32 if short else 96,
            recover=RECOVERY,
            tasks="demo",
            limit=4 if short else 20,
            baseline=None if axis == AXES[0] else str(original),
        )
        say(f"--- {axis} ---")
        found = results_of(model, config, out / axis)
        if found is None:
            found = compress(model, config, out / axis, force, say).results
        else:
            say("done already")
        for stage, result in found.items():
            results[stage if stage == "original" else f"{axis} {stage}"] = result
        if (times := read_times(out / axis)) is not None:
            speeds.append(f"{axis}: the smaller model {times}")
            say(speeds[-1])
    write_text(out / "summary.md", "\n".join([as_markdown(*result_rows(results)), *speeds, ""]))
    return results
