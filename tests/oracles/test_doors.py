"""One request through every door gives one result, and no option is ignored without a word.

The doors: Python, a file, flags, `prune`, a cell of a study, and a run that goes down and goes on.
Nothing here knows how options are handed on: plans, weights and figures are compared.
"""

import json
import shutil
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, fields
from io import StringIO
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import CompressConfig, PruneConfig, RecoverConfig, file_only
from slimvlm.core.progress import silent
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as compression
from slimvlm.runs import stages
from slimvlm.runs.study import run_study
from tests import tiny_folder as folders
from tests.handmade import Stopped, tensors_of
from tests.tables import tables

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")
MODEL = str(folders.folder("text"))
LORA = {"train": "lora", "loss": "sft+hidden", "max_steps": 2, "batch_size": 2, "lora_rank": 4}
LORA |= {"learning_rate": 5e-3, "bf16": False}

NO_RESULT = TABLES["no_result"]
"""Options that change no result, and what they are for."""
OTHERWISE: dict[str, tuple[dict[str, Any], Any]] = TABLES["otherwise"]
"""Another value of every other option, and what has to be asked beside it so that it can act."""
LEARNT: dict[str, tuple[dict[str, Any], Any]] = TABLES["learnt"]
"""The same of every option of training."""
REFUSED = {"experts", "image_tokens", "task_folder", "tower_ratio"}
REFUSED |= {"seed in training", "keep_adapter in training"}
"""Of these, those that a text model without experts, or a run, cannot have."""


def row(number):
    """A conversation that no other one equals."""
    asked = {"from": "human", "value": f"Count to {number} squares:"}
    said = " and ".join(WORDS[: 2 + number % 7]) + f" or {number}"
    return {"id": f"r{number}", "conversations": [asked, {"from": "gpt", "value": said}]}


WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by the words that stand for them in requests."""
    home = tmp_path_factory.mktemp("files")
    found = {name: home / name for name in ("other", "words", "baseline", "mine")}
    for name, first in (("data", 0), ("other", 12)):
        found[name] = home / f"{name}.json"
        found[name].write_text(json.dumps([row(first + i) for i in range(24)]))
    found["words"].write_text("Which colour is the left part? It is red.")
    by_python(usual(found, recover="none"), home / "run")
    values = json.loads((home / "run" / "results" / "original.json").read_text())
    values["tasks"]["text_odd"]["replies"][0] += " indeed"
    found["baseline"].write_text(json.dumps(values))
    return found


def usual(files, **changes):
    """A request that is quickly done, in which every stage has something to do."""
    values = {
        **{"ratio": 0.4, "axis": "width", "data": "data", "samples": 8, "allocation": "uniform"},
        **{"local_steps": 0, "test_samples": 2, "training_samples": 6, "round_to": 8},
        **{"tasks": "text_odd,text_ppl", "limit": 2, "recover": LORA, **changes},
    }
    if values["recover"] == "none" and "training_samples" not in changes:
        del values["training_samples"]
    named = {n: str(files.get(v, v)) if isinstance(v, str) else v for n, v in values.items()}
    return {name: value for name, value in named.items() if value is not None}


# Doors: each does a request in ``out``, or raises a SlimError.


def by_python(options, out):
    sv.compress(MODEL, out=out, say=silent, **options)


def typed(*words):
    with redirect_stderr(StringIO()) as said:
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            raise (ConfigError if end.code == 2 else RuntimeError)(said.getvalue()) from None


def written(out, values):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def by_file(options, out):
    typed("compress", "--config", written(out, {"model": MODEL, **options}), "--out", out)


def flags(options):
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] if value is not False else []
        if not isinstance(value, bool):
            words += value if isinstance(value, list) else [value]
    return words


def by_flags(options, out):
    """Whatever has no flag stands in a file."""
    recover = options.get("recover", {})
    learning = {"train": "none"} if recover == "none" else recover
    hidden = {n: v for n, v in options.items() if n in file_only(CompressConfig)}
    of_recover = {n: v for n, v in learning.items() if n in file_only(RecoverConfig)}
    of_recover |= {n: v for n, v in learning.items() if n == "paper_exact"}
    shown = {n: v for n, v in options.items() if n not in (*hidden, "recover", "batch_size")}
    shown |= {n: v for n, v in learning.items() if n not in of_recover}
    if "batch_size" in options:
        shown["task_batch_size"] = options["batch_size"]
    asked = {"model": MODEL, **hidden} | ({"recover": of_recover} if of_recover else {})
    typed("compress", "--config", written(out, asked), *flags(shown), "--out", out)


def after_a_stop(at):
    """Go down before or after a stage, and go on."""

    def door(options, out):
        name, is_done = at
        home = stages if hasattr(stages, name) else compression
        honest = getattr(home, name)

        def stops(*args, **kwargs):
            if is_done:
                honest(*args, **kwargs)
            raise Stopped

        with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
            patch.setattr(home, name, stops)
            by_python(options, out)
        if not (out / "summary.md").exists():
            by_python(options, out)

    return door


def by_prune(options, out):
    """Without training and tasks, which `prune` does not have."""
    asked = {n: v for n, v in options.items() if n in OF_PRUNING}
    typed("prune", MODEL, *flags(asked), "--out", out / "checkpoint")
    shutil.copy(out / "checkpoint" / "slimvlm_plan.json", out / "plan.json")
    with suppress(FileNotFoundError):
        (out / "results").mkdir()
        held_out = out / "checkpoint" / "slimvlm_held_out.json"
        shutil.copy(held_out, out / "results" / "data-pruned.json")


OF_PRUNING = {row.name for row in fields(PruneConfig)} | {"test_samples"}
OF_GRID = ("ratio", "axis", "allocation", "repair", "seed", "tower_ratio")


def by_study(options, out):
    """One cell, which says what a chart or held-out samples decide for `compress`."""
    recover, last = options["recover"], "pruned" if options["recover"] == "none" else "recovered"
    grid = {n: v for n, v in options.items() if n in OF_GRID} | {"model": MODEL}
    if "criterion" in options:
        grid["criterion"] = "+".join(options["criterion"])
    shared = ("data", "tasks", "limit", "batch_size", "training_samples")
    study = {n: v for n, v in options.items() if n in shared} | {"floors": False}
    if recover != "none":
        grid |= {"recovery": "one"} | {n: v for n, v in recover.items() if n == "fraction"}
        study["recoveries"] = {"one": {n: v for n, v in recover.items() if n != "fraction"}}
    beside = OF_PRUNING - {*grid, *study, "test_samples"}
    prune = {n: v for n, v in options.items() if n in beside}
    study |= {"grids": [grid], "prune": prune, "keep_checkpoints": True}
    (row,) = run_study(written(out, study), out)[1:].to_dict("records")
    assert row["failed"] is None, row["failed"]
    (made,) = (out / "cache" / ("prune" if recover == "none" else "recover")).iterdir()
    shutil.copytree(made / "checkpoint", out / "checkpoint")
    shutil.copy(out / row["plan"], out / "plan.json")
    (out / "results").mkdir()
    shutil.copy(out / row["result"], out / "results" / f"{last}.json")


def doors_of(options, at):
    """The doors beside Python that can ask for a request, by name."""
    recover, found = options.get("recover", {}), {"file": by_file, "flags": by_flags}
    found["stop"] = after_a_stop(at)
    if recover == "none" and not {"target_latency", "image_tokens"} & options.keys():
        found["prune"] = by_prune
    others = {"target_latency", "image_tokens", "device", "baseline", "floors"}
    says = recover == "none" or {"train", "loss"} <= recover.keys()
    is_plain = says and options.get("test_samples") == 0 and not others & options.keys()
    is_plain &= not (recover == "none" and "training_samples" in options)
    if is_plain and options["axis"] in ("depth", "width", "both"):
        found["study"] = by_study
    return found


def result(door, options, out):
    """Plan, weights and every figure that measures no time, or why it is refused."""
    try:
        door(options, out)
    except SlimError as error:
        return str(error)
    found: dict[str, Any] = {"plan": Plan.load(out / "plan.json")}
    if (out / "summary.md").exists():
        found["files"] = {path.name for path in out.iterdir()}
    found["weights"] = {n: v.tolist() for n, v in tensors_of(out / "checkpoint").items()}
    for path in sorted((out / "results").glob("*.json")):
        if path.name.startswith("data-"):
            found[path.name] = [asdict(each) for each in DataResult.load(path).samples]
        elif path.name != "times.json":
            found[path.name] = Result.load(path).tasks
    return found


def about(figures):
    """What equals these figures up to rounding."""
    floats = {n: pytest.approx(v, rel=1e-6) for n, v in figures.items() if isinstance(v, float)}
    return figures | floats


def assert_alike(options, tmp, at):
    """Every door gives the same, or refuses."""
    expected = result(by_python, options, tmp / "python")
    for name, door in doors_of(options, at).items():
        found = result(door, options, tmp / name)
        if isinstance(expected, str) or isinstance(found, str):
            assert isinstance(expected, str) == isinstance(found, str), (name, found, expected)
            continue
        both = found.keys() & expected.keys()
        # losses on samples may differ in the last digits of float32
        samples = {key for key in both if key.startswith("data-")}
        differing = {key for key in both - samples if found[key] != expected[key]}
        for key in samples:
            assert found[key] == [about(each) for each in expected[key]], name
        assert not differing, name


def drawn(kind, known, most):
    """Some options of a class, at values that their types list, or at those known here."""
    values = {name: [known[name][1]] for name in known if name != "recover"}
    for name, hint in get_type_hints(kind).items():
        parts = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        if parts and name not in NO_RESULT:
            values.setdefault(name, []).extend(get_args(parts[0]))
    named = st.lists(st.sampled_from(sorted(values)), max_size=most, unique=True)
    some = {name: st.sampled_from(listed) for name, listed in values.items()}
    return named.flatmap(lambda names: st.fixed_dictionaries({n: some[n] for n in names}))


def asked_as_usual(at, recover, **asked):
    return example(asked={"test_samples": 0} | asked, recover=recover, is_cell=False, at=at)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@asked_as_usual(("walk", True), "none", vocab_size="auto", seed=1)
@asked_as_usual(("recover_", True), {**LORA, "fraction": 0.5}, seed=3)
@asked_as_usual(
    *(("save", False), {**LORA, "lora": {"lora_alpha": 3}}),
    axis="auto",
    floors=True,
    test_samples=2,
)
@given(
    asked=drawn(CompressConfig, OTHERWISE, 4),
    recover=st.just("none") | drawn(RecoverConfig, LEARNT, 3).map(lambda given: {**LORA, **given}),
    is_cell=st.booleans(),
    at=st.sampled_from([("walk", False), ("prune_", True), ("save", True), ("recover_", True)]),
)
def test_any_request_is_the_same_through_every_door(
    asked, recover, is_cell, at, files, tmp_path_factory
):
    whole = ({"test_samples": 0} if is_cell else {}) | asked | {"recover": recover}
    assert_alike(usual(files, **whole), tmp_path_factory.mktemp("doors"), at)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.0])
def test_a_share_of_a_tower_is_the_same_through_every_door(ratio, files, tmp_path, monkeypatch):
    """Of a model that sees; the tower alone, too."""
    monkeypatch.setitem(globals(), "MODEL", str(folders.folder("idefics3")))
    asked = {"data": str(folders.write_llava_data(tmp_path / "data", 16)), "tower_ratio": 0.2}
    asked |= {"ratio": ratio, "test_samples": 0, "recover": "none"}
    assert_alike(usual(files, **asked), tmp_path, ("walk", True))
    plan = Plan.load(tmp_path / "python" / "plan.json")
    assert plan.tower is not None
    assert plan.tower.ratio == pytest.approx(0.2, abs=0.03)
    assert bool(plan.ratio) == bool(ratio)


def test_the_tables_name_every_option():
    assert OTHERWISE.keys() | NO_RESULT.keys() >= {row.name for row in fields(CompressConfig)}
    assert LEARNT.keys() | NO_RESULT.keys() >= {row.name for row in fields(RecoverConfig)}


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """Results of requests, each done once, through the door that has the longest way."""
    known: dict[str, Any] = {}

    def of(options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            known[key] = result(by_file, options, tmp_path_factory.mktemp("run") / "out")
        return known[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("option", [*OTHERWISE, *(f"{name} in training" for name in LEARNT)])
def test_an_option_acts_or_is_refused_by_its_name(option, files, done):
    name, of_training, _ = option.partition(" in training")
    beside, value = (LEARNT if of_training else OTHERWISE)[name]
    asked, changed = beside, {**beside, name: value}
    if of_training:
        asked, changed = ({"recover": {**LORA, **each}} for each in (asked, changed))
    before, after = done(usual(files, **asked)), done(usual(files, **changed))
    assert not isinstance(before, str), before
    assert isinstance(after, str) == (option in REFUSED), after
    assert name in after if option in REFUSED else after != before


@pytest.mark.parametrize(("words", "told"), TABLES["read_by_nothing"])
def test_what_nothing_reads_is_refused(words, told, tmp_path):
    """Without data or tasks, or beside a plan that decides it."""
    verb = "prune" if "--plan" in words else "compress --ratio 0.3"
    with pytest.raises(ConfigError, match=told):
        typed(*f"{verb} {MODEL} {words} --out {tmp_path}/out".split())
    assert not list(tmp_path.iterdir())
