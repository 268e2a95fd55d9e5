"""The whole way, start to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from slimvlm.config import CompressConfig, PruneConfig, RecoverConfig, TrainingConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model
from slimvlm.verbs.printing import console, note, print_json

if TYPE_CHECKING:
    from slimvlm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Training(TrainingConfig):
    """How to train; the study's decision chart fills in what is not said."""

    train: Literal["projector", "lora", "full", "none"] | None = None
    """What learns; none skips training."""
    loss: str | None = None
    """Weighted sum of sft, hidden, cosine, kl, rkl, jsd."""

    def recovery(self, chart: Recipe) -> RecoverConfig | None:
        """The options of recovery, None for no training."""
        learns = self.train or chart.train or "none"
        if learns == "none":
            return None
        given = {name: value for name, value in vars(self).items() if name not in ("train", "loss")}
        return RecoverConfig(train=learns, loss=self.loss or chart.loss, **given)


def compress(
    model: Model,
    out: Path,
    pruning: Annotated[PruneConfig, INLINE] = PruneConfig(repair="auto"),
    training_samples: int | None = None,
    training: Annotated[Training, INLINE] = Training(),
    tasks: str | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Make a smaller model, start to end, in one run folder.

    The recipe follows the study's decision chart unless options say otherwise. A stopped run goes
    on when the same command is given again.

    Args:
        model: Folder, hub id, or demo.
        out: The run folder: config, plan, scores, checkpoint, results, summary.md.
        pruning: What to remove, and how. Without data, nothing is trained.
        training_samples: Use only so many further samples for training.
        training: How to train.
        tasks: Evaluate on these tasks before, between and after; demo for the built-in ones.
        limit: Only the first so many questions of each task.
        baseline: Result file of the original model, to save asking it again.
        force: Replace an existing run folder.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.compression import compress as run
    from slimvlm.pruning import ratio_of
    from slimvlm.recipes import recipe_for

    if pruning.data is None and training.train not in (None, "none"):
        raise ConfigError(f"train {training.train!r} needs --data")
    chart = recipe_for(ratio_of(pruning), pruning.data is not None and training.train != "none")
    config = CompressConfig(
        **vars(pruning),
        training_samples=training_samples,
        recover=training.recovery(chart),
        tasks=tasks,
        limit=limit,
        baseline=baseline,
    )
    results = run(model, config, out, force, note)
    if json:
        print_json(summary.result_json(results) if results else {})
    elif results:
        console().print(summary.as_table(*summary.result_rows(results), title=str(out)))
    note(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")


def demo(
    what: Annotated[Literal["build", "run"], tyro.conf.Positional],
    out: Path = Path("runs/demo"),
    model: str = "demo",
    delta: Path | None = None,
    short: bool = False,
    force: bool = False,
) -> None:
    """Build the demo model, or take it through the whole pipeline at 30 %.

    Args:
        what: build writes the model into the cache; run compresses it along depth and width.
        out: Folder for the runs, or for the model of a delta.
        model: For run: another model that knows the demo's tasks, such as another training seed.
        delta: For build: what slimvlm.demo.train exported, instead of the delta in the package.
        short: Fewer questions and training samples: a check that everything works.
        force: Replace what is there already.
    """
    from slimvlm import summary
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.showcase import run_demo

    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    results = run_demo(out, short, force, note, model)
    console().print(summary.as_table(*summary.result_rows(results), title="demo at 30 %"))
    note(f"checkpoints: {out}/depth/checkpoint and {out}/width/checkpoint")
