"""A checkpoint read layer by layer is scored and pruned like a model in memory."""

import json
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

import slimvlm as sv
from slimvlm.cli import main
from slimvlm.core.errors import ConfigError, DataError, InUseError, NumericalError, OutputError
from slimvlm.core.files import held
from slimvlm.models.load import auto_class, load
from slimvlm.models.parts import Parts
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE, prune_checkpoint, save
from slimvlm.scoring import score_model
from slimvlm.scoring.layerwise import LayerCalls, LayerwiseModel, open_checkpoint
from slimvlm.scoring.score_model import score, score_checkpoint
from slimvlm.scoring.unit_scores import Scores
from tests import tiny, tiny_folder
from tests.handmade import assert_equal, logits, random_scores, refused
from tests.pruning.walk.test_engine import Clock
from tests.tiers import tiered

MODELS = ("llama", "phi", "llava-phi3", "qwen2_5_vl", "internvl-qwen2", "smolvlm")
ODD = ("gemma2", "qwen3_vl", "gemma3")  # capped logits, deepstack features, two kinds of masks
TABLE = yaml.safe_load(Path(__file__).with_name("layerwise.yaml").read_text())
CASES = TABLE["criteria"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders of tiny models, in several small files."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: root / name for name in (*MODELS, *ODD, "llava-llama", "internvl-phi3")}
    for name, folder in made.items():
        tiny.build(name).save_pretrained(folder, max_shard_size="100KB")
    yield made
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def folder(folders):
    return folders["llama"]


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.fixture
def data(model):
    return batches(model)


def batches(model):
    return [tiny.batch(model, 12, 0), tiny.batch(model, 15, 1)]


def assert_same(actual, expected):
    ours, theirs = actual.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys() != set()
    assert (actual.criterion, actual.options) == (expected.criterion, expected.options)
    for name, values in theirs.items():
        values, found = (each.nan_to_num(posinf=0.0) for each in (values, ours[name]))
        largest = float(values.abs().max()) if len(values) else 0.0
        torch.testing.assert_close(found, values, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *tiered(((name, case) for name in MODELS for case in CASES), lambda name, _: name == "phi"),
        *((name, case) for name in ODD for case in ("block_influence", "activation")),
    ],
)
def test_scores_are_those_of_the_model_in_memory(name, case, folders):
    model = tiny.build(name)
    expected = score(model, batches(model), **CASES[case])
    assert_same(score_checkpoint(folders[name], batches(model), **CASES[case]), expected)


@pytest.mark.parametrize("name", tiered(["lfm2", "qwen3_5_text", "mllama"]))
def test_padding_that_layers_read_is_stored_beside_the_batch(name, tmp_path):
    """In half precision, of which scores are float32."""
    tiny.build(name).bfloat16().save_pretrained(tmp_path / "hybrid")
    model, _ = load(tmp_path / "hybrid")
    batch = {n: each.repeat_interleave(2, 0) for n, each in tiny.batch(model).items()}
    batch["attention_mask"][1, :4] = 0
    expected = score(model, [batch], "activation")
    found = score_checkpoint(tmp_path / "hybrid", [batch], "activation")
    assert_same(found, expected)
    assert all(values.dtype == torch.float32 for values in found.tensors().values())


@pytest.mark.parametrize("case", ["flap", "block_influence"])
def test_one_layer_is_in_memory_at_a_time(case, model, data, folder, monkeypatch):
    seen = []
    layers = LayerwiseModel.layer

    def look(module):
        seen.append(sum(p.numel() for p in module.parameters() if not p.is_meta))

    @contextmanager
    def watched(self, index):
        with layers(self, index) as reduced:
            (loaded,) = Parts(reduced).layers
            for module in (self.model, loaded):
                loaded.register_forward_pre_hook(lambda *_, m=module: look(m))
            yield reduced

    monkeypatch.setattr(LayerwiseModel, "layer", watched)
    score_checkpoint(folder, data, **CASES[case])
    size = sum(p.numel() for p in model.model.layers[0].parameters())
    assert set(seen) == {size, size + model.model.norm.weight.numel()}


@pytest.mark.parametrize("case", ["flap", "block_influence"])
def test_a_layer_runs_once_for_each_batch(case, data, folder, monkeypatch):
    runs, run = [], LayerCalls.run
    monkeypatch.setattr(LayerCalls, "run", lambda *call: runs.append(call[2]) or run(*call))
    score_checkpoint(folder, data, **CASES[case])
    assert len(runs) == 4 * len(data)


@pytest.mark.parametrize("case", ["activation", "block_influence"])
def test_a_stopped_run_goes_on_after_the_last_whole_layer(
    case, data, folder, tmp_path, monkeypatch
):
    clock = Clock(monkeypatch)
    clock.watch(LayerwiseModel, "layer")
    asked = {**CASES[case], "scratch": tmp_path / "work"}
    expected = score_checkpoint(folder, data, **asked)
    count = clock.calls
    assert count == 4
    for stop_at in range(2, count + 1):
        clock.calls, clock.stop_at = 0, stop_at
        with pytest.raises(KeyboardInterrupt):
            score_checkpoint(folder, data, **asked)
        clock.calls, clock.stop_at = 0, -1
        assert_same(score_checkpoint(folder, data, **asked), expected)
        assert clock.calls == count - (stop_at - 1)
    assert not (tmp_path / "work").exists()


@contextmanager
def stopped_at(owner, name, index=None):
    """Inside, a run is stopped when it calls a method, with this argument if one is given."""
    honest = getattr(owner, name)

    def stops(self, *args):
        if index in (None, *args):
            raise KeyboardInterrupt
        return honest(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, stops)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("place", [(LayerwiseModel, "layer", 2), (score_model, "joined")])
@pytest.mark.parametrize("change", ["data", "model", "criterion"])
def test_another_request_reuses_no_old_work(change, place, model, data, folder, tmp_path):
    """The embeddings are another model's, too."""
    with stopped_at(*place):
        score_checkpoint(folder, data, "flap", scratch=tmp_path / "work")
    criterion = "magnitude" if change == "criterion" else "flap"
    data = {"data": [tiny.batch(model, 9, 5)], "model": data, "criterion": []}[change]
    if change == "model":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        folder = tmp_path / "other"
        model.save_pretrained(folder)
    found = score_checkpoint(folder, data, criterion, scratch=tmp_path / "work")
    assert_same(found, score(model, data, criterion))


def test_a_place_that_cannot_be_removed_costs_no_scores(model, data, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the current folder cannot be named for removal
    assert_same(score_checkpoint(folder, data, scratch="."), score(model, data))


def test_two_runs_do_not_share_a_scratch_folder_and_a_full_disk_is_found(
    data, folder, tmp_path, monkeypatch
):
    with ThreadPoolExecutor(1) as elsewhere, held(tmp_path / "slimvlm-scratch"):
        second = elsewhere.submit(score_checkpoint, folder, data, scratch=tmp_path)
        with pytest.raises(InUseError, match="slimvlm-scratch' is in use by another run"):
            second.result()
    score_checkpoint(folder, data, scratch=tmp_path)
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(LayerwiseModel, "layer", None)
    with pytest.raises(OutputError, match=r"scratch .* GiB needed, .* 0.0 GiB free"):
        score_checkpoint(folder, data, scratch=tmp_path)
    assert [*(tmp_path / "slimvlm-scratch").rglob("*.safetensors")]  # a further try goes on


def test_the_scratch_folder_is_announced_and_other_files_in_it_stay(data, folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = []
    score_checkpoint(folder, data, scratch=tmp_path, say=said.append)
    (line,) = said
    assert line.startswith("scratch: 0.00 GiB in ")
    assert str(tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_data_is_refused(folder):
    for criterion in ("block_influence", "obs"):
        with pytest.raises(DataError, match="no calibration batch"):
            score_checkpoint(folder, [], criterion)


@pytest.mark.parametrize("case", ["activation", "block_influence"])
def test_nan_stops_with_the_numbers_of_layer_and_sample(case, model, data, tmp_path):
    """A token that only the last sample has is spoilt, then a layer."""
    token = int(data[-1]["input_ids"][-1, 0])
    for ids in (*(batch["input_ids"] for batch in data[:-1]), data[-1]["input_ids"][:-1]):
        ids[ids == token] = token - 1
    embedding = model.model.embed_tokens.weight.data
    known = embedding[token].clone()
    embedding[token] = float("inf")
    model.save_pretrained(tmp_path / "spoilt")
    told = f"calibration sample {sum(len(batch['input_ids']) for batch in data)}"
    with pytest.raises(NumericalError, match=told):
        score_checkpoint(tmp_path / "spoilt", data, **CASES[case])
    embedding[token] = known
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NumericalError, match="layer 2"):
        score_checkpoint(tmp_path / "nan", data, **CASES[case])


@pytest.mark.parametrize(("change", "message"), TABLE["misshapen"])
def test_missing_and_misshapen_weights_are_named(change, message, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(broken)


# Pruning: equal widths in every family are tested with the walk
@pytest.mark.parametrize("name", tiered([*MODELS, "gemma2", "qwen3_vl", "internvl-phi3"]))
def test_a_pruned_checkpoint_of_uneven_layers_is_the_one_that_save_writes(name, folders, tmp_path):
    anatomy = sv.anatomy(folders[name])
    plan = make_plan(anatomy, random_scores(anatomy), 0.15, "width", "protect", round_to=1)
    assert not plan.after.is_uniform
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    prune_checkpoint(folders[name], plan, ours, allow_uneven=True)
    model, processor = load(folders[name])
    prune_(model, plan, allow_uneven=True)
    save(model, processor, theirs, plan)
    assert_equal(ours, theirs)
    for file in ("config.json", PLAN_FILE):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}


def test_plain_transformers_loads_several_files_of_a_retyped_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("slimvlm.pruning.layout.SHARD_BYTES", 60_000)
    plan, out = Plan.everything(sv.anatomy(folders["llava-llama"])), tmp_path / "out"
    plan = replace(plan, kv_groups=((0, 1, 3),) * plan.before.num_layers)
    assert plan.needs_retype
    prune_checkpoint(folders["llava-llama"], plan, out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = auto_class(AutoConfig.from_pretrained(out)).from_pretrained(out, dtype=torch.float32)
    model = tiny.build("llava-llama")
    prune_(model, plan)
    batch = tiny.batch(model)
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))


def test_a_plan_for_another_model_leaves_nothing(folders, tmp_path):
    plan = Plan.everything(sv.anatomy(folders["phi"]))
    with pytest.raises(ConfigError, match="plan: made for phi"):
        prune_checkpoint(folders["llama"], plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The command line
def test_the_verb_scores_alike(tmp_path):
    data = tiny_folder.write_llava_data(tmp_path / "data", 3)
    shown = ["--data", str(data), "--images", str(data.parent), "--criterion", "activation"]
    for name, flags in (("memory", []), ("disk", ["--low-memory"])):
        out = str(tmp_path / name)
        main(["score", str(tiny_folder.folder("llava")), "--out", out, *shown, *flags])
    assert_same(Scores.load(tmp_path / "disk"), Scores.load(tmp_path / "memory"))
    assert not list(tmp_path.glob(".*.scratch"))


@pytest.mark.parametrize(("verb", "flags", "message"), TABLE["impossible"])
def test_what_low_memory_cannot_do_is_said_at_once(verb, flags, message, tmp_path):
    model = str(tiny_folder.folder("llava"))
    asked = ["--out", str(tmp_path / "out"), "--data", "none", "--low-memory"]
    assert message in f"{refused(verb, model, *asked, *flags.split())}\n"
    with pytest.raises(ConfigError, match="needs the whole model in memory"):
        score_checkpoint(model, [], "taylor_mix")
