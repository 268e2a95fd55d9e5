"""Layers of different widths: cut, written, read by plain transformers, cut again."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, ReloadError
from slimvlm.models import modeling_pruned
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import anatomy, auto_class, load
from slimvlm.models.modeling_pruned import READS_GLOBAL
from slimvlm.models.parts import backbone_of, text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import mask_, prune_
from slimvlm.pruning.save import check_reload, save
from tests import tiny
from tests.contract.test_families import TEXT_TOKENS, generated, with_masked_logits
from tests.handmade import assert_untouched, in_python, logits, plan_by_hand, snapshot
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

FAMILIES = [name for name in tiny.CONFIGS if backbone_of(tiny.CONFIGS[name]()).can_be_uneven]
EVEN_ONLY = sorted(set(tiny.CONFIGS) - set(FAMILIES))
FIXED_HEADS = ["qwen2_vl", "qwen2_5_vl", "mllama", "glm4v"]
CACHE_MATTERS = ["mllama"]
"""Whole models that say other things with a cache than without: transformers masks the picture of
a cached step in another way."""
every_family = pytest.mark.parametrize("name", tiered(FAMILIES))
pytestmark = pytest.mark.usefixtures("code_cache")

READ_BACK = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

def read_back(auto, work):
    load = getattr(transformers, auto).from_pretrained
    try:
        load(work + "/out")
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    model, report = load(work + "/out", trust_remote_code=True, output_loading_info=True)
    inputs = load_file(work + "/inputs.safetensors")
    with torch.no_grad():
        found = {"logits": model(**inputs, use_cache=False).logits}
        ways = {"dynamic": {}, "static": {"cache_implementation": "static"},
                "uncached": {"use_cache": False}}
        for way, options in ways.items():
            found[way] = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        model.save_pretrained(work + "/again")
        again = load(work + "/again", trust_remote_code=True)
        found["again"] = again(**inputs, use_cache=False).logits
        bare = transformers.AutoModel.from_pretrained(work + "/out", trust_remote_code=True)
        found["hidden"] = bare(**inputs, use_cache=False).last_hidden_state
        found["expected_hidden"] = model.model(**inputs, use_cache=False).last_hidden_state
    save_file(found, work + "/found.safetensors")
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    return {"refusal": refusal, "problems": problems, "class": type(model).__name__}

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
found = [read_back(*request) for request in json.loads(sys.argv[1])]
assert not any(name.split(".")[0] == "slimvlm" for name in sys.modules)
print(json.dumps(found))
"""


def uneven_plan(shape, layers, seed=0):
    """Random widths in every layer but the last, which stays whole."""
    chance = random.Random(seed)

    def some(index, count):
        if index not in layers or count == 0:
            return ()
        if index == layers[-1]:
            return tuple(range(count))
        return tuple(sorted(chance.sample(range(count), chance.randint(1, max(count - 1, 1)))))

    shapes = list(enumerate(shape.layers))
    groups = tuple(some(i, s.num_kv_heads) for i, s in shapes)
    neurons = tuple(some(i, s.intermediate_size) for i, s in shapes)
    return Plan(shape, layers, groups, neurons, axis="both")


@cache
def case_of(name):
    """Shared by the tests below, none of which changes it."""
    plan = uneven_plan(read_anatomy(tiny.build(name)), (0, 1, 3), seed=FAMILIES.index(name))
    return with_masked_logits(name, plan)


@pytest.fixture(scope="module")
def read_back(request, tmp_path_factory):
    """Every family asked for, cut and saved, and what a process without slimvlm found there."""
    works, requests = {}, []
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item for item in here if "read_back" in item.fixturenames]
    for name in dict.fromkeys(item.callspec.params["name"] for item in asked):
        case, works[name] = case_of(name), tmp_path_factory.mktemp(name)
        save(case.model, None, works[name] / "out", case.plan)
        inputs = {key: value.contiguous() for key, value in case.inputs.items()}
        save_file(inputs, works[name] / "inputs.safetensors")
        requests.append((auto_class(case.model.config).__name__, str(works[name])))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    said = json.loads(in_python(READ_BACK, json.dumps(requests), cwd=elsewhere))
    return dict(zip(works, zip(works.values(), said, strict=True), strict=True))


@every_family
def test_cutting_is_masking(name):
    case = case_of(name)
    assert not case.plan.after.is_uniform
    assert_close(logits(case.model, case.inputs), case.masked_logits, FORWARD)
    assert read_anatomy(case.model) == case.plan.after
    counted = sum(parameter.numel() for parameter in case.model.parameters())
    assert case.plan.after.total_params == counted
    assert case.plan.file_format == "uneven"
    assert "needs trust_remote_code=True" in case.plan.summary()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_and_slimvlm_read_the_same_model(name, read_back):
    case, (work, report) = case_of(name), read_back[name]
    found = load_file(work / "found.safetensors")
    assert report["class"] == type(case.model).__name__
    assert report["problems"] == {}
    assert "mismatch" in report["refusal"]  # without the flag
    expected = logits(case.model, case.inputs)
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["again"], expected)
    assert torch.equal(found["hidden"], found["expected_hidden"])
    for way in ("dynamic", "static", "uncached"):
        as_read = way != "uncached" and name in CACHE_MATTERS
        assert torch.equal(found[way], generated(case, use_cache=as_read))
    case, out = case_of(name), read_back[name][0] / "out"
    assert anatomy(out) == case.plan.after
    for trusts in (False, True):
        model, _ = load(out, trust_remote_code=trusts)
        assert type(model) is type(case.model)
        assert torch.equal(logits(model, case.inputs), logits(case.model, case.inputs))
    copied = out / Path(modeling_pruned.__file__).name
    assert copied.read_bytes() == Path(modeling_pruned.__file__).read_bytes()
    assert [path.name for path in out.glob("*.py")] == [copied.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_again(name, read_back):
    """Once more to different widths, then to equal ones, which need no code."""
    work, inputs = read_back[name][0], case_of(name).inputs
    model, _ = load(work / "out")
    shape = read_anatomy(model)
    last = 2 if attending(shape.with_layers([shape.layers[i] for i in (0, 2)])) else 0
    second = uneven_plan(shape, (0, last or attending(shape)[0]), seed=7)
    assert_cut_as_masked(model, load(work / "out")[0], second, inputs)
    save(model, None, work / "second", second)
    assert anatomy(work / "second") == second.after

    if len(second.after.kinds) > 1:  # one layer of each stays, and these differ
        return
    order = dict.fromkeys([*attending(second.after), 0, 1])
    alone = (plan_by_hand(second.after, layers=[index]) for index in order)
    kept = next(plan for plan in alone if plan.file_format == "native")
    assert_cut_as_masked(model, load(work / "second")[0], kept, inputs)
    assert type(model).__name__ in (type(tiny.build(name)).__name__, "MistralForCausalLM")
    save(model, None, work / "even", kept)
    again = auto_class(model.config).from_pretrained(work / "even")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    values = text_config_of(again.config).to_dict()
    assert not {"per_layer_config", READS_GLOBAL} & set(values)
    assert not hasattr(again.config, "auto_map")


def attending(shape):
    """Layers with KV groups; a cache needs one."""
    return [index for index, layer in enumerate(shape.layers) if layer.num_kv_heads]


def assert_cut_as_masked(model, masked, plan, inputs):
    prune_(model, plan)
    mask_(masked, plan)
    assert read_anatomy(model) == plan.after
    assert_close(logits(model, inputs), logits(masked, inputs), FORWARD)


@pytest.mark.parametrize("name", tiered(EVEN_ONLY))
def test_layers_that_must_be_equal_are_refused(name):
    model = tiny.build(name)
    before = snapshot(model)
    shape = read_anatomy(model)
    plan = uneven_plan(shape, tuple(sorted({0, 1, 3, *shape.pinned_layers})))
    with pytest.raises(ImpossiblePlanError, match="must stay equally wide"):
        prune_(model, plan)
    assert_untouched(model, before)


# Equal layers whose head count the configuration class cannot express.
@pytest.mark.parametrize("name", tiered([*FIXED_HEADS, "gemma2"], lambda name: name == "qwen2_vl"))
def test_inexpressible_heads_need_permission(name, tmp_path):
    model = tiny.build(name)
    inputs = tiny.batch(model, TEXT_TOKENS)
    before = snapshot(model)
    plan = plan_by_hand(read_anatomy(model), kv_groups=[0, 1, 3], neurons=range(40))
    assert plan.after.is_uniform
    assert plan.file_format == "uneven"
    way = r"from Python any number by prune_\(model, plan, allow_uneven=True\)"
    with pytest.raises(ImpossiblePlanError, match=way):
        prune_(model, plan)
    assert_untouched(model, before)
    masked = tiny.build(name)
    mask_(masked, plan)
    prune_(model, plan, allow_uneven=True)
    assert_close(logits(model, inputs), logits(masked, inputs), FORWARD)
    save(model, None, tmp_path / "out", plan)
    assert anatomy(tmp_path / "out") == plan.after
    assert torch.equal(logits(load(tmp_path / "out")[0], inputs), logits(model, inputs))


def test_permission_changes_nothing_for_expressible_heads_and_cut_ones_can_become_equal():
    model = tiny.build("llama")
    plan = plan_by_hand(read_anatomy(model), kv_groups=[0, 2, 3])
    assert plan.file_format == "native"
    prune_(model, plan, allow_uneven=True)
    assert not model.config.is_heterogeneous
    model = tiny.build("qwen2_vl")
    shape = read_anatomy(model)
    kept = ((0, 1), (1,), (2, 3), (0, 2))
    prune_(model, Plan(shape, (0, 1, 2, 3), kept, plan_by_hand(shape).neurons, axis="width"))
    plan = plan_by_hand(read_anatomy(model), layers=[0, 2, 3])
    assert plan.after.is_uniform
    assert plan.file_format == "uneven"
    prune_(model, plan, allow_uneven=True)
    assert read_anatomy(model) == plan.after


def test_a_model_that_transformers_loaded_is_saved_like_ours(tmp_path):
    case = case_of("llava-phi3")
    save(case.model, None, tmp_path / "out", case.plan)
    model = auto_class(case.model.config).from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model) is not type(case.model)
    model.config.auto_map["AutoModel"] = "someone/else--code.Foreign"  # as after a hub download
    save(model, None, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == case.model.config.auto_map
    assert anatomy(tmp_path / "again") == case.plan.after


def test_widths_that_no_layer_can_have_are_named(tmp_path):
    save(case_of("llama").model, None, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    for index, change in (
        *((1, {"intermediate_size": width}) for width in (0, "40", True)),
        *((0, {"num_key_value_heads": 5}), (2, {"hidden_size": 8}), (2, {"skip": ["mlp"]})),
    ):
        file.write_text(json.dumps(values | {"per_layer_config": {str(index): change}}))
        for read in (load, anatomy):
            with pytest.raises(ConfigError, match=rf"per_layer_config\[{index}\] .* may give"):
                read(tmp_path / "out")
    absent, unknown = {"3": {"intermediate_size": 5}}, {"0": {"surprise": 1}}
    for wrong in (absent, unknown, {"x": {}}, {"0": 5}, [5]):
        file.write_text(json.dumps(values | {"per_layer_config": wrong}))
        with pytest.raises(ConfigError, match="config cannot be read"):
            anatomy(tmp_path / "out")


# Safety: only the file of this package ever runs without the user's word.
@pytest.mark.parametrize("is_plain", [False, True], ids=["changed", "plain"])
def test_a_changed_file_is_never_run_and_a_plain_folder_loads(is_plain, tmp_path):
    """Others may write it without permission to read the whole model's widths, or our code."""
    case, out = case_of("mistral"), tmp_path / "out"
    save(case.model, None, out)
    code = out / "modeling_pruned.py"
    code.write_text("raise SystemExit('foreign code ran')\n" + code.read_text())
    if is_plain:
        code.unlink()
        values = json.loads((out / "config.json").read_text())
        del values[READS_GLOBAL], values["auto_map"]
        (out / "config.json").write_text(json.dumps(values))
    for trusts in (False, True):
        model, _ = load(out, trust_remote_code=trusts)
        assert torch.equal(logits(model, case.inputs), logits(case.model, case.inputs))
    if is_plain:
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            auto_class(model.config).from_pretrained(out)
    else:
        with pytest.raises(ReloadError, match="does not load back"):
            check_reload(case.model, None, out)


def test_the_file_makes_only_models_of_transformers():
    for name in ("PrunedNothing", "LlamaForCausalLM", "PrunedAutoModel", "os_"):
        with pytest.raises(AttributeError):
            getattr(modeling_pruned, name)
