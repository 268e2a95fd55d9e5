"""The command line: every mistake is one line and leaves no trace, every verb does its work."""

import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest
import torch
import transformers as hf
import tyro

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
from slimvlm.planning.plan import Plan
from tests import tiny
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
    home = tmp_path / "home"
    for name in ("no-config", "taken"):
        (home / name).mkdir(parents=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.BertConfig(**sizes, intermediate_size=16).save_pretrained(home / "bert")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}]
    files = {"broken.json": '[{"id": "x", "conv', "study.yaml": "grids: {ratio: 0.3}"}
    files |= {"taken/mine": "mine", "taken.json": "mine", "not-a-result.json": "{}"}
    files["lost.json"] = json.dumps([{"id": "lost", "image": "lost.png", "conversations": turns}])
    for name, text in files.items():
        (home / name).write_text(text)
    monkeypatch.chdir(home)
    return home


WITH_MODEL = {
    "inspect": "inspect MODEL",
    "score": "score MODEL --out out --data DATA --samples 2",
    "plan": "plan MODEL --out out.json --ratio 0.3",
    "prune": "prune MODEL --out out --ratio 0.3 --data DATA",
    "recover": "recover MODEL --out out --data DATA --loss sft",
    "evaluate": "evaluate MODEL --tasks presence --limit 1 --out out.json",
    "compress": "compress MODEL --out out --ratio 0.3 --data DATA",
    "chat": "chat MODEL Colour?",
}
WITH_DATA = ("score", "prune", "recover", "compress")
WITH_RATIO = ("plan", "prune", "compress")
WITH_OUT = ("score", "plan", "prune", "recover", "compress", "evaluate")
BAD_MODELS = {
    "nowhere": "nowhere",
    "no-config": r"no config\.json",
    "bert": "'bert' is not known.*llava",
}


def changed(verb, **values):
    """A verb's usual arguments with some options changed or added."""
    arguments = WITH_MODEL[verb].split()
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    return arguments


def bad_requests():
    """Arguments with one mistake, and what the message must name."""
    made = {}
    for verb, usual in WITH_MODEL.items():
        for model, named in BAD_MODELS.items():
            made[f"{verb} {model}"] = (usual.replace("MODEL", model), named)
        if "--out" in usual:
            made[f"{verb} place"] = (changed(verb, out="bert/config.json/out"), "cannot be written")
            made[f"{verb} endless"] = (changed(verb, out="x" * 300), "at most 200 bytes")
        if verb != "inspect":  # which runs no model
            made[f"{verb} device"] = (changed(verb, device="tpu"), "device 'tpu' must be.*: cpu")
    for verb in ("score", "prune", "compress"):
        made[f"{verb} criterion"] = (changed(verb, criterion="tailor"), "'tailor' is not known")
    for verb in WITH_RATIO:
        for ratio in ("1.2", "-0.1", "nan", "0.97"):
            made[f"{verb} {ratio}"] = (changed(verb, ratio=ratio), f"ratio {ratio}")
    for verb in WITH_DATA:
        made[f"{verb} broken"] = (changed(verb, data="broken.json"), r"broken\.json.*not JSON")
        made[f"{verb} lost"] = (changed(verb, data="lost.json"), r"'lost'.*'lost\.png' not found")
        made[f"{verb} no data"] = (changed(verb, data="none.json"), r"'none\.json': no such file")
        made[f"{verb} images"] = (changed(verb, images="none"), "images 'none' is not a folder")
    for verb in WITH_OUT:
        taken = "taken" if verb in ("prune", "recover", "compress") else "taken.json"
        made[f"{verb} taken"] = (changed(verb, out=taken), r"taken(\.json)?' exists.*--force")
    tpu = "study study.yaml --out out --device tpu"
    advise = "advise MODEL --ratio 0.3 --data mine.jsonl"
    bananas = [*["plan", "MODEL", "--out", "out.json", "--target-memory"], "8 bananas"]
    untaught = changed("recover", loss="sft+hidden", teacher="nowhere")
    own = "give it in a file of --config"
    return made | {
        "study device": (tpu, "device 'tpu' must be one of: cpu"),
        "study endless": ("study none.yaml --out " + "x" * 300, "at most 200 bytes"),
        "prune no name": (changed("prune", out="a\0b"), r"output 'a\\x00b' must end in a name"),
        "inspect hub": ("inspect some-body/some-model", "some-body/some-model"),
        "score taken stem": (changed("score", out="taken"), r"taken\.json' exists"),
        "score no data given": ("score MODEL --out out", "'obs' needs --data"),
        "general text no data": (
            "prune MODEL --ratio 0.3 --criterion magnitude --general-text 0.2 --out out",
            "general_text 0.2 needs --data",
        ),
        "general text alone": (
            changed("prune", general_text="1"),
            "general_text 1.0 must be at least 0 and below 1",
        ),
        "prune nothing": ("prune MODEL --out out", "--ratio or --plan"),
        "prune both": (changed("prune", plan="taken.json"), "--ratio or --plan"),
        "prune plan": ("prune MODEL --out out --plan taken.json", "taken.json"),
        "prune no plan": ("prune MODEL --out out --plan none.json", "none.json"),
        "plan nothing": ("plan MODEL --out out.json", "exactly one of --ratio"),
        "plan two": (changed("plan", target_params="1M"), "exactly one of --ratio"),
        "plan scores": (changed("plan", scores="none"), "scores 'none.json'"),
        "plan protect": ([*changed("plan", protect="3"), "3"], "protect"),
        "plan round_to": (changed("plan", round_to="0"), "round_to 0"),
        "plan params": ("plan MODEL --out o.json --target-params many", "target_params 'many'"),
        "plan memory": (bananas, "target_memory '8 bananas'"),
        "plan tiny": ("plan MODEL --out o.json --target-params 1k", "1,000"),
        "plan huge": ("plan MODEL --out o.json --target-params 7B", "7,000,000"),
        "recover loss": (changed("recover", loss="sft+mse"), "'mse'"),
        "recover teacher": (changed("recover", loss="sft+hidden"), "needs --teacher"),
        "recover bad teacher": (untaught, "nowhere"),
        "recover fraction": (changed("recover", fraction="0"), r"fraction 0\.0"),
        "recover rank": (changed("recover", lora_rank="-4"), "lora_rank -4"),
        "compress loss": (changed("compress", loss="sft+mse"), "'mse'"),
        "compress epochs": (changed("compress", epochs="0"), r"epochs 0\.0"),
        "compress tasks": (changed("compress", tasks="presense"), "'presense' is not known"),
        "compress baseline": (changed("compress", baseline="r.json"), own),
        "compress many": (changed("compress", config="none.yaml"), r"'none\.yaml'.*no such file"),
        "recover many": (changed("recover", config="none.yaml"), r"'none\.yaml'.*no such file"),
        "evaluate tasks": (changed("evaluate", tasks="presense"), "'presense' is not known"),
        "evaluate baseline": (changed("evaluate", baseline="nowhere"), "nowhere"),
        "evaluate result": (
            changed("evaluate", baseline="not-a-result.json"),
            r"not-a-result\.json': cannot be read",
        ),
        "advise data": (advise, r"data 'mine\.jsonl': advise reads no data.*--samples"),
        "evaluate data tasks": (
            "evaluate MODEL --data DATA --tasks presence",
            "--tasks is for tasks",
        ),
        "evaluate data floors": ("evaluate MODEL --data DATA --floors", "--floors is for tasks"),
        "evaluate data file": (
            "evaluate MODEL --data DATA --baseline not-a-result.json",
            "must be a model",
        ),
        "evaluate limit": (changed("evaluate", limit="0"), "limit"),
        "evaluate batch_size": (changed("evaluate", batch_size="0"), "batch_size"),
        "score samples": (changed("score", samples="0"), "samples"),
        "prune samples": (changed("prune", samples="-3"), "samples"),
        "chat image": (changed("chat", image="none.png"), r"image 'none\.png'"),
        "chat broken image": (changed("chat", image="broken.json"), r"broken\.json"),
        "chat other": (changed("chat", other="nowhere"), "nowhere"),
        "a word for a number": (changed("compress", ratio="abc"), r"--ratio: .*FLOAT.*'abc'"),
        "no choice": (changed("compress", axis="sideways"), "'sideways'.*'--axis'.*'width'"),
        "no option": (
            "compress MODEL --out run --ratoi 0.3",
            "--ratoi, 0.3; Perhaps you meant: --ratio FLOAT$",
        ),
        "nothing said": ("compress", "Missing from slimvlm compress: MODEL --out PATH$"),
        "no verb": ("compres MODEL", "'compres' must be one of: advise, compress, report"),
        "a flag of prune": (
            "compress MODEL --out run --gradient batch",
            "--gradient is no flag of compress; give it in a file of --config$",
        ),
    }


BAD = bad_requests()


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_leaves_no_trace(case, run, home, llava, data):
    arguments, named = BAD[case]
    words = arguments.split() if isinstance(arguments, str) else arguments
    before = contents(home)
    result = run(*({"MODEL": llava, "DATA": data}.get(word, word) for word in words))
    assert contents(home) == before
    assert re.fullmatch(r"slimvlm: .*\n", result.err), result.err
    assert re.search(named, result.err), result.err
    assert (result.code, result.out) == (2, "")


def test_several_processes_may_only_train(home, llava, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refused("prune", llava, "--ratio", "0.3", "--out", "out", alone=True)
    assert told == "slimvlm: prune runs in one process: torchrun is for recover"
    assert not (home / "out").exists()


def test_a_broken_row_may_be_skipped(run, home, llava, data):
    rows = json.loads((home / "lost.json").read_text()) + json.loads(data.read_text())[:2]
    mixed = data.with_name("mixed.json")
    mixed.write_text(json.dumps(rows))
    arguments = ["score", llava, "--data", mixed, "--out", "out", "--max-bad", "1"]
    result = run(*arguments, "--criterion", "block_influence")
    assert result.code == 0, result.err
    assert "skipped: sample 'lost'" in result.err


def test_long_samples_are_named_before_weights_are_read(home, llava, data):
    (home / "model").mkdir()
    for file in llava.iterdir():
        if file.suffix != ".safetensors":
            (home / "model" / file.name).write_bytes(file.read_bytes())
    arguments = ["--data", data, "--out", "out", "--max-length", "9"]
    told = r"slimvlm: data .* tokens, --max-length is 9 .*\(--max-bad 0\)"
    for verb in (["score", "model"], ["prune", "model", "--ratio", "0.3"]):
        assert re.fullmatch(told, refused(*verb, *arguments))
    assert "--max-length is 9" in refused("recover", "model", "--loss", "sft", *arguments)


def test_two_runs_cannot_share_an_output(home, llava, data):
    command = [sys.executable, "-c", HOLDS, str(home / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        for verb in ("prune", "recover", "compress"):
            words = WITH_MODEL[verb].replace("MODEL", str(llava)).replace("DATA", str(data))
            told = rf"out' is in use by another run \(pid {other.pid} on"
            assert re.search(told, refused(*words.split()))
        other.kill()


# Help.

VERBS = sorted(cli.VERBS)


def groups_of(verb):
    """Parameters of a verb that are dataclasses, each with its class."""
    hints = get_type_hints(cli.VERBS[verb])
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def options_of(verb):
    """Every option of a verb; a dataclass among its parameters gives its fields."""
    groups, names = groups_of(verb), []
    hints = get_type_hints(cli.VERBS[verb], include_extras=True)
    for name in inspect.signature(cli.VERBS[verb]).parameters:
        if name in groups:
            every = [row.name for row in dataclasses.fields(groups[name])]
            names += [each for each in every if each not in file_only(groups[name])]
        elif tyro.conf.Positional not in getattr(hints[name], "__metadata__", ()):
            names.append(name)
    return names


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(verb, "--help")
    assert result.code == 0
    usage = result.out.splitlines()[0]
    assert verb not in WITH_MODEL or re.search(r"\bMODEL\b", usage), usage
    for name in options_of(verb):
        assert re.search(rf"--{name.replace('_', '-')}\b", result.out), name
    about = inspect.getdoc(cli.VERBS[verb])
    assert about is not None
    words = re.sub(r"[\s│|]+", " ", result.out)
    assert about.splitlines()[0] in words
    for name in inspect.signature(cli.VERBS[verb]).parameters:
        meaning = re.search(rf"^\s+{name}: (.+)$", about, re.MULTILINE)
        told = meaning[1] if meaning else USUAL.get(name) or groups_of(verb)[name].__doc__
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
    "verb", ["chat", "bench", "compare", "evaluate", "score", "prune", "images"]
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
    group = given["pruning" if verb == "compress" else "source"]
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
        "slimvlm: device_map 'auto': --low-memory reads one layer at a time"
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
    return json.loads(result.out)


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


def test_with_data_a_plan_s_weights_are_repaired(run, home, llava, data):
    made = run("plan", llava, "--ratio", "0.3", "--out", "plan.json")
    assert made.code == 0
    assert "no --scores: using obs on the demo's conversations" in made.out + made.err
    bare = run("prune", llava, "--plan", "plan.json", "--out", "bare")
    assert "removes" in bare.out
    assert "held-out loss" not in bare.out
    mended = run("prune", llava, "--plan", "plan.json", "--data", data, "--out", "mended")
    assert mended.code == 0, mended.err
    assert "held-out loss" in mended.out
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


def test_a_plan_and_scores_of_another_model_are_refused(run, home, llava):
    text = folders.folder("text")
    scored_without_data(text)
    given = ("--ratio", "0.3", "--scores", "any", "--out", "plan.json")
    assert run("plan", text, *given).code == 0
    before = contents(home)
    told = refused("prune", llava, "--plan", "plan.json", "--out", "out", alone=True)
    assert told.startswith("slimvlm: plan: made for llama")
    assert contents(home) == before
    config = tiny.llama(intermediate_size=80, num_hidden_layers=2)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(home / "other")
    arguments = ["--criterion", "magnitude", "--out", "scores"]
    assert run("score", home / "other", *arguments).code == 0
    given = ("--ratio", "0.3", "--scores", "scores", "--out", "other.json")
    told = refused("plan", llava, *given, alone=True)
    assert told.startswith("slimvlm: scores 'magnitude' are for another model")


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
    assert history["num_samples"] == 6
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
    assert re.fullmatch(r"slimvlm: baseline: .*--limit.*", few.err.splitlines()[-1])
    # naN is no JSON; a task list without an average must not print one
    from slimvlm.evaluation.tasks import builtin_tasks

    names = [n for n, task in builtin_tasks().items() if not task.in_average]
    result = run("evaluate", llava, "--tasks", names[0], "--limit", "2", "--json")
    assert result.code == 0, result.err

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(result.out, parse_constant=refuse)


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
    stored = json.loads((home / "out" / "config.json").read_text())
    assert stored["recover"]["train"] == "projector"  # the chart's choice up to 15 %
    few = ("--axis", "width", "--criterion", "magnitude", "--repair", "none", "--train", "none")
    words = ("compress", llava, "--ratio", "0.3", "--data", data, *few, "--report-samples", "0")
    (*_, said) = run(*words, "--out", "my run").err.splitlines()
    first, second = said.removeprefix("next: ").split("; ")
    assert run(*shlex.split(first)[1:]).code == 0
    answered = run(*shlex.split(second)[1:], "--max-new-tokens", "2")
    assert (answered.code, "my run" in answered.out) == (0, True)


@pytest.mark.parametrize(
    ("verb", "told", "options"),
    [
        ("compress", "to go on", ["--ratio", "0.3"]),
        ("export", "is unchanged", []),
        ("prune", "is unchanged", ["--ratio", "0.3"]),
        ("prune", "to go on", ["--ratio", "0.3", "--low-memory"]),
    ],
)
def test_ctrl_c_ends_in_one_line(verb, told, options, run, llava, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimvlm.runs.compress.compress", stopped)
    monkeypatch.setattr("slimvlm.export.gguf.export_gguf", stopped)
    monkeypatch.setattr("slimvlm.runs.verbs.prune", stopped)
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

CUDA = (
    "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 1 has a total capacity of 24.00 GiB of "
    "which 307.00 MiB is free. Including non-PyTorch memory, this process has 23.69 GiB in use."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max allowed: "
    "9.07 GiB). Tried to allocate 512.00 MiB on private pool."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
FREE = "1.20 GiB more was needed, 307.0 MiB of 24.00 GiB was free"
CASES = {
    "cuda": (CUDA, "prune", f"out of memory on cuda:1 during prune: {FREE}. What helps: --low-m"),
    "xpu": (CUDA.replace("CUDA", "XPU"), "score", f"on xpu:1 during score: {FREE}"),
    "rocm": (CUDA.replace("CUDA", "HIP"), "recover", f"on cuda:1 during recover: {FREE}"),
    "mps": (MPS, "chat", "on mps during chat: 512.0 MiB more was needed. What helps: --device"),
    "cpu": (CPU, "evaluate", "on cpu during evaluate: 4.00 GiB more was needed. What helps: a"),
    "driver": ("CUDA error: out of memory", "bench", "on cuda during bench. What helps: smaller"),
}


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
