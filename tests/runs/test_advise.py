"""Advice follows the rules, meets its budget, says where numbers come from, and can be run.

A dry run says what a compression would do, and refuses what it would refuse.
"""

import json
import re
import shlex
from dataclasses import fields, replace
from itertools import product

import psutil
import pytest
import torch

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.load import anatomy, load_config, load_processor
from slimvlm.runs import advise as module
from slimvlm.runs import cost
from slimvlm.runs.advise import Advice, advice_rows, advise, dry_run, dry_run_rows
from slimvlm.runs.chart import chart_row, rules
from slimvlm.runs.recipe import decide
from slimvlm.runs.tables import anatomy_rows
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tables import tables

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")
FOLDER = str(folders.folder("llava"))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with the configuration of a tiny LLaVA and no weights; the machine has a speed."""
    tiny.build("llava-llama").config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(cost, "device_flops", lambda *_: 1e11)
    return str(tmp_path / "model")


@pytest.fixture
def large(model, monkeypatch):
    """The anatomy of LLaVA-1.5-7B, which every model has."""
    shape = anatomy(model)
    layer = replace(
        shape.layers[0],
        **{"num_kv_heads": 32, "queries_per_group": 1, "head_dim": 128, "intermediate_size": 11008},
        **{"kv_group_params": 4 * 128 * 4096, "neuron_params": 3 * 4096, "fixed_params": 8192},
    )
    whole = replace(shape, hidden_size=4096, layers=(layer,) * 32, embedding_params=131_072_000)
    whole = replace(whole, head_params=131_072_000, vision_params=300_000_000)
    monkeypatch.setattr(module, "anatomy_of", lambda _: whole)
    return whole


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("data", [True, False])
def test_advice_is_what_compress_would_do(model, ratio, data):
    found = advise(model, ratio=ratio, data=data, gpu=True)
    assert found.recipe == chart_row(ratio, data)
    assert found.expected == ()  # nothing was measured of models this small
    assert found.recipe.source in " ".join(found.notes)
    before, after = found.params
    assert (before - after) / anatomy(model).backbone_params == pytest.approx(ratio, abs=1e-3)


@pytest.mark.usefixtures("large")
def test_expected_values_are_those_of_the_table(model):
    found = advise(model, ratio=0.3, gpu=True)
    first = found.expected[0]
    assert (first.model, first.same) == ("LLaVA-1.5-7B", True)
    assert first.percent == pytest.approx(96.38, abs=0.02)
    assert first.source == "arXiv:2604.24380, Table 5"
    assert not any(row.same for row in found.expected[1:])
    assert found.latency == pytest.approx(0.7, abs=0.03)  # as in the ideal
    for ratio, data in product((0.15, 0.3, 0.45, 0.6), (True, False)):
        assert len(advise(model, ratio=ratio, data=data, gpu=True).expected) >= 3


@pytest.mark.usefixtures("large")
def test_a_large_model_is_not_trained_without_a_gpu_and_costs_grow(model):
    with_gpu, without = (advise(model, ratio=0.3, gpu=gpu) for gpu in (True, False))
    assert with_gpu.recipe.train == "lora"
    assert 0.1 < with_gpu.cost.training_hours < 100
    assert "A100" in " ".join(with_gpu.cost.rests_on)
    assert without.recipe.train is None
    assert without.recipe.axis == "width"
    assert "not trained" in without.notes[0]
    assert "--train none" in without.command
    fast = advise(model, target_latency=0.77, gpu=False)  # along width, not depth
    assert (fast.recipe.train, fast.latency <= 0.77) == (None, True)
    assert advise(model, ratio=0.3, gpu=False, samples=20).recipe.train == "lora"
    whole_batches = (160, 1600)
    few, many = (advise(model, ratio=0.3, gpu=True, samples=n).cost for n in whole_batches)
    assert many.training_hours == pytest.approx(10 * few.training_hours)
    weights = 2 * 7.06e9
    assert many.training_bytes == few.training_bytes > weights
    # on a GPU the original and the smaller model, which are timed in turn; on a CPU the original,
    # new weights, a layer that learns and the process
    assert many.calibration_bytes == pytest.approx(1.7 * weights, rel=0.05)
    on_cpu = advise(model, ratio=0.3, gpu=False).cost.calibration_bytes
    assert on_cpu == pytest.approx(1.7 * weights + 0.65e9 + 2.9e9, rel=0.1)


@pytest.mark.parametrize("budget", [{"target_params": "120k"}, {"target_memory": "0.24MB"}])
def test_a_size_is_met(model, budget):
    found = advise(model, gpu=True, **budget)
    assert 0 < found.ratio < 1
    assert found.params[1] == pytest.approx(120_000, rel=1e-3)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.6])
def test_a_latency_is_met_by_the_least_ratio(model, share):
    found = advise(model, target_latency=share, gpu=True)
    assert found.latency <= share
    asked = CompressConfig(target_latency=share, axis="chart", data="demo")
    assert found.ratio == decide(model, asked, anatomy(model)).ratio
    assert f"--axis auto --data DATA.json --target-latency {share} --train" in found.command


@pytest.mark.parametrize(("budget", "message"), TABLES["impossible"])
def test_impossible_budgets_are_refused(model, budget, message):
    with pytest.raises(SlimError, match=message):
        advise(model, gpu=True, **budget)


def test_the_verb_prints_json_and_refuses_contradictions(model, capsys):
    cli.main(["advise", model, "--ratio", "0.3", "--gpu", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {field.name for field in fields(Advice)}
    cli.main(["advise", model, "--ratio", "0.3", "--no-data", "--no-gpu"])
    assert "arXiv:2604.24380, Table 2" in capsys.readouterr().out
    for words in (["--gpu", "--no-gpu"], ["--data", "mine.jsonl"]):
        assert refused("advise", model, "--ratio", "0.3", *words)


def test_expected_values_are_of_as_many_layers(model, large, monkeypatch):
    """30 % of the backbone of a model that is half embeddings is 60 % of its layers."""
    plain = advise(model, ratio=0.3, gpu=True)
    layers = sum(layer.params for layer in large.layers)
    wordy = replace(large, embedding_params=layers // 2, head_params=layers - layers // 2)
    monkeypatch.setattr(module, "anatomy_of", lambda _: wordy)
    found = advise(model, ratio=0.3, gpu=True)
    assert plain.decoder_ratio == pytest.approx(0.3 * large.backbone_params / layers)
    assert found.decoder_ratio == pytest.approx(0.6)
    assert any("60% of its layers" in note for note in found.notes)
    assert not any("of its layers" in note for note in plain.notes)
    assert found.expected == ()  # along depth with LoRA nothing was measured where so many went
    untrained = advise(model, ratio=0.3, gpu=True, data=False)
    values = {row.model: row.percent for row in untrained.expected}
    curve = next(row for row in rules().retention if row.model == "LLaVA-1.5-7B")
    assert values["LLaVA-1.5-7B"] == pytest.approx(curve.at(0.6 * 0.961))


def test_experts_are_spoken_of_and_tokens_go_first_where_there_are_many(tmp_path):
    model = tiny.build("qwen3_moe")
    model.save_pretrained(tmp_path / "mixture")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    found = advise(str(tmp_path / "mixture"), ratio=0.3, gpu=True, data=False)
    rows = anatomy(str(tmp_path / "mixture"))
    routers = sum(4 * rows.hidden_size for layer in rows.layers if layer.num_experts)
    share = (experts + routers) / rows.backbone_params
    assert any(note.startswith(f"{share:.0%} of the backbone are experts") for note in found.notes)
    plain = advise(str(folders.folder("text")), ratio=0.3, gpu=True, data=False)
    assert not any("experts" in note for note in plain.notes)
    model = str(folders.folder("text"))
    shape = anatomy(model)
    layers = sum(layer.params for layer in shape.layers)
    assert 1 - layers / shape.backbone_params > rules().tokens_first.from_share
    found = advise(model, ratio=0.3, gpu=True)
    words = shlex.split(found.command)
    size = int(words[words.index("--vocab-size") + 1])
    processor = load_processor(model, load_config(model))
    assert len(sv.choose_tokens(processor, folders.short_samples(4, sees=False), size)) == size
    assert rules().tokens_first.source in " ".join(found.notes)
    gone = found.token_share * shape.backbone_params + found.decoder_ratio * layers
    assert gone == pytest.approx(0.3 * shape.backbone_params)
    assert 0 < found.token_share < 0.3
    for asked in ({"ratio": 0.3, "data": False}, {"target_latency": 0.8}):
        whole = advise(model, gpu=True, **asked)  # nothing to count; fewer tokens are no faster
        assert whole.token_share == 0
        assert "--vocab-size" not in whole.command
        assert whole.decoder_ratio == pytest.approx(whole.ratio * shape.backbone_params / layers)


def test_no_token_is_advised_to_go_that_cannot(model, monkeypatch):
    assert not any("no token" in note for note in advise(model, ratio=0.3, gpu=True).notes)
    wordy = replace(anatomy(model), vocab_size=2000, embedding_params=2000 * 64, head_params=0)
    monkeypatch.setattr(module, "anatomy_of", lambda _: wordy)
    found = advise(model, ratio=0.3, gpu=True)
    assert any("can be removed: the model has no tokenizer" in note for note in found.notes)
    assert "--vocab-size" not in found.command


def test_only_models_of_about_its_size_say_what_to_expect(model, large, monkeypatch):
    def named():
        return {row.model for row in advise(model, ratio=0.3, gpu=True, data=False).expected}

    assert named() == {"LLaVA-1.5-7B", "Mini-InternVL-4B", "Bunny-3B"}
    small = replace(large, hidden_size=1, layers=large.layers[:2], embedding_params=0)
    monkeypatch.setattr(module, "anatomy_of", lambda _: replace(small, head_params=0))
    assert named() == {"demo"}


@pytest.fixture
def data(tmp_path):
    return folders.write_llava_data(tmp_path / "data", count=20)


def config_for(data, **changes):
    recover = RecoverConfig(train="lora", loss="sft", max_steps=2)
    values = {"ratio": 0.3, "axis": "width", "data": str(data), "samples": 6, "recover": recover}
    return CompressConfig(**{**values, **changes})


def test_a_dry_run_says_what_would_be_done_and_reads_no_weight(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "device_flops", lambda *_: 1e9)
    model = folders.copied("llava", tmp_path / "model")
    (model / "model.safetensors").unlink()
    found = dry_run(str(model), config_for(data), silent)
    assert found.plan.ratio == pytest.approx(0.3, abs=0.02)
    assert found.plan.before == anatomy(str(model))
    assert (found.calibration, found.training, found.report) == (8, 10, 4)  # 2 are general text
    assert found.dtype == "float32"
    assert found.cost.training_hours > 0
    more = dry_run(str(model), config_for(data, samples=12), silent).cost
    assert more.pruning_hours > found.cost.pruning_hours
    assert {path.name for path in tmp_path.iterdir()} == {"data", "model"}


def test_a_dry_run_says_what_memory_has_no_room_for(data, monkeypatch):
    config = config_for(data, device="cpu")

    def rows():
        return {row[0]: row[1] for row in dry_run_rows(dry_run(FOLDER, config, silent))}

    enough = rows()
    assert " in host memory (" in enough["hidden states"]
    assert enough["memory of pruning"].endswith(" on cpu")
    assert enough["memory of training"].endswith(" on cpu")
    monkeypatch.setattr(module, "free_memory", lambda device: 2**20)
    little = rows()
    for name, cure in (("pruning", "prune --low-memory"), ("training", "a smaller --batch-size")):
        assert f", more than the 1.0 MiB free on cpu: {cure}" in little[f"memory of {name}"]


def test_a_busy_machine_changes_no_estimate_and_is_told_beside_it(model, data, monkeypatch):
    def found(load):
        monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
        ways = advise(model, ratio=0.3, gpu=False), dry_run(FOLDER, config_for(data), silent)
        hours = [(way.cost.pruning_hours, way.cost.training_hours) for way in ways]
        return hours, [*advice_rows(ways[0]), *dry_run_rows(ways[1])]

    monkeypatch.setattr(psutil, "cpu_count", lambda: 2 * torch.get_num_threads())
    cores = 2 * torch.get_num_threads()
    (idle, quiet), (busy, loud) = found(0.0), found(1.5 * cores)
    assert busy == idle
    assert not any("busy" in " ".join(row) for row in quiet)
    line = f"this machine is busy: load {1.5 * cores:.1f} on {cores} cores; "
    assert loud.count(["load", f"{line}expect at least 2.0 times as long"]) == 2
    assert advise(model, ratio=0.3, gpu=True).cost.load == ""


FLAG = re.compile(r"(?:\b([a-z]+) )?(--[a-z][a-z-]+)")


@pytest.mark.slow
def test_every_option_that_is_suggested_is_one_of_its_verb(tmp_path, data, monkeypatch, capsys):
    """Without a verb before it, it is an option of the command that said so."""
    tiny.build("qwen3_moe").save_pretrained(tmp_path / "mixture")
    names, said = [FOLDER, str(folders.folder("text")), str(tmp_path / "mixture")], []
    for name, has_data in product(names, (True, False)):
        for asked in ({"ratio": 0.3}, {"ratio": 0.6}, {"target_latency": 0.8}):
            found = advise(name, data=has_data, gpu=True, **asked)
            verb, *words = shlex.split(found.command)[1:]
            assert cli.parsed(verb, words)["model"] == name
            said += [("advise", " ".join(row)) for row in advice_rows(found)]
    monkeypatch.setattr(module, "free_memory", lambda device: 2**20)
    config = config_for(data, vocab_size=300)
    said += [("compress", " ".join(r)) for r in dry_run_rows(dry_run(FOLDER, config, silent))]
    said += [("inspect", " ".join(row)) for name in names for row in anatomy_rows(anatomy(name))]
    found = {(by, word, flag) for by, text in said for word, flag in FLAG.findall(text)}
    named = {(word if word in cli.VERBS else by, flag) for by, word, flag in found}
    assert {("compress", "--experts"), ("prune", "--low-memory")} < named
    for verb, flag in named:
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        assert f"{flag} " in capsys.readouterr().out, (verb, flag)


def test_a_dry_run_chooses_tokens_and_refuses_what_the_run_would_refuse(data):
    found = dry_run(FOLDER, config_for(data, vocab_size=300), silent)
    assert found.plan.after.vocab_size == 300
    alone = dry_run(FOLDER, config_for(data, ratio=None, vocab_size=300), silent)
    assert alone.plan.layers == tuple(range(4))
    assert not alone.plan.cuts_layers
    for wrong, told in (({"tasks": "nothing"}, "task"), ({"criterion": ("nothing",)}, "criterion")):
        with pytest.raises(ConfigError, match=f"{told} 'nothing'"):
            dry_run(FOLDER, config_for(data, **wrong), silent)


def test_the_flag_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("slimvlm.runs.compress.compress", lambda *_: pytest.fail("it was run"))
    words = ["compress", FOLDER, "--ratio", "0.3", "--axis", "auto", "--data", str(data)]
    words += ["--samples", "6", "--train", "none", "--dry-run", "--out", str(tmp_path / "run")]
    cli.main(words)
    shown = capsys.readouterr().out
    assert "are tried" in shown
    assert "memory of pruning" in shown
    assert "memory of training" not in shown
    cli.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == 4
    assert not (tmp_path / "run").exists()
