"""Pages show the numbers of the files; they are safe, offline, well formed and below five MB."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise, product
from xml.etree import ElementTree

import pandas as pd
import pytest
from PIL import Image

from slimvlm.core.errors import ConfigError
from slimvlm.evaluation.compare import compare
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import anatomy
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.runs.report import MAX_CARDS, comparison_html, read_record, report_html
from slimvlm.runs.report.charts import (
    allocation,
    by_ratio,
    loss_curves,
    score_maps,
    trade_offs,
)
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.evaluation.test_compare import TEXT, answered, graded, questions, task_of, two
from tests.evaluation.test_compare import result as compared_result
from tests.handmade import random_scores
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
TASKS = ("name", "count")


def result(name, right, reply="cat"):
    """A result with so many of ten questions right in each task."""
    scores = (1.0,) * right + (0.0,) * (10 - right)
    ids = tuple(map(str, range(10)))
    task = TaskResult("exact_match", 10 * right, 0.0, True, ids, (reply,) * 10, scores)
    tasks = dict.fromkeys(TASKS, task)
    return Result(name, 2_000_000, 1_000_000, tasks, prefill_ms=4.0, decode_ms=2.0)


@pytest.fixture(scope="module")
def shape():
    return anatomy(tiny.llama())


@pytest.fixture
def run(tmp_path, shape):
    write_run(tmp_path / "run", shape)
    return tmp_path / "run"


def write_run(folder, shape, axis="width", model="tiny"):
    """The files that `compress` leaves behind."""
    scores = random_scores(shape)
    plan = make_plan(shape, scores, ratio=0.3, axis=axis, round_to=1)
    recover = {"train": "lora", "loss": "sft+hidden"}
    config = {"model": model, "ratio": 0.3, "axis": axis, "tasks": "name", "recover": recover}
    config |= {"data": "d.json"}
    steps = [{"step": i, "loss": 2 / i, "loss_sft": 1 / i, "loss_hidden": 1 / i} for i in (1, 2, 4)]
    history = {"steps": steps, "num_samples": 7, "trained_params": 5}
    history |= {"sample_ids": [], "teacher": "separate"}
    (folder / "scores").mkdir(parents=True)
    (folder / "results").mkdir()
    plan.save(folder / "plan.json")
    scores.save(folder / "scores" / scores.criterion)
    for name, right in (("original", 10), ("pruned", 4), ("recovered", 8)):
        result(name, right).save(folder / "results" / f"{name}.json")
    (folder / "run.yaml").write_text(json.dumps(config))
    (folder / "history.json").write_text(json.dumps(history))
    return plan


@pytest.fixture
def study(tmp_path, shape):
    return write_study(tmp_path / "study", shape)


def write_study(folder, shape):
    """The files that a study leaves behind: two axes at two ratios, with and without training."""
    folder.mkdir()
    original = {
        **dict.fromkeys(("criterion", "allocation", "repair", "train", "loss", "plan", "scores")),
        "options": None,
        **{"model": "tiny", "axis": "original", "ratio": 0.0, "recovery": "original"},
        **{"fraction": 1.0, "seed": 0, "achieved_ratio": 0.0, "status": "done", "failed": None},
        **{"avg": 100.0, "avg_percent": 100.0, "result": "original.json", "history": None},
    }
    costs = {"total_params": 200, "backbone_params": 100, "prefill_ms": 2.0, "decode_ms": 1.0}
    rows = [{**original, **costs}]
    result("original", 10).save(folder / "original.json")
    for axis, ratio, train in product(("depth", "width"), (0.3, 0.6), ("none", "lora")):
        name = f"{axis}-{ratio}-{train}"
        run = folder / name
        plan = write_run(run, shape, axis)
        right = 9 if train == "lora" else 3
        result(name, right).save(run / "result.json")
        kept = result(name, right).retention(result("original", 10))
        row = {**rows[0], "axis": axis, "ratio": ratio, "achieved_ratio": plan.ratio}
        row |= {"recovery": "tuned" if train == "lora" else "none", "train": train}
        row |= {"loss": "sft+hidden" if train == "lora" else "none", "criterion": f"by-{axis}"}
        row |= {"allocation": "uniform", "repair": "none", "options": "", "avg": 10.0 * right}
        row |= {"avg_percent": kept.percent, "avg_percent_low": kept.low}
        row |= {"avg_percent_high": kept.high, "score:name": 10.0 * right}
        row |= {"avg_free": 10.0 * right, "avg_choice": 10.0, "avg_pictures": 1.0, "avg_text": 1.0}
        row |= {"plan": f"{name}/plan.json", "scores": f"{name}/scores/by-hand"}
        row |= {"result": f"{name}/result.json"}
        row |= {"history": f"{name}/history.json" if train == "lora" else None}
        rows.append(row)
    rows.append({**rows[-1], "seed": 1, "status": "failed", "failed": f"recover: {EVIL}"})
    pd.DataFrame(rows).to_parquet(folder / "results.parquet", index=False)
    (folder / "study.json").write_text(json.dumps({"tasks": "name", "grids": []}))
    return folder


def test_a_study_names_files_of_its_own_alone(study):
    table = pd.read_parquet(study / "results.parquet")
    shutil.copytree(study, study.parent / "other")
    for column in ("plan", "scores", "result", "history"):
        elsewhere = ("../other/" + table[column]).where(table[column].notna(), None)
        table.assign(**{column: elsewhere}).to_parquet(study / "results.parquet", index=False)
        with pytest.raises(ConfigError, match=r"results\.parquet names .*outside of it"):
            read_record(study)


def test_a_study_shows_every_cell(study):
    table = pd.read_parquet(study / "results.parquet")
    record = read_record(study)
    done = table[table["status"] == "done"]
    assert list(record.entries["avg_percent"]) == list(done["avg_percent"])
    cells = next(t for t in record.tables if t.caption == "All cells")
    assert len(cells.rows) == len(done) == 9
    assert all(len(row) == len(cells.header) for row in cells.rows)
    assert not {"AVG-% chosen", "AVG-% free"} & {*cells.header}  # of an earlier version
    published_for = {row[0]: row[cells.header.index("published")] for row in cells.rows}
    bunny = float(published_for["tiny width 30%, untrained"].rpartition("/")[2])
    assert bunny == pytest.approx(75.58, abs=1)
    assert published_for["tiny original"] == ""
    assert len(record.prunings) == 8
    assert len(record.trainings) == 4
    assert record.comparison is not None
    assert record.comparison.params_b == 2_000_000
    assert "8 of 9 cells" in record.lead
    assert record.cards[0] == ("Cells", "8", "1 failed, 0 open")
    html = report_html(record)
    assert "Failed cells" in html
    assert not re.search(r"<[^>]*onerror", html)
    assert_sound(html)
    assert html.count('<img src="data:image/svg+xml;base64,') > 30


def dotted(chart):
    """The lines of the papers' means, or the frontier."""
    return [line for line in chart.axes.lines if line.get_linestyle() == ":"]


def marks(chart):
    """Where the models of each legend entry are."""
    found = chart.axes.containers
    return {each.get_label(): [*map(tuple, each.lines[0].get_xydata())] for each in found}


def test_a_study_has_a_chart_for_each_recovery_with_the_published_means(study):
    entries = read_record(study).entries
    charts = by_ratio(entries)
    assert [c.title.rpartition(": ")[2] for c in charts] == ["untrained", "tuned"]
    assert [len(dotted(chart)) for chart in charts] == [2, 2]
    assert list(marks(charts[0])) == ["depth, not trained", "width, not trained"]
    drawn = sorted(
        point for chart in charts for points in marks(chart).values() for point in points
    )
    cells = entries[entries["axis"] != "original"]
    assert drawn == sorted(zip(100 * cells["achieved_ratio"], cells["avg_percent"], strict=True))
    table = pd.read_parquet(study / "results.parquet")
    table.loc[table["axis"] != "original", "status"] = "open"
    columns = ["plan", "scores", "history", "avg_percent_low", "avg_percent_high"]
    for absent in ([], columns):  # columns that only a finished cell fills
        table.drop(columns=absent).to_parquet(study / "results.parquet", index=False)
        html = report_html(read_record(study))
        assert "0 of 9 cells" in html
        assert "Answers side by side" not in html


def test_a_study_shows_what_is_kept_of_each_kind_or_that_the_original_has_nothing_right(study):
    table = pd.read_parquet(study / "results.parquet")
    numbers = {"free_percent": 61.0, "free_low": 58.25, "free_high": 64.5, "free_floor": 9.75}
    table.assign(**numbers, chosen_percent=None).to_parquet(study / "results.parquet", index=False)
    cells = next(t for t in read_record(study).tables if t.caption == "All cells")
    place = cells.header.index("AVG-% free")
    assert {row[place] for row in cells.rows} == {"61.0 [58.2, 64.5], floor 9.8"}
    assert "AVG-% chosen" not in cells.header
    table.loc[table["axis"] != "original", "avg_percent"] = float("nan")
    table.to_parquet(study / "results.parquet", index=False)
    record = read_record(study)
    assert "8 of 9 cells measured" in record.lead
    assert ([label for label, *_ in record.cards], record.comparison) == (["Cells"], None)


def test_cells_are_told_apart_by_original_ratio_share_of_the_data_and_options(study):
    table = pd.read_parquet(study / "results.parquet")
    less = table[table["recovery"] == "tuned"].assign(fraction=0.05, avg_percent=1.0)
    both = pd.concat([table, less], ignore_index=True)
    both = both.assign(original="second.json", ratio=both["ratio"] + 0.004)
    both.to_parquet(study / "results.parquet", index=False)
    result("second", 10).save(study / "second.json")
    record = read_record(study)
    assert record.comparison.name_a == "second"
    assert record.entries["name"].iloc[1].startswith("tiny depth 30.4%, ")
    titles = [chart.title.rpartition("ratio: ")[2] for chart in by_ratio(record.entries)]
    full, part = "fraction 1.0", "fraction 0.05"
    assert titles == [f"untrained, {full}", f"tuned, {full}", f"tuned, {part}"]
    assert not dotted(by_ratio(record.entries)[-1])
    cells = next(t for t in record.tables if t.caption == "All cells")
    columns = record.entries["recovery"], record.entries["fraction"], cells.rows
    shown = {(way, part): row for way, part, row in zip(*columns, strict=True)}
    assert shown["tuned", 0.05][cells.header.index("published")] == ""
    assert shown["tuned", 1.0][cells.header.index("published")] != ""


class Page(HTMLParser):
    """The start tags of a page, and what they hold."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)
        self.tags = {tag for tag, _ in self.found}
        self.levels = [int(tag[1]) for tag, _ in self.found if re.fullmatch("h[1-6]", tag)]
        self.ids, self.links, self.labelled = map(self.values, ("id", "href", "aria-labelledby"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def values(self, name):
        return [values[name] or "" for _, values in self.found if values.get(name)]


def assert_offline(html):
    assert not re.search(r"https?://|@import|url\(|<link|src=\"(?!data:)", html)
    assert "default-src 'none'" in html


def assert_sound(html):
    """Ids are unique, links lead to them, and no heading level is left out."""
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert set(page.labelled) <= set(page.ids)
    assert all(b - a <= 1 for a, b in pairwise(page.levels))
    return page


def test_the_report_shows_the_numbers_of_the_files_and_refuses_broken_ones(run):
    plan, record = Plan.load(run / "plan.json"), read_record(run)
    kept = record.entries.set_index("name")
    assert list(kept["avg_percent"]) == pytest.approx([100, 40, 80])
    expected = result("r", 8).retention(result("o", 10))
    bounds = kept.loc["recovered", ["avg_percent_low", "avg_percent_high"]]
    assert list(bounds) == [expected.low, expected.high]
    assert list(kept["train"]) == ["none", "none", "lora"]
    assert kept["achieved_ratio"]["recovered"] == plan.ratio
    words = f"95 % interval {expected.low:.1f} to {expected.high:.1f}, floor 0.0"
    assert record.cards[1] == ("Retained of free answers", "80.0", words)
    assert not any("chosen" in label for label, *_ in record.cards)
    html = report_html(record)
    assert report_html(read_record(run)) == html  # the same every time
    text = unescape(re.sub(r"<[^>]+>", " ", html))
    kept_text = f"80.0 [{expected.low:.1f}, {expected.high:.1f}]"
    for needed in (kept_text, f"{plan.ratio:.1%}", "7 samples"):
        assert needed in text
    page = assert_sound(html)
    assert page.levels[0] == 1
    assert page.levels.count(1) == 1
    with pytest.raises(ConfigError, match="neither a run folder"):
        read_record(run.parent)
    (run / "history.json").write_text("{")
    with pytest.raises(ConfigError, match=r"history\.json"):
        read_record(run)


@pytest.mark.parametrize(
    "missing",
    tiered(["scores", "results", "history.json"], lambda name: name == "results"),
)
def test_an_unfinished_run_has_a_report_too(run, missing):
    (run / missing).rename(run.parent / "gone")
    html = report_html(read_record(run))
    assert "Configuration" in html
    assert ("Answers side by side" in html) is (missing != "results")
    assert ('id="training"' in html) is (missing != "history.json")
    for path in (run / "results").glob("*.json"):  # a run of losses has no answers to compare
        found = Result.load(path)
        loss = replace(found.tasks["name"], metric="perplexity", score=2.718, in_average=False)
        replace(found, tasks={"text_ppl": loss}).save(path)
    assert read_record(run).comparison is None


def test_words_of_models_files_and_data_are_escaped_and_nothing_is_loaded(tmp_path, shape):
    folder = tmp_path / "run"
    write_run(folder, shape, model=EVIL.replace("/", "\\"))
    result(EVIL, 3, reply=EVIL).save(folder / "results" / "recovered.json")
    html = report_html(read_record(folder))
    assert EVIL in unescape(html)
    assert_offline(html)
    asked = [
        replace(q, id=q.id + EVIL, prompt=EVIL, answers=("cat", EVIL)) for q in questions("pets", 2)
    ]
    a = compared_result(EVIL, **{EVIL: answered(asked, "11")})
    b = compared_result(EVIL, **{EVIL: answered(asked, ["dog", EVIL + " no"])})
    found = compare(a, b, {EVIL: task_of(EVIL, asked)})
    compared = comparison_html(replace(found, left_out={EVIL: EVIL}), EVIL)
    assert "<img" not in compared
    assert compared.count(EVIL) == 0
    assert EVIL + " no" in unescape(compared)
    for each in (html, compared):
        assert len(re.findall("<script", each)) == 1  # our own
        assert not re.search(r"<[^>]*onerror", each)


def heights(chart):
    """What each layer keeps of its MLP, attention, other weights, and all before pruning."""
    return [[1e6 * bar.get_height() for bar in bars] for bars in chart.axes.containers]


def num_crosses(chart):
    return sum(len(line.get_xdata()) for line in chart.axes.lines if line.get_marker() == "x")


def test_bars_are_as_high_as_what_is_kept_and_crosses_are_what_is_gone(shape, tmp_path):
    plan = make_plan(shape, random_scores(shape), ratio=0.3, axis="both", round_to=1)
    (chart,) = allocation(plan)
    mlp, attention, _, wholes = heights(chart)
    assert wholes == pytest.approx([layer.params for layer in shape.layers])
    for index, layer in enumerate(shape.layers):
        assert mlp[index] == pytest.approx(len(plan.neurons[index]) * layer.neuron_params)
        kept = len(plan.kv_groups[index]) * layer.kv_group_params
        assert attention[index] == pytest.approx(kept)
    assert num_crosses(chart) == shape.num_layers - len(plan.layers)
    for axis in ("depth", "width"):
        plan = write_run(tmp_path / axis, shape, axis)
        _, _, scores = read_record(tmp_path / axis).prunings[0]
        layers, groups, neurons = score_maps(plan, scores)
        assert num_crosses(layers) == shape.num_layers - len(plan.layers)
        lost = sum(s.num_kv_heads for s in shape.layers) - sum(map(len, plan.kv_groups))
        assert num_crosses(groups) == lost
        ranks = groups.axes.images[0].get_array()
        ours = pd.DataFrame([each.tolist() for each in scores[0].kv_group]).T
        assert (
            pd.Series(ranks.data.ravel()).rank() == pd.Series(ours.to_numpy().ravel()).rank()
        ).all()
        rows = neurons.axes.images[0].get_array().shape[0]
        (lines,) = neurons.axes.collections
        ends = [(path.vertices[0, 1] + 0.5) / rows for path in lines.get_paths()]
        sizes = zip(plan.neurons, shape.layers, strict=True)
        assert ends == pytest.approx([len(n) / s.intermediate_size for n, s in sizes])
    shape = read_anatomy(tiny.build("llama4"))
    *parts, whole = heights(allocation(Plan.everything(shape))[0])
    assert list(map(sum, zip(*parts, strict=True))) == pytest.approx(whole)
    scores = random_scores(shape)
    plan = make_plan(shape, scores, 0.0, experts=0.5)
    layer, kept = shape.layers[1], plan.shapes[1]
    expected = kept.intermediate_size * kept.neuron_params + 2 * layer.expert_fixed_params
    assert heights(allocation(plan)[0])[0][1] == pytest.approx(expected)
    (chart,) = score_maps(plan, [Scores("obs", neuron=scores.neuron)])
    (lines,) = chart.axes.collections
    assert len(lines.get_paths()) == sum(map(bool, map(len, scores.neuron or ())))
    (chart,) = score_maps(plan, [Scores("reap", expert=scores.expert)])
    assert num_crosses(chart) == 4
    assert chart.axes.images[0].get_array().count() == 8


def test_trade_offs_need_two_models_and_loss_curves_a_chart_for_each_component(run):
    entries = read_record(run).entries
    assert trade_offs(entries[:1]) == []
    charts = trade_offs(entries)
    names = ["original", "width, not trained", "width, LoRA trained"]
    assert [list(marks(chart)) for chart in charts] == [names] * 3
    assert [points[0][1] for points in marks(charts[0]).values()] == pytest.approx([100, 40, 80])
    steps = [{"step": i, "loss": 3.0 - i, "loss_sft": 1.0, "grad_norm": 9.0} for i in (0, 1, 2)]
    charts = loss_curves(steps)
    assert [chart.title for chart in charts] == ["Sum of the losses", "sft"]
    assert [*charts[0].axes.lines[0].get_ydata()] == [3, 2, 1]
    assert loss_curves(steps[:1]) == []
    history = json.loads((run / "history.json").read_text())
    history["steps"] = history["steps"][:1]
    (run / "history.json").write_text(json.dumps(history))
    assert "too short for a curve" in report_html(read_record(run))


def test_nothing_beats_the_frontier(run):
    one, points = read_record(run).entries.iloc[1], [(3, 9), (1, 5), (2, 5), (1, 4), (4, 9), (2, 7)]
    rows = [one.to_dict() | {"prefill_ms": x, "avg_percent": y} for x, y in points]
    _, chart, _ = trade_offs(pd.DataFrame(rows))
    assert dotted(chart)[0].get_xydata().tolist() == [[1, 5], [2, 7], [3, 9]]


def test_labels_of_drawings_are_plain_text(run):
    """A name is data from outside: no formula, no markup, no character that XML cannot hold."""
    entries = read_record(run).entries.iloc[1:]
    for name in (EVIL, r"$\frac{$ $", "bell \a and 猫", "</svg><script>"):
        uri = trade_offs(entries.assign(axis=name))[0].uri
        svg = base64.b64decode(uri.partition(",")[2]).decode()
        assert unescape(svg).count(name.replace("\a", "\\x07")) >= 2
        for element in ElementTree.fromstring(svg).iter():
            assert "script" not in element.tag
            assert not any(name.startswith("on") for name in element.attrib)


def page(found):
    return comparison_html(found, "t")


def cards(html):
    return re.findall(r"<article.*?</article>", html, flags=re.DOTALL)


def test_every_lost_and_gained_question_has_a_card():
    a, b = "1" * 100 + "0" * 100, "0" * 100 + "1" * 100
    found, asked = two(a, b)
    html = page(found)
    assert "200 questions, 200 flips" in html
    shown = cards(html)
    assert len(shown) == 200
    for question, kind in zip(asked, ["lost"] * 100 + ["gained"] * 100, strict=True):
        (ours,) = (card for card in shown if f">{question.id}<" in card)
        assert f'data-kind="{kind}"' in ours
        assert question.prompt in ours
    same = (("1", "both right"), ("0", "both wrong"))
    for digit, unchanged in same:
        html = page(two(digit * 100, digit * 100)[0])
        assert len(cards(html)) == MAX_CARDS[unchanged]
        assert f"{100 - MAX_CARDS[unchanged]} more {unchanged} are not shown." in html


def test_notes_are_shown():
    found, asked = two("11", "10", size=(64, 64))
    a, b = (
        compared_result(n, pets=answered(asked, right), text=TEXT)
        for n, right in (("a", "11"), ("b", "10"))
    )
    html = page(compare(a, b, {}))
    for note in ("text is not compared: perplexity 12.00", "is not known here"):
        assert note in html
    assert ">pets-1<" in html
    assert "<img" not in html
    assert "<img" in page(found)
    assert_offline(page(found))
    assert "counts as right from 50" in page(graded())
    assert "50&thinsp;%" in page(graded())


@pytest.mark.parametrize(("size", "stored", "shown", "enlarged"), TABLES["pictures"])
def test_pictures_fit_and_small_ones_are_exact(size, stored, shown, enlarged):
    size, stored, shown = map(tuple, (size, stored, shown))
    compared, asked = two("1", "0", size=size)
    html = page(compared)
    pattern = r'<img src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)"'
    found = re.search(pattern, html)
    assert found is not None
    image = Image.open(BytesIO(base64.b64decode(found[1])))
    assert image.format == "PNG"
    assert image.size == stored
    assert (int(found[2]), int(found[3])) == shown
    assert ('class="pixel"' in html) is enlarged
    if enlarged:
        assert image.convert("RGB").tobytes() == asked[0].images[0].tobytes()


def test_a_page_stays_below_five_megabytes_and_every_task_gets_pictures():
    """Noise does not compress: pictures go, those of lost answers last; words stay."""
    html = page(two("0" * 300 + "1" * 300, "1" * 300 + "0" * 300, size=(64, 64))[0])
    assert 4_000_000 < len(html.encode()) < 5_000_000
    shown = cards(html)
    assert len(shown) == 600
    bare = [card for card in shown if "<img" not in card]
    assert f"Images of {len(bare)} answers are left out" in html
    with_picture = [card for card in shown if "<img" in card]
    assert {'data-kind="lost"' in card for card in with_picture[:200]} == {True}
    asked = {name: questions(name, 300, (64, 64)) for name in ("one", "two")}
    a, b = (
        compared_result(right, **{name: answered(q, right * 300) for name, q in asked.items()})
        for right in "10"
    )
    found = compare(a, b, {name: task_of(name, q) for name, q in asked.items()})
    shown = [card for card in cards(page(found)) if "<img" in card]
    ours = sum(">one-" in card for card in shown)
    assert 0 <= 2 * ours - len(shown) <= 1
