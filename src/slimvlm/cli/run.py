"""Whole runs: compress, demo, study, report, advise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from slimvlm.cli.options import INLINE, Model
from slimvlm.cli.printing import console, note, print_json
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, PruneConfig, RecoverConfig, TrainingConfig

if TYPE_CHECKING:
    from slimvlm.runs.recipes import Recipe

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from slimvlm.runs.study.display import Forecast

from dataclasses import asdict
from typing import TYPE_CHECKING

from slimvlm.core.options import Dtype

if TYPE_CHECKING:
    from slimvlm.runs.advise import Advice


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
    from slimvlm.runs import tables as summary
    from slimvlm.runs.compress import compress as run
    from slimvlm.runs.recipes import recipe_for
    from slimvlm.runs.stages import ratio_of

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
        delta: For build: what slimvlm_tools.demo_training.train exported, instead of the delta in
            the package.
        short: Fewer questions and training samples: a check that everything works.
        force: Replace what is there already.
    """
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.demo.run import run_demo
    from slimvlm.runs import tables as summary

    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    results = run_demo(out, short, force, note, model)
    console().print(summary.as_table(*summary.result_rows(results), title="demo at 30 %"))
    note(f"checkpoints: {out}/depth/checkpoint and {out}/width/checkpoint")


_SHOWN = ("model", "axis", "ratio", "recovery", "fraction", "seed", "avg", "avg_percent", "status")


def study(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.yaml")],
    out: Path,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Measure a grid of compressions, doing each piece of work once.

    Whatever is in the folder already is used again: a stopped study goes on, a larger one adds what
    is new, and what failed is tried again.

    Args:
        file: The study; see docs/studies.md.
        out: Folder for results.parquet, results.csv, claims.md and the cache.
        engine: local does one stage after another; ray shares them out over a Ray cluster.
        workers: Stages at once, for a Ray that is started here.
        address: A running Ray cluster; by default the one in RAY_ADDRESS.
        dry_run: Only show the cells, what is in the cache and how long the rest would take.
        json: Print JSON.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one table shows how far it is; before imports
    from dataclasses import asdict

    from slimvlm.runs.study import as_json, forecast, run_study

    if dry_run:
        found = forecast(file, out)
        if json:
            print_json(asdict(found))
        else:
            _print_forecast(found)
        return
    table = run_study(file, out, engine, workers, address)
    if json:
        print_json(as_json(table))
    else:
        _print_results(table)
        note(f"results: {out}/results.csv, claims: {out}/claims.md")


def _print_forecast(found: Forecast) -> None:
    from slimvlm.runs.study.display import duration
    from slimvlm.runs.tables import as_table

    cells = [[label, ", ".join(stages) or "nothing"] for label, stages in found.cells.items()]
    console().print(as_table(["cell", "to do"], cells, title=f"{len(cells)} cells"))
    counts = [
        [kind, str(to_do), str(done), found.basis.get(kind, "")]
        for kind, (to_do, done) in found.stages.items()
    ]
    console().print(as_table(["stage", "to do", "in the cache", "time is"], counts))
    print(f"about {duration(found.seconds)}, one stage after another")


def _print_results(table: pd.DataFrame) -> None:
    from slimvlm.runs.tables import as_table
    from slimvlm_tools.claims import claims_of

    rows = [[_cell(row[name]) for name in _SHOWN] for _, row in table.iterrows()]
    console().print(as_table(_SHOWN, rows))
    claims = [[claim.name, claim.statement, claim.verdict] for claim in claims_of(table)]
    console().print(as_table(["claim", "says", "here"], claims))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None else str(value)


def report(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Write one HTML file about a run or a study: charts, tables, answers, configuration.

    It opens offline, on a phone, in dark mode, and prints.

    Args:
        folder: The folder of compress or study.
        out: The file; by default report.html in that folder, which is replaced.
        force: Replace an existing file.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.runs.report import read_record, report_html

    target = out if out is not None else folder / "report.html"
    require_free(target, force or out is None)
    page = report_html(read_record(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    note(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")


def advise(
    model: Model,
    ratio: float | None = None,
    target_params: str | None = None,
    target_memory: str | None = None,
    target_latency: float | None = None,
    data: bool = False,
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    samples: int | None = None,
    dtype: Dtype = "auto",
    json: bool = False,
) -> None:
    """Say which recipe fits a budget, what it should keep, what it costs, and the command.

    Reads the configuration only, and runs nothing. Rules and numbers are those of recipes.yaml.

    Args:
        model: Folder, hub id, or demo.
        ratio: Share of the backbone's parameters to remove.
        target_params: Instead: parameters of the whole smaller model, such as 5B or 90M.
        target_memory: Instead: memory of its weights, such as 8GiB.
        target_latency: Instead: time to read a question, as a share of the original's.
        data: There are conversations to train on; so it is unless --no-data is given.
        no_data: There are none.
        gpu: There is a GPU; by default this machine is looked at.
        no_gpu: There is none.
        samples: How many conversations there are; by default as many as the study had.
        dtype: Data type of the weights (bfloat16 for auto).
        json: Print JSON.
    """
    from slimvlm.runs.advise import advise as find

    for name, yes, no in (("data", data, no_data), ("gpu", gpu, no_gpu)):
        if yes and no:
            raise ConfigError(f"--{name} and --no-{name} contradict each other")
    advice = find(
        model,
        ratio=ratio,
        target_params=target_params,
        target_memory=target_memory,
        target_latency=target_latency,
        data=not no_data,
        gpu=True if gpu else False if no_gpu else None,
        samples=samples,
        dtype="bfloat16" if dtype == "auto" else dtype,
    )
    if json:
        print_json(asdict(advice))
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for row in _rows(advice):
        table.add_row(*row)
    console().print(table)
    print(f"\n{advice.command}")


def _rows(advice: Advice) -> list[list[str]]:
    """A name and its value in every row."""
    from slimvlm.runs.tables import size

    recipe, cost = advice.recipe, advice.cost
    before, after = advice.params
    held, smaller = advice.weight_bytes
    learns = f"{recipe.train}, loss {recipe.loss}" if recipe.train else "nothing"
    kept = [
        f"{row.percent:.1f} % ({row.model}{', this model' if row.same else ''}; {row.source})"
        for row in advice.expected
    ]
    rows = [
        ["remove", f"{advice.ratio:.1%} of the backbone, along {recipe.axis}"],
        ["train", learns],
        ["parameters", f"{after / 1e9:.3g} B of {before / 1e9:.3g} B"],
        ["weights", f"{size(smaller)} of {size(held)}"],
        *(["expected AVG-%" if i == 0 else "", line] for i, line in enumerate(kept)),
        *([] if kept else [["expected AVG-%", "not measured for this recipe at this ratio"]]),
    ]
    if advice.latency is not None:
        rows.append(["time to read a question", f"{advice.latency:.0%} of the original's"])
    rows.append(["memory of scoring", f"about {size(cost.calibration_bytes)}"])
    if recipe.train:
        rows += [
            ["training data", f"{cost.samples:,} conversations"],
            ["memory of training", f"about {size(cost.training_bytes)}"],
            ["time of training", f"about {cost.training_hours:.2g} h"],
        ]
    rows += [["why" if i == 0 else "", note] for i, note in enumerate(advice.notes)]
    rows += [["estimates rest on" if i == 0 else "", n] for i, n in enumerate(cost.rests_on)]
    return rows
