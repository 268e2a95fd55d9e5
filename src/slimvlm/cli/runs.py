"""Whole runs: study, report, advise, demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.cli.options import INLINE, Model, TargetFlags
from slimvlm.cli.printing import note, print_advice, print_forecast, print_results, print_study
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import DeviceOptions, Dtype


def study(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.yaml")],
    out: Path,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    place: Annotated[DeviceOptions, INLINE] = DeviceOptions(),
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Measure a grid of compressions, doing each piece of work once.

    Stages in the folder's cache are used again: a stopped study resumes, a larger one adds its new
    cells, and failed stages are tried again.

    Args:
        file: The study; see docs/studies.md.
        out: Folder for results.parquet, results.csv, claims.md and the cache.
        engine: local does one stage after another; ray does many at once on a Ray cluster.
        workers: Stages at once, for a Ray that is started here.
        address: A running Ray cluster; by default the one in RAY_ADDRESS.
        place: Where models run.
        dry_run: Only show the cells, their cached stages and the estimated time of the rest.
        json: Print JSON.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one table shows the progress; before imports
    from slimvlm.runs.study import forecast, run_study

    if dry_run:
        print_forecast(forecast(file, out), json)
        return
    print_study(run_study(file, out, engine, workers, address, device=place.device), json)
    if not json:
        note(f"results: {out}/results.csv, claims: {out}/claims.md")


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
    target: Annotated[TargetFlags, INLINE] = TargetFlags(),
    data: tuple[str, ...] | None = None,
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    samples: int | None = None,
    dtype: Dtype = "auto",
    json: bool = False,
) -> None:
    """Say which recipe fits a budget, what it should keep, what it costs, and the command.

    Reads the configuration and the tokenizer, no weights. Rules and numbers are those of
    recipes.yaml.

    Args:
        model: Folder, hub id, or demo.
        target: How small or fast the model must become.
        data: There are conversations to train on; so it is unless --no-data is given.
        no_data: There are none.
        gpu: There is a GPU; by default this machine is looked at.
        no_gpu: There is none.
        samples: How many conversations there are; by default as many as the study had.
        dtype: Data type of the weights (bfloat16 for auto).
        json: Print JSON.
    """
    from slimvlm.runs.advise import advise as find

    if data:
        raise ConfigError(
            f"data {data[0]!r}: advise reads no data. Say how much there is with --samples, or let "
            "compress --dry-run count it"
        )
    for name, yes, no in (("data", data is not None, no_data), ("gpu", gpu, no_gpu)):
        if yes and no:
            raise ConfigError(f"--{name} and --no-{name} contradict each other")
    advice = find(
        model,
        **vars(target),
        data=not no_data,
        gpu=True if gpu else False if no_gpu else None,
        samples=samples,
        dtype="bfloat16" if dtype == "auto" else dtype,
    )
    print_advice(advice, json)


def demo(
    what: Annotated[Literal["build", "run"], tyro.conf.Positional],
    out: Path = Path("runs/demo"),
    model: str = "demo",
    delta: Path | None = None,
    short: bool = False,
    place: Annotated[DeviceOptions, INLINE] = DeviceOptions(),
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
        place: For run: where models run.
        force: Replace what is there already.
    """
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.demo.run import run_demo

    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    print_results(run_demo(out, short, force, note, model, place.device), False, "demo at 30 %")
    note(f"checkpoints: {out}/depth/checkpoint and {out}/width/checkpoint")
