"""The command line: every mistake is one line and leaves no trace, every verb does its work."""

import dataclasses
import inspect
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest
import torch
import tyro
import yaml

import slimvlm as sv
from slimvlm import cli
from slimvlm.cli.options import USUAL
from slimvlm.cli.printing import print_table
from slimvlm.core.documents import built
from slimvlm.core.errors import SlimError
from slimvlm.core.options import file_only
from slimvlm.core.progress import progress, to_log
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import answer
from slimvlm.evaluation.results import Result
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import Picture, question_flops
from slimvlm.planning.plan import Plan
from slimvlm.runs import recipe
from tests import tiny_folder as folders
from tests.core.test_files import HOLDS
from tests.handmade import assert_equal, contents, refused, tensors_of


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd):
    """Give arguments to the command line in this process."""

    def runs(*arguments):
        capfd.readouterr()
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return runs


@pytest.fixture(scope="session")
def llava():
    return folders.folder("llava")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), count=6)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working folder, with one specimen of everything that cannot be used."""
    home = shutil.copytree(Path(__file__).with_name("home"), tmp_path / "home")
    (home / "no-config").mkdir()
    monkeypatch.chdir(home)
    return home


TABLE = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text())
USUAL_WORDS = TABLE["usual"]


def changed(verb, change):
    """A verb's usual arguments with an option that is changed or added."""
    arguments, words = USUAL_WORDS[verb].split(), shlex.split(change)
    at = arguments.index(words[0]) if words[0] in arguments else len(arguments)
    return [*arguments[:at], *words, *arguments[at + 2 :]]


def bad_requests():
    """Arguments with one mistake, and what the message must name."""
    made = {words: (shlex.split(words), named) for words, named in TABLE["whole"].items()}
    for model, named in TABLE["models"].items():
        for verb, words in USUAL_WORDS.items():
            made[f"{verb} {model}"] = words.replace("MODEL", model).split(), named
    for verbs, changes in TABLE["changed"].items():
        for verb, (change, named) in itertools.product(verbs.split(), changes.items()):
            made[f"{verb} {change}"] = changed(verb, change), named
    return made


BAD = bad_requests()


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_leaves_no_trace(case, run, home, llava, data):
    words, named = BAD[case]
    before, stand_for = contents(home), {"MODEL": llava, "DATA": data, "LONG": "x" * 300}
    result = run(*(stand_for.get(word, word) for word in words))
    assert contents(home) == before
    assert re.fullmatch(r"slimvlm: .*\n", result.err), result.err
    assert re.search(named, result.err), result.err
    assert (result.code, result.out) == (2, "")


def test_several_processes_may_only_train(home, llava, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refused("prune", llava, "--ratio", "0.3", "--out", "out", alone=True)
    assert told == "slimvlm: prune runs in one process: use torchrun with recover only"
    assert not (home / "out").exists()


def test_a_broken_row_may_be_skipped(run, home, llava, data):
    rows = json.loads((home / "lost.json").read_text()) + json.loads(data.read_text())[:2]
    mixed = data.with_name("mixed.json")
    mixed.write_text(json.dumps(rows))
    arguments = ["score", llava, "--data", mixed, "--out", "out", "--max-bad-rows", "1"]
    result = run(*arguments, "--criterion", "block_influence")
    assert result.code == 0, result.err
    assert "skipped: sample 'lost'" in result.err


def test_long_samples_are_named_before_weights_are_read(home, llava, data):
    (home / "model").mkdir()
    for file in llava.iterdir():
        if file.suffix != ".safetensors":
            (home / "model" / file.name).write_bytes(file.read_bytes())
    arguments = ["--data", data, "--out", "out", "--max-length", "9"]
    told = r"slimvlm: data .* tokens, --max-length is 9 .*\(--max-bad-rows 0\)"
    for verb in (["score", "model"], ["prune", "model", "--ratio", "0.3"]):
        assert re.fullmatch(told, refused(*verb, *arguments))
    assert "--max-length is 9" in refused("recover", "model", "--loss", "sft", *arguments)


def test_two_runs_cannot_share_an_output(home, llava, data):
    command = [sys.executable, "-c", HOLDS, str(home / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        for verb in ("prune", "recover", "compress"):
            words = USUAL_WORDS[verb].replace("MODEL", str(llava)).replace("DATA", str(data))
            told = rf"out' is in use by another run \(pid {other.pid} on"
            assert re.search(told, refused(*words.split()))
        other.kill()


# Help.

VERBS = sorted(cli.VERBS)


def groups_of(verb):
    """Groups of options of a verb, each with its class."""
    found, hints = {}, get_type_hints(cli.VERBS[verb])
    for name, kind in hints.items():
        if name != "return" and dataclasses.is_dataclass(kind):
            found |= getattr(kind, "groups", {name: kind})
    return found


def options_of(verb):
    """Every option of a verb; a class among its parameters gives its fields."""
    names, hints = [], get_type_hints(cli.VERBS[verb], include_extras=True)
    for kind in groups_of(verb).values():
        shown = [row.name for row in dataclasses.fields(kind) if row.name not in file_only(kind)]
        names += [kind.flags.get(name, name) for name in shown]
    for name in inspect.signature(cli.VERBS[verb]).parameters:
        is_group = dataclasses.is_dataclass(hints[name])
        if not is_group and tyro.conf.Positional not in getattr(hints[name], "__metadata__", ()):
            names.append(name)
    return names


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(verb, "--help")
    assert result.code == 0
    usage = result.out.splitlines()[0]
    assert verb not in USUAL_WORDS or re.search(r"\bMODEL\b", usage), usage
    for name in options_of(verb):
        assert re.search(rf"--{name.replace('_', '-')}\b", result.out), name
    about = inspect.getdoc(cli.VERBS[verb])
    assert about is not None
    words = re.sub(r"[\s│|]+", " ", result.out)
    assert about.splitlines()[0] in words
    groups, plain = groups_of(verb), inspect.signature(cli.VERBS[verb]).parameters
    for name in {**groups, **{n: p for n, p in plain.items() if n != "options"}}:
        meaning = re.search(rf"^\s+{name}: (.+)$", about, re.MULTILINE)
        told = meaning[1] if meaning else USUAL.get(name) or groups[name].__doc__
        assert " ".join(told.split("\n")[0].split()[:4]) in words, name


@pytest.mark.parametrize(("verb", "most"), [("compress", 45), ("recover", 25)])
def test_a_verb_has_no_more_options_than_people_read(verb, most, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = re.findall(r"^│ --[a-z]", run(verb, "--help").out, re.MULTILINE)
    assert 20 < len(shown) <= most


def test_help_has_groups_of_options_and_score_the_criterion_of_widths(run):
    groups = re.split(r"╭─ (.*?) ─+╮", run("compress", "--help").out)
    found = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(found) == [
        *("positional arguments", "options", "pruning options", "training options"),
        "evaluation options",
    ]
    assert {"--out", "--config", "--dry-run"} <= set(re.findall(r"--[\w-]+", found["options"]))
    assert "--lora-rank INT" in found["training options"]
    assert "(default: 64)" in found["training options"]
    assert "--seed" not in found["training options"]  # a run has one
    assert "None" not in "".join(found.values())
    from slimvlm.scoring.criteria import DEFAULT_CRITERIA

    default = inspect.signature(cli.VERBS["score"]).parameters["criterion"].default
    assert (default,) == DEFAULT_CRITERIA["width"]


@pytest.mark.parametrize(
    "verb", ["chat", "bench", "compare", "evaluate", "score", "prune", "image-tokens"]
)
def test_verbs_with_few_options_take_how_a_model_is_read(verb):
    assert {"attn_implementation", "device_map"} <= set(options_of(verb))


@pytest.mark.parametrize("verb", ["compress", "recover"])
def test_verbs_with_many_options_take_it_from_a_file(verb, run, tmp_path):
    assert {"attn_implementation", "device_map"}.isdisjoint(options_of(verb))
    file = tmp_path / "run.yaml"
    values = {"model": "m", "data": "d.json", "attn_implementation": "eager", "recover": "none"}
    file.write_text(json.dumps(values))
    words = ["--out", "out", "--config", str(file)]
    given = cli.parsed(verb, words if verb == "compress" else ["m", *words])
    group = given["options" if verb == "compress" else "source"]
    assert (group.attn_implementation, group.device_map) == ("eager", None)
    file.write_text(json.dumps(values | {"attn_implementation": "fast"}))
    result = run(verb, "m", *words)
    assert result.code == 2
    assert "attn_implementation 'fast' must be one of: eager" in result.err


def test_low_memory_reads_its_own_way(run, home, llava, data):
    words = ("prune", llava, "--ratio", "0.3", "--data", data, "--samples", "2", "--low-memory")
    result = run(*words, "--device-map", "auto", "--out", "small")
    assert (result.code, (home / "small").exists()) == (2, False)
    assert result.err.splitlines()[-1] == (
        "slimvlm: device_map 'auto' conflicts with --low-memory: leave one of them out"
    )


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_says_what_every_verb_is_for(words, run):
    result = run(*words)
    shown = result.out if words else result.err
    assert (result.code, result.out + result.err) == (0 if words else 2, shown)
    said = " ".join(shown.split())
    for verb in VERBS:
        assert len(re.findall(rf"^  {verb} ", shown, re.MULTILINE)) == 1
        about = (inspect.getdoc(cli.VERBS[verb]) or "").split("\n\n")[0]
        assert f"{verb} {' '.join(about.split())}" in said


# Every verb at work.
def stdout_json(result):
    assert result.code == 0, result.err
    return json.loads(result.out, parse_constant=pytest.fail)  # NaN is no JSON


@pytest.mark.parametrize("kind", ["llava", "text"])
def test_inspect_agrees_with_the_library(kind, run):
    values = stdout_json(run("inspect", folders.folder(kind), "--json"))
    shape = sv.anatomy(folders.folder(kind))
    extra = {
        "backbone_params": shape.backbone_params,
        "total_params": shape.total_params,
        "legal_kv_heads": shape.legal_kv_heads(),
    }
    assert {name: values.pop(name) for name in extra} == extra
    sees = kind == "llava"  # 4 x 4 patches and a class token; a mark is around the image tokens
    image = {"patches": 17 * sees, "reach": 17 * sees, "features": 16 * sees, "tokens": 17 * sees}
    assert values.pop("image") == image
    assert values.pop("image_flops") == question_flops(shape, Picture(**image))._asdict()
    assert built(Anatomy, values) == shape


def test_inspect_needs_no_weights(run, llava, tmp_path):
    (tmp_path / "config.json").write_bytes((llava / "config.json").read_bytes())
    result = run("inspect", tmp_path)
    assert result.code == 0
    shape = sv.anatomy(llava)
    for number in (shape.total_params, shape.backbone_params, shape.vision_params):
        assert f"{number:,}" in result.out


def test_score_plan_prune_is_prune(run, home, llava, data):
    given = ["--data", data, "--samples", "3"]
    for name in ("block_influence", "taylor"):
        assert run("score", llava, *given, "--criterion", name, "--out", f"s/{name}").code == 0
    assert {path.name for path in (home / "s").iterdir()} == {
        f"{name}.{end}" for name in ("block_influence", "taylor") for end in ("json", "safetensors")
    }
    budget = ["--ratio", "0.35", "--axis", "both"]
    scores = ["--scores", "s/block_influence.json", "s/taylor"]
    made = stdout_json(run("plan", llava, *budget, *scores, "--out", "plan.json", "--json"))
    assert made["ratio"] == pytest.approx(Plan.load("plan.json").ratio)
    assert run("prune", llava, "--plan", "plan.json", "--out", "steps").code == 0
    same = ["--criterion", "block_influence", "taylor", "--allocation", "uniform"]
    same += ["--repair", "none", "--local-steps", "0"]
    assert run("prune", llava, *budget, *same, *given, "--out", "once").code == 0
    assert_equal(home / "steps", home / "once")
    assert sv.anatomy(home / "once") == Plan.load("plan.json").after
    assert sv.anatomy(home / "once").total_params == made["total_params"]


def scored_without_data(model):
    """Write scores of all units to the current folder, as ``any``."""
    loaded, _ = sv.load(model)
    sv.score(loaded, (), "magnitude").save("any")


def test_with_data_a_plan_s_weights_are_repaired(run, home, llava, data, monkeypatch):
    honest = recipe.samples_for
    monkeypatch.setattr(recipe, "samples_for", lambda *given: honest(*given)[:8])  # of 192
    made = run("plan", llava, "--ratio", "0.3", "--out", "plan.json")
    assert made.code == 0
    assert "no --scores: scoring by obs on the demo's samples" in made.out + made.err
    bare = run("prune", llava, "--plan", "plan.json", "--out", "bare")
    assert "removes" in bare.out
    assert "validation loss" not in bare.out
    mended = run("prune", llava, "--plan", "plan.json", "--data", data, "--out", "mended")
    assert mended.code == 0, mended.err
    assert "validation loss" in mended.out
    for name in ("none", "width"):
        arguments = ["prune", llava, "--plan", "plan.json", "--repair", name, "--out", name]
        assert run(*arguments).code == (0 if name == "none" else 2)


def test_prune_with_force_replaces(run, home, llava):
    arguments = ["prune", llava, "--ratio", "0.3", "--criterion", "magnitude"]
    refused = run(*arguments, "--out", "taken", "--force")
    assert (refused.code, "a folder that slimvlm did not write" in refused.err) == (2, True)
    assert (home / "taken" / "mine").read_text() == "mine"
    assert run(*arguments, "--out", "own").code == 0
    (home / "own" / "mine").write_text("mine")
    assert run(*arguments, "--out", "own", "--force").code == 0
    assert not (home / "own" / "mine").exists()
    assert (home / "own" / "config.json").exists()


def test_a_plan_of_another_model_is_refused(run, home, llava):
    text = folders.folder("text")
    scored_without_data(text)
    given = ("--ratio", "0.3", "--scores", "any", "--out", "plan.json")
    assert run("plan", text, *given).code == 0
    before = contents(home)
    told = refused("prune", llava, "--plan", "plan.json", "--out", "out", alone=True)
    assert told.startswith("slimvlm: plan: made for llama")
    assert contents(home) == before


@pytest.mark.parametrize("axis", ["depth", "width"])
def test_plan_meets_a_target(axis, run, home, llava):
    whole = sv.anatomy(llava)
    target = whole.total_params - round(0.3 * whole.backbone_params)
    scored_without_data(llava)
    mib = [f"{bytes_each * target / 2**20:.6f}MiB" for bytes_each in (2, 4)]
    first, *others = (
        stdout_json(run("plan", llava, *asked, "--axis", axis, "--json", "--scores", "any"))
        for asked in (
            ("--target-params", target, "--out", "params.json"),
            ("--target-memory", mib[0], "--out", "m.json"),
            ("--target-memory", mib[1], "--dtype", "float32", "--out", "f.json"),
        )
    )
    step = whole.layers[0].params if axis == "depth" else 0.01 * whole.backbone_params
    assert abs(first["total_params"] - target) <= step
    assert [made["total_params"] for made in others] == [first["total_params"]] * 2


def test_target_memory_is_a_limit(run, home, llava):
    """A model that is asked to fit into some bytes fits."""
    whole = sv.anatomy(llava)
    scored_without_data(llava)
    for share in (0.62, 0.7, 0.77, 0.9):
        size = 2 * (whole.total_params - (1 - share) * whole.backbone_params)
        arguments = ["--target-memory", f"{size / 2**20:.6f}MiB", "--out", f"{share}.json"]
        made = stdout_json(run("plan", llava, *arguments, "--json", "--scores", "any"))
        assert 2 * made["total_params"] <= size


def test_recover_trains_and_keeps_the_plan(run, home, llava, data):
    assert run("prune", llava, "--ratio", "0.3", "--criterion", "magnitude", "--out", "p").code == 0
    arguments = ["recover", "p", "--teacher", llava, "--data", data, "--out", "r"]
    options = ["--train", "projector", "--max-steps", "2", "--batch-size", "2"]
    (home / "run.yaml").write_text("model: of the file\nrecover: {bf16: false, loss: sft}\n")
    options += ["--config", "run.yaml"]
    result = run(*arguments, *options)
    assert result.code == 0, result.err
    assert re.search(r"^train: 2 of 2 in \d+ s$", result.err, re.MULTILINE)
    before, after = tensors_of(home / "p"), tensors_of(home / "r")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    assert Plan.load(home / "r" / "slimvlm_plan.json") == Plan.load(
        home / "p" / "slimvlm_plan.json"
    )
    history = json.loads((home / "r" / "slimvlm_history.json").read_text())
    assert history["num_samples"] == 4
    assert not [path for path in home.iterdir() if path.name.startswith(".")]


def test_evaluate_compares_with_a_result_and_its_json_is_strict(run, home, llava):
    usual = ["evaluate", llava, "--tasks", "presence,text_sum", "--limit", "3", "--json"]
    values = stdout_json(run(*usual, "--out", "r.json"))
    assert set(values["model"]["tasks"]) == {"presence", "text_sum"}
    assert Result.load("r.json").average == values["model"]["average"]
    compared = stdout_json(run(*usual, "--baseline", "r.json"))
    assert set(compared) == {"baseline", "model"}
    assert "retention" in compared["model"]
    table = run(*usual[:-1], "--baseline", "r.json")
    assert table.code == 0
    assert "AVG-%" in table.out
    few = run("evaluate", llava, "--tasks", "presence", "--limit", "2", "--baseline", "r.json")
    assert few.code == 2
    assert re.search(r"^slimvlm: .*baseline has other questions.*--limit", few.err, re.MULTILINE)
    # a task list without an average must not print one
    from slimvlm.evaluation.tasks import builtin_tasks

    names = [n for n, task in builtin_tasks().items() if not task.in_average]
    stdout_json(run("evaluate", llava, "--tasks", names[0], "--limit", "2", "--json"))


def test_chat_answers(run, home, llava):
    folders.picture(3).save(home / "a.png")
    model, processor = sv.load(llava)
    asked = Question("chat", "Which colour?", ("",), (Path("a.png"),))
    ((expected, _),) = answer(model, processor, [asked], 5)
    arguments = ["chat", llava, "Which colour?", "--image", "a.png", "--max-new-tokens", "5"]
    result = run(*arguments)
    assert result.code == 0, result.err
    assert result.out.strip() == expected.strip()
    assert stdout_json(run(*arguments, "--json")) == {str(llava): expected}
    both = stdout_json(run(*arguments, "--json", "--other", folders.folder("internvl")))
    assert set(both) == {str(llava), str(folders.folder("internvl"))}


def test_compress_prints_nothing_but_json_and_says_what_comes_next(run, home, llava, data):
    arguments = ["compress", llava, "--ratio", "0.1", "--data", data, "--samples", "2", "--json"]
    asked = ["--tasks", "presence", "--limit", "2", "--training-samples", "2", "--batch-size", "2"]
    values = stdout_json(run(*arguments, *asked, "--out", "out"))
    assert set(values) == {"original", "pruned", "recovered", "held_out", "times"}
    shares = values["times"]["prefill"]
    assert 0 < shares["low"] <= shares["value"] <= shares["high"]
    assert values["recovered"]["backbone_params"] < values["original"]["backbone_params"]
    assert (
        sv.anatomy(home / "out" / "checkpoint").total_params
        == (values["recovered"]["total_params"])
    )
    stored = yaml.safe_load((home / "out" / "run.yaml").read_text())
    assert stored["recover"]["train"] == "projector"  # the chart's choice up to 15 %
    few = ("--axis", "width", "--criterion", "magnitude", "--repair", "none", "--train", "none")
    words = ("compress", llava, "--ratio", "0.3", "--data", data, *few, "--test-samples", "0")
    (*_, said) = run(*words, "--out", "my run").err.splitlines()
    first, second = said.removeprefix("next: ").split("; ")
    assert run(*shlex.split(first)[1:]).code == 0
    answered = run(*shlex.split(second)[1:], "--max-new-tokens", "2")
    assert (answered.code, "my run" in answered.out) == (0, True)


@pytest.mark.parametrize(
    ("verb", "told", "options"),
    [
        ("compress", "resumes it", ["--ratio", "0.3"]),
        ("export", "is unchanged", []),
        ("prune", "is unchanged", ["--ratio", "0.3"]),
        ("prune", "resumes it", ["--ratio", "0.3", "--low-memory"]),
    ],
)
def test_ctrl_c_ends_in_one_line(verb, told, options, run, llava, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimvlm.runs.compress.compress", stopped)
    monkeypatch.setattr("slimvlm.export.gguf.export_gguf", stopped)
    monkeypatch.setattr("slimvlm.runs.recipe.resolve", stopped)
    result = run(verb, llava, "--out", "out", *options)
    assert result.code == 130
    assert re.fullmatch(rf"slimvlm: stopped\. [^\n]*{told}[^\n]*\n", result.err)


def test_text_from_outside_is_printed_as_text(capsys):
    hostile = "[bold]x[/nonsense] \x1b[2J\x07"
    print_table(["task", hostile], [[hostile, "1"]], title=hostile)
    to_log(hostile)
    shown = capsys.readouterr()
    for text in shown:
        assert "\x1b[2J" not in text
        assert "[bold]x[/nonsense] \\x1b[2J\\x07" in text


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_cuts_no_word_of_a_table(columns, capsys, monkeypatch):
    for name, value in (("COLUMNS", str(columns)), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    numbers = [f"{i}3.4567 [{i}1.2345, {i}5.6789]" for i in range(1, 9)]
    print_table(["task", *map(str, range(1, 9))], [["capitals", *numbers]])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(f"{i}{end}" in shown for i in range(1, 9) for end in ("3.4567", "1.2345", "5.6789"))


# Out of memory.

CASES = yaml.safe_load(Path(__file__).with_name("memory.yaml").read_text())
CUDA = CASES["cuda"][0]


def explained(error, *words):
    """What is said of an error of a verb."""
    with pytest.raises(SlimError) as caught, cli.memory_explained(words):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_every_library_s_words_are_understood(case):
    message, verb, told = CASES[case]
    assert told in explained(RuntimeError(message), verb, "demo")


def test_advice_names_the_stage_and_what_is_not_done_and_other_errors_stay_as_they_are():
    def run():
        for _ in progress(range(2), "walk"):
            for _ in progress(range(2), "within"):
                pass
            raise RuntimeError(CUDA)

    told = "during compress, stage 'walk'"
    with pytest.raises(SlimError, match=told), cli.memory_explained(["compress", "demo"]):
        run()
    advice = explained(RuntimeError(CUDA), "prune", "demo", "--low-memory")
    assert "--low-memory" not in advice
    assert "--samples" in advice
    with pytest.raises(RuntimeError, match="same device"), cli.memory_explained(["prune"]):
        raise RuntimeError("Expected all tensors to be on the same device")
