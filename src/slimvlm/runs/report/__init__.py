"""Write self-contained HTML: the report of a run or a study, and two models answer by answer.

A folder is read as a `Record`; a run is a study of one cell. Each file opens offline and on a
phone. Everything that models and files say is escaped, and a page's content security policy lets it
load nothing.
"""

import base64
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape

from slimvlm.core.documents import read_object
from slimvlm.core.errors import LONGEST, ConfigError, one_line, raised_as, shortened
from slimvlm.core.files import path_of
from slimvlm.core.progress import progress
from slimvlm.core.tables import read_table
from slimvlm.data.samples import Task, open_image
from slimvlm.evaluation.compare import CHANGES, RIGHT, Change, Comparison, Pair, compare
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.metrics import LIKELIHOODS, Estimate, signed
from slimvlm.evaluation.results import KINDS, Result
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as runs
from slimvlm.runs import tables
from slimvlm.runs.recipes import expected
from slimvlm.runs.study import DONE, FAILED, OF_A_KIND, ORIGINAL, STUDY, TABLE
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History

_WHOLE, MAX_BYTES = 4_900_000, 4_700_000
"""Bytes at most of a whole report, and of its cards, beyond which pictures are left out."""
MAX_CARDS: Mapping[Change, int] = {"both wrong": 40, "both right": 12}  # of a task; others: all
CARD_BYTES = 850  # markup of a card without its words and pictures, rounded up
SMALL, SMALL_SHOWN, LARGE = 64, 128, 256
"""Pictures up to the first size are enlarged to the second; those above the third are reduced."""
SHOWN_RATIO = 0.3  # answers are of the best model at the measured ratio nearest to this one
_OPTIONS = ("criterion", "allocation", "repair", "options", "fraction", "seed")
"""Columns that a cell's name and the table have only where they differ between cells of an axis."""
_TABLES = read_table(__file__, "tables.yaml")


def report_html(record: "Record") -> str:
    """Write the page; pictures are left out once the file would exceed 4.9 MB."""
    from slimvlm.runs.report import charts  # matplotlib: only where something is drawn

    overview = []
    for model in dict.fromkeys(entry.model for entry in record.entries):
        ours = [entry for entry in record.entries if entry.model == model]
        overview += [*charts.by_ratio(ours), *charts.trade_offs(ours)]
    values = {
        "record": record,
        "version": version("slimvlm"),
        "legend_items": charts.legend(record.entries),
        "config": json.dumps(record.config, indent=2),
        "charts": overview,
        "prunings": [
            (title, [charts.allocation(plan), *charts.score_maps(plan, scores)])
            for title, plan, scores in progress(record.prunings, "drawing plans")
        ],
        "trainings": [
            (title, about, charts.loss_curves(steps))
            for title, about, steps in progress(record.trainings, "drawing losses")
            if steps
        ],
    }
    bare = _render("report.html.jinja", gallery=None, **values)
    if record.comparison is None:
        return bare
    room = min(MAX_BYTES, _WHOLE - len(bare.encode()))
    return _render("report.html.jinja", gallery=gallery_of(record.comparison, room), **values)


def comparison_html(comparison: Comparison, title: str) -> str:
    """Write one HTML file with a table and every lost or gained answer, with pictures."""
    return _render("comparison.html.jinja", title=title, gallery=gallery_of(comparison))


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("slimvlm.runs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = signed
    return environment.get_template(template).render(**values)


def gallery_of(comparison: Comparison, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Lay out a comparison as cards: the values of ``gallery.html.jinja``."""
    # Unchanged answers whose replies differ most come first. Pictures are shown until the cards
    # fill `max_bytes`: those of lost answers first, and tasks take turns.
    queue: list[tuple[int, int, str, Pair]] = []
    hidden = {name: Counter(task.counts) for name, task in comparison.tasks.items()}
    for task in comparison.tasks.values():
        for rank, kind in enumerate(CHANGES):
            pairs = [pair for pair in task.pairs if pair.kind == kind]
            if kind in MAX_CARDS:
                pairs.sort(key=lambda p: (-abs(p.score_a - p.score_b), p.reply_a == p.reply_b))
                pairs = pairs[: MAX_CARDS[kind]]
            queue += [(rank, place, task.name, pair) for place, pair in enumerate(pairs)]
            hidden[task.name][kind] -= len(pairs)
    queue.sort(key=lambda entry: entry[:2])
    room = max_bytes
    for *_, pair in queue:
        asked = pair.question
        words = (asked.id, asked.prompt, *asked.answers, pair.reply_a, pair.reply_b)
        room -= CARD_BYTES + sum(len(str(escape(text)).encode()) for text in words)
    cards: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.tasks}
    left_out = 0
    for *_, name, pair in queue:
        pictures: list[dict[str, Any]] = []
        for image in pair.question.images if room > 0 else ():  # as PNG data URIs
            shown = open_image(image)
            if max(shown.size) > SMALL_SHOWN:  # large ones are reduced, small ones shown larger
                shown.thumbnail((LARGE, LARGE))
                shown = shown.quantize(256)
            buffer = BytesIO()
            shown.save(buffer, "PNG", optimize=True)
            enlarged = max(shown.size) <= SMALL
            scale = SMALL_SHOWN / max(shown.size) if enlarged else 1
            width, height = (max(1, round(side * scale)) for side in shown.size)
            uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            pictures.append({"uri": uri, "width": width, "height": height, "enlarged": enlarged})
        size = sum(len(each["uri"]) for each in pictures)
        if size > room:
            pictures, room = [], 0
        room -= size
        left_out += bool(pair.question.images) and not pictures
        cards[name].append({"pair": pair, "pictures": pictures})
    differences = [*(task.difference for task in comparison.tasks.values()), comparison.difference]
    reach = max(max(abs(d.low), abs(d.high), 1.0) for d in differences)
    return {
        "comparison": comparison,
        "cards": cards,  # by task
        "hidden": {name: +counts for name, counts in hidden.items()},  # answers without a card
        "pictures_left_out": left_out,
        "graded": any({p.score_a, p.score_b} - {0, 1} for p in comparison.pairs),
        "place": lambda points: round(50 + 48 * points / reach, 1),  # on the axis of all tasks
        "kinds": CHANGES,
        "right": RIGHT,
    }


@dataclass(frozen=True)
class Entry:
    """One measured model."""

    name: str
    axis: str  # where it was pruned; empty for an original
    ratio: float  # share of the backbone that was removed
    recovery: str  # name of the training; ``none``, or empty for an original
    average: float  # AVG in percent
    percent: float | None  # AVG-%, 100 for an original; None if it was not measured
    low: float | None  # 95 % interval of AVG-%
    high: float | None
    total_params: int
    prefill_ms: float  # time to read a question
    decode_ms: float  # time to write a token
    train: str | None  # projector, lora, full or None
    loss: str
    model: str  # the original that it comes from
    fraction: float  # share of the training data that was used
    variant: str  # options that tell it from others of its axis, ratio and recovery; no seed
    link: str  # id of its row in a table, that marks of charts lead to; empty for none
    columns: Mapping[str, str]  # further columns of the table

    @property
    def is_original(self) -> bool:
        """Whether nothing was removed."""
        return not self.axis

    @property
    def interval(self) -> str:
        """AVG-% with its interval, as text."""
        return _with_interval(self.percent, self.low, self.high)


@dataclass(frozen=True)
class Table:
    """Text cells below a header; those that end with `slimvlm.runs.tables.MARK` are significant."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""  # written below, one list item for each line
    folded: bool = False  # closed at first
    wraps: bool = False  # cells are sentences, which break into lines
    ids: Sequence[str] = ()  # of each row, that marks of charts lead to; empty for none


@dataclass(frozen=True)
class Record:
    """Everything that a report shows."""

    title: str
    lead: str  # a sentence below the title
    cards: Sequence[tuple[str, str, str]]  # figures to read first: label, value, explanation
    command: str  # of the run; empty if not known
    config: Mapping[str, Any]
    entries: Sequence[Entry]  # the measured models, originals first
    prunings: Sequence[tuple[str, Plan, Sequence[Scores]]]  # title, plan, scores that led to it
    trainings: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]]  # title, words, log rows
    tables: Sequence[Table]
    comparison: Comparison | None  # the original and one smaller model, answer by answer
    notes: Sequence[str] = ()


def read_record(folder: str | Path, tasks: str | None = None) -> Record:
    """Read a run folder of `compress` or of a study; ``tasks`` are asked ones of the user's own."""
    path = path_of(folder, "run")
    own, _ = split_names(tasks or "demo")  # lmms-eval's: answers without questions
    known = builtin_tasks() | {task.name: task for task in find_tasks(own or "demo")}
    try:
        if (path / "config.json").is_file() and (path / "plan.json").is_file():
            return _read_run(path, known)
        if (path / TABLE).is_file() and (path / "study.json").is_file():
            return _read_study(path, known)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        told = f"{type(error).__name__}: {one_line(error)[:LONGEST]}"
        told = f"a file in it is not as slimvlm wrote it ({told})"
        raise ConfigError(f"report {str(folder)!r}: {told}") from error
    told = f"neither a run folder (config.json and plan.json) nor a study ({TABLE} and study.json)"
    raise ConfigError(f"report {str(folder)!r}: {told}")


def _read_run(folder: Path, known: Mapping[str, Task]) -> Record:
    config = read_object(folder / "config.json", "report:")
    plan, results = Plan.load(folder / "plan.json"), runs.read_results(folder)
    on_data, recover = runs.read_held_out(folder), config.get("recover") or {}
    entries = []
    for stage, result in results.items():  # as a row of a study's table
        original = results.get(ORIGINAL, result)
        trained = recover.get("train") if stage == "recovered" else None
        row = {
            **{"axis": plan.axis, "achieved_ratio": plan.ratio, "avg": result.average},
            **{"train": trained or "none", "loss": recover.get("loss", "")},
            "recovery": f"{trained} {recover['loss']}" if trained else "none",
            **{name: getattr(result, name) for name in ("total_params", "prefill_ms", "decode_ms")},
        }
        if stage == ORIGINAL:
            row |= {"axis": ORIGINAL, "achieved_ratio": 0.0, "avg_percent": 100.0}
        elif not math.isnan(original.average):
            kept = result.retention(original)
            row["avg_percent"] = kept.percent
            row |= {"avg_percent_low": kept.low, "avg_percent_high": kept.high}
        entries.append(_entry(row, stage))
    title = "Scores in percent"
    listed = [Table(title, *tables.result_rows(results), tables.LEGEND)] if results else []
    if on_data:
        title, note = "What was kept on unseen samples", "\n".join(tables.held_out_notes(on_data))
        listed.append(Table(title, *tables.held_out_rows(on_data), note))
    listed += _walk_tables(folder)
    there = [
        [entry.name, entry.interval, row.model, f"{value:.1f}", row.source]
        for entry in entries
        if not entry.is_original and entry.percent is not None and recover.get("fraction", 1) == 1
        for row, value in expected(entry.axis, entry.train, entry.loss, entry.ratio, False)
    ]
    if there:
        listed.append(Table(rows=there, **_TABLES["published"]))
    # figures to read first
    cards, times = [], runs.read_times(folder)
    compared = len(entries) > 1 and entries[0].is_original
    first, last = (entries[0], entries[-1]) if compared else (None, None)
    if last is not None and last.percent is not None:
        bounds = None if last.low is None else f"95 % interval {last.low:.1f} to {last.high:.1f}"
        interval = bounds or "no bounds: the original is not clearly above 0"
        cards.append(("Kept (AVG-%)", f"{last.percent:.1f}", interval))
        for kind, kept in list(results.values())[-1].retention_by_kind(results[ORIGINAL]).items():
            bounds = "no bounds" if math.isnan(kept.low) else f"{kept.low:.1f} to {kept.high:.1f}"
            told = (f"{kept.percent:.1f}", f"{bounds}, floor {kept.floor:.1f}")
            cards.append((f"Kept of {kind} answers", *told))
    asked = "" if plan.asked_ratio is None else f"asked for {plan.asked_ratio:.1%}"
    before, after = plan.before.total_params / 1e6, plan.after.total_params / 1e6
    cards.append(("Backbone removed", f"{plan.ratio:.1%}", asked))
    cards.append(("Parameters", f"{after:,.1f} M", f"of {before:,.1f} M"))
    if times is not None:  # paired with the original's; else each model's own
        for title, share in (("Time to read", times.prefill), ("Time to write", times.decode)):
            bounds = f"of the original's, {share.low:.0%} to {share.high:.0%} in all rounds"
            cards.append((title, f"{share.value:.0%}", bounds))
    elif first is not None and last is not None:
        cards.append(("Prefill", f"{last.prefill_ms:.1f} ms", f"of {first.prefill_ms:.1f} ms"))
        of = f"a token, of {first.decode_ms:.1f} ms"
        cards.append(("Decode", f"{last.decode_ms:.1f} ms", of))
    same = list(on_data.values())[-1].figures.agreement if on_data else None
    if same is not None and same.low is not None and same.high is not None:
        interval = f"on unseen samples, 95 % interval {same.low:.1f} to {same.high:.1f}"
        cards.append(("Same next token", f"{same.value:.1f} %", interval))
    command = ""
    with suppress(ConfigError):  # options of another version
        model, options, _ = runs.read_config(folder / "config.json")
        command = runs.compress_command(model, options, folder)
    comparison = None
    if ORIGINAL in results and len(results) > 1:
        original, smaller = results[ORIGINAL], list(results.values())[-1]
        if any(task.metric not in LIKELIHOODS for task in original.tasks.values()):
            comparison = compare(original, smaller, known)
    scores = [Scores.load(path) for path in sorted((folder / "scores").glob("*.safetensors"))]
    learns = f"{recover.get('train')} from {recover.get('loss')}"
    return Record(
        title=f"{Path(config['model']).name} at {plan.ratio:.0%}",
        lead=f"This run {plan.summary()}.",
        cards=cards,
        command=command,
        config=config,
        entries=entries,
        prunings=[("", plan, scores)],
        trainings=_training(folder / "history.json", learns),
        tables=listed,
        comparison=comparison,
        notes=tables.training_notes(results, on_data, str(recover.get("loss"))),
    )


def _walk_tables(folder: Path) -> Iterator[Table]:
    """Make tables of the errors of each matrix and layer before and after repair."""
    path = folder / "walk.json"
    report = read_object(path, "report:") if path.is_file() else {"layers": []}
    refits, distilled = [], []
    for layer in report["layers"]:
        for name, row in layer["refits"].items():
            errors = [f"{row[of]:.2%}" for of in ("sliced", "repaired")]
            refits.append([f"{layer['index']}.{name}", *errors])
        if layer["distilled"] is not None:
            errors = [f"{error:.2%}" for error in layer["distilled"]]
            distilled.append([str(layer["index"]), *errors])
    if refits:
        note = "; ".join(report.get("notes", ()))
        yield Table(rows=refits, note=note, **_TABLES["refits"])
    if distilled:
        yield Table(rows=distilled, **_TABLES["distilled"])


def _read_study(folder: Path, known: Mapping[str, Task]) -> Record:
    from slimvlm_tools.claims import claims_of

    config = read_object(folder / "study.json", "report:")
    with raised_as(ConfigError, (OSError, ValueError), f"report {str(folder)!r}: cannot be read"):
        table = pd.read_parquet(folder / TABLE)
    done = table[table["status"] == DONE]
    cells, wanted = (rows[rows["axis"] != ORIGINAL] for rows in (done, table))
    of_axis = cells.astype(str).groupby("axis")
    varied = [name for name in _OPTIONS if (of_axis[name].nunique() > 1).any()]
    entries = {
        index: _entry(row, _name(row, varied), varied, f"cell-{index}")
        for index, row in done.iterrows()
    }
    measured, prunings = list(entries.values()), []
    for _, row in [] if cells.empty else cells.drop_duplicates("plan").iterrows():
        scores = [Scores.load(_inside(folder, name)) for name in str(row["scores"]).split()]
        removed = f"{row['axis']} {100 * row['ratio']:.6g}%"
        title = f"{Path(row.model).name} {removed}, {row['criterion']}"
        prunings.append((title, Plan.load(_inside(folder, row["plan"])), scores))
    trainings = []
    for index, row in cells.iterrows():
        if not pd.isna(row["history"]):
            trainings += _training(_inside(folder, row["history"]), entries[index].name)
    failed = int((wanted["status"] == FAILED).sum())
    words = f"{failed} failed, {len(wanted) - len(cells) - failed} open"
    cards = [("Cells", str(len(cells)), words)]
    rated = cells.dropna(subset=["avg_percent"])  # none where the original has nothing right
    for ratio in sorted(rated["ratio"].unique())[:5]:
        entry = entries[rated[rated["ratio"] == ratio]["avg_percent"].idxmax()]
        how = f"{entry.axis}, {entry.recovery if entry.train else 'untrained'}"
        cards.append((f"Best at {100 * ratio:.6g}% (AVG-%)", f"{entry.percent:.1f}", how))
    comparison, notes = None, []
    if not rated.empty:
        nearest = min(rated["ratio"].unique(), key=lambda each: abs(each - SHOWN_RATIO))
        best = rated[rated["ratio"] == nearest]["avg_percent"].idxmax()
        shown, notes = cells.loc[best], [f"Answers are those of: {entries[best].name}."]
        originals = table[(table["axis"] == ORIGINAL) & (table["model"] == shown["model"])]
        original = Result.load(_inside(folder, shown.get("original", originals.iloc[0]["result"])))
        comparison = compare(original, Result.load(_inside(folder, shown["result"])), known)
    extra = list(dict.fromkeys(name for entry in measured for name in entry.columns))
    header = ["model", "removed", "AVG", "AVG-% [95 % interval]", *extra]
    header += ["the study", "parameters", "prefill ms", "decode ms"]
    rows = []
    for entry in measured:
        there = []
        if not entry.is_original and entry.fraction == 1:
            there = expected(entry.axis, entry.train, entry.loss, entry.ratio, False)
        low, high = entry.low, entry.high
        mark = tables.MARK * (low is not None and high is not None and not low <= 100 <= high)
        rows.append([entry.name, f"{entry.ratio:.1%}", f"{entry.average:.1f}"])
        rows[-1] += [entry.interval + mark, *(entry.columns.get(name, "") for name in extra)]
        rows[-1] += [" / ".join(f"{value:.1f}" for _, value in there)]
        rows[-1] += [f"{entry.total_params / 1e6:.1f} M"]
        rows[-1] += [f"{entry.prefill_ms:.1f}", f"{entry.decode_ms:.1f}"]
    links = [entry.link for entry in measured]
    listed = [Table(header=header, rows=rows, ids=links, **_TABLES["cells"])]
    claims = [claim for claim in claims_of(table) if claim.verdict != "not measured"]
    if claims:
        rows = [[claim.name, claim.statement, claim.verdict] for claim in claims]
        numbers = [[claim.name, line] for claim in claims for line in claim.numbers]
        listed.append(Table(rows=rows, **_TABLES["claims"]))
        listed.append(Table(rows=numbers, **_TABLES["numbers"]))
    names = [name for name in done.columns if name.startswith("score:")]
    rows = [
        [entry.name, *("" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in names)]
        for entry, (_, row) in zip(measured, done.iterrows(), strict=True)
    ]
    header = ["model", *(name.removeprefix("score:") for name in names)]
    listed.append(Table(header=header, rows=rows, **_TABLES["scores"]))
    broken = table[table["status"] == FAILED]
    if len(broken):
        rows = [[_name(row), str(row["failed"])] for _, row in broken.iterrows()]
        listed.append(Table(rows=rows, **_TABLES["failed"]))
    models = ", ".join(Path(model).name for model in table["model"].unique())
    axes = " and ".join(wanted["axis"].unique())
    return Record(
        title=f"Study of {models}",
        lead=f"{len(cells)} of {len(wanted)} cells measured, along {axes}.",
        cards=cards,
        command=shlex.join(["slimvlm", "study", str(folder / STUDY), "--out", str(folder)]),
        config=config,
        entries=measured,
        prunings=prunings,
        trainings=trainings,
        tables=listed,
        comparison=comparison,
        notes=notes,
    )


def _name(row: pd.Series, varied: Sequence[str] = ()) -> str:
    short = Path(str(row["model"])).name
    if row["axis"] == ORIGINAL:
        return f"{short} original"
    trained = "untrained" if row["train"] == "none" else str(row["recovery"])
    options = [f"{name} {row[name]}" for name in varied if row[name] != ""]
    return ", ".join([f"{short} {row['axis']} {100 * row['ratio']:.6g}%", trained, *options])


def _entry(
    row: Mapping[str, Any] | pd.Series, name: str, varied: Sequence[str] = (), link: str = ""
) -> Entry:
    """Make an entry from a row of a study's table or one with the same columns."""
    original = row["axis"] == ORIGINAL
    ends = ("", "_low", "_high")
    percent, low, high = (_number(row.get(f"avg_percent{end}")) for end in ends)
    columns = {option: "" if original else str(row[option]) for option in varied}
    columns["above floor"] = _with_interval(*(_number(row.get(f"above_floor{e}")) for e in ends))
    for kind in KINDS:
        value, *bounds, floor = (_number(row.get(f"{kind}_{name}")) for name in OF_A_KIND)
        if value is not None:
            columns[f"AVG-% {kind}"] = f"{_with_interval(value, *bounds)}, floor {floor:.1f}"
    reference = _number(row.get("reference"))
    if reference is not None:
        columns["reference"] = f"{reference:.1f} ({row['reference_source']})"
    options = [f"{each} {row[each]}" for each in varied if each != "seed" and row[each] != ""]
    train = None if original or row["train"] == "none" else str(row["train"])
    if train not in (None, "projector", "lora", "full"):
        raise ConfigError(f"train {shortened(train)} must be one of: none, projector, lora, full")
    return Entry(
        name=name,
        axis="" if original else str(row["axis"]),
        ratio=float(row["achieved_ratio"]),
        recovery="" if original else str(row["recovery"]),
        average=float(row["avg"]),
        percent=percent,
        low=low,
        high=high,
        total_params=int(row["total_params"]),
        prefill_ms=float(row["prefill_ms"]),
        decode_ms=float(row["decode_ms"]),
        train=train,
        loss="" if train is None else str(row["loss"]),
        model=str(row.get("model", "")),
        fraction=float(row.get("fraction", 1.0)),
        variant="" if original else ", ".join(options),
        link=link,
        columns=columns,
    )


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{Estimate(value, low, high):.1f}"


def _training(path: Path, title: str) -> list[tuple[str, str, Sequence[Mapping[str, float]]]]:
    if not path.is_file():
        return []
    history = History.load(path)
    about = (
        f"{history.num_samples} conversations; {history.trained_params / 1e6:.1f} M parameters "
        f"learned; teacher: {history.teacher}"
    )
    return [(title, about, history.steps)]


def _inside(folder: Path, name: Any) -> Path:
    """Find a file that a table names; refuse one outside of the folder."""
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        told = f"{TABLE} names {shortened(str(name))}, which is outside of it"
        raise ConfigError(f"report {str(folder)!r}: {told}")
    return path
