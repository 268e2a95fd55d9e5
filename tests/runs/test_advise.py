"""Advice follows the rules, meets its budget, says where numbers come from, and can be run."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.load import anatomy, load_config, load_processor
from slimvlm.runs import advise as module
from slimvlm.runs import estimate
from slimvlm.runs.advise import Advice, advise
from slimvlm.runs.command import compress_command
from slimvlm.runs.compress import request_of
from slimvlm.runs.estimate import Sizes, estimate_cost, learning_params
from slimvlm.runs.recipes import Recipe, recipe_for, rules
from slimvlm.runs.request import resolved
from slimvlm.training.trainable import prepare_training
from tests import tiny
from tests import tiny_folder as folders


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the configuration of a tiny LLaVA and no weights; the machine has a speed."""
    tiny.build("llava-llama").config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(estimate, "device_flops", lambda *_: 1e11)
    return str(tmp_path / "model")


def as_7b(monkeypatch: pytest.MonkeyPatch, shape: Anatomy) -> None:
    """Makes every model look like LLaVA-1.5-7B."""
    layer = replace(
        shape.layers[0],
        **{"num_kv_heads": 32, "queries_per_group": 1, "head_dim": 128, "intermediate_size": 11008},
        **{"kv_group_params": 4 * 128 * 4096, "neuron_params": 3 * 4096, "fixed_params": 8192},
    )
    whole = replace(shape, hidden_size=4096, layers=(layer,) * 32, embedding_params=131_072_000)
    whole = replace(whole, head_params=131_072_000, vision_params=300_000_000)
    monkeypatch.setattr(module, "anatomy_of", lambda _: whole)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("data", [True, False])
def test_advice_is_what_compress_would_do(model: str, ratio: float, data: bool) -> None:
    found = advise(model, ratio=ratio, data=data, gpu=True)
    assert found.recipe == recipe_for(ratio, data)
    assert found.recipe.source in " ".join(found.notes)
    before, after = found.params
    assert (before - after) / anatomy(model).backbone_params == pytest.approx(ratio, abs=1e-3)


def test_expected_values_are_those_of_the_table(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_7b(monkeypatch, anatomy(model))
    found = advise(model, ratio=0.3, gpu=True)
    first = found.expected[0]
    assert (first.model, first.same) == ("LLaVA-1.5-7B", True)
    assert first.percent == pytest.approx(96.38, abs=0.02)
    assert first.source == "arXiv:2604.24380, Table 5"
    assert not any(row.same for row in found.expected[1:])
    row = next(r for r in rules().latency if r.model == "LLaVA-1.5-7B" and r.axis == "depth")
    assert found.latency == row.values[0.3]


def test_a_large_model_is_not_trained_without_a_gpu(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_7b(monkeypatch, anatomy(model))
    with_gpu, without = (advise(model, ratio=0.3, gpu=gpu) for gpu in (True, False))
    assert with_gpu.recipe.train == "lora"
    assert 0.1 < with_gpu.cost.training_hours < 100
    assert "A100" in " ".join(with_gpu.cost.rests_on)
    assert without.recipe.train is None
    assert without.recipe.axis == "width"
    assert "not trained" in without.notes[0]
    assert "--train none" in without.command
    few = advise(model, ratio=0.3, gpu=False, samples=20)
    assert few.recipe.train == "lora"


def test_costs_grow_with_what_they_rest_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_7b(monkeypatch, anatomy(model))
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


def test_weights_of_another_type_take_another_time(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {torch.float32: 1e10, torch.bfloat16: 4e10}
    monkeypatch.setattr(estimate, "device_flops", lambda device, dtype: speeds[dtype])
    config = CompressConfig(ratio=0.4, axis="width", data="demo", recover=RecoverConfig())
    sizes = Sizes(shape=anatomy(model), tokens=100.0, samples=80)
    request = resolved(request_of(model, config))
    slow, fast = (
        estimate_cost(sizes, request, torch.device("cpu"), kind) for kind in ("float32", "bfloat16")
    )
    assert slow.pruning_hours == pytest.approx(4 * fast.pruning_hours)
    assert slow.training_hours == fast.training_hours  # which computes in bfloat16 in any case


def test_a_training_costs_what_it_is_asked_for(model: str) -> None:
    def hours(**options: Any) -> float:
        recover = RecoverConfig(train="lora", loss="sft", batch_size=4, **options)
        config = CompressConfig(ratio=0.4, axis="width", data="demo", recover=recover)
        sizes = Sizes(shape=anatomy(model), tokens=100.0, samples=80)
        request = resolved(request_of(model, config))
        return estimate_cost(sizes, request, torch.device("cpu"), "float32").training_hours

    whole = hours()
    assert hours(fraction=0.25) == pytest.approx(whole / 4)
    assert hours(epochs=3) == pytest.approx(3 * whole)
    assert hours(max_steps=5) == pytest.approx(whole / 4)


@pytest.mark.parametrize("budget", [{"target_params": "120k"}, {"target_memory": "0.24MB"}])
def test_a_size_is_met(model: str, budget: dict[str, Any]) -> None:
    found = advise(model, gpu=True, **budget)
    assert 0 < found.ratio < 1
    assert found.params[1] == pytest.approx(120_000, rel=1e-3)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.6])
def test_a_latency_is_met_by_the_least_ratio(model: str, share: float) -> None:
    found = advise(model, target_latency=share, gpu=True)
    assert found.latency is not None
    assert found.latency <= share
    for ratio in (found.ratio - 0.005, found.ratio - 0.05):
        slower = advise(model, ratio=round(ratio, 4), gpu=True)
        assert slower.latency is None or slower.latency > share


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.3, "target_params": "5B"}, "exactly one"),
        ({"ratio": 1.5}, "ratio 1.5"),
        ({"target_latency": 0.05}, "fastest that was measured"),
        ({"target_latency": 2.0}, "at most 1"),
        ({"target_memory": "much"}, "target_memory 'much'"),
    ],
)
def test_impossible_budgets_are_refused(model: str, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        advise(model, gpu=True, **budget)


def test_the_verb_prints_json_and_refuses_contradictions(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["advise", model, "--ratio", "0.3", "--data", "--gpu", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {field.name for field in fields(Advice)}
    cli.main(["advise", model, "--ratio", "0.3", "--no-data", "--no-gpu"])
    assert "arXiv:2604.24380, Table 2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["advise", model, "--ratio", "0.3", "--gpu", "--no-gpu"])
    assert stop.value.code == 2


@pytest.mark.parametrize("train", ["projector", "lora", "full"])
def test_learning_parameters_are_those_that_learn(train: Any) -> None:
    net = tiny.build("llava-llama")
    expected = learning_params(anatomy(net), 0.0, train, rank=4)
    trained = prepare_training(net, RecoverConfig(train=train, lora_rank=4))
    assert expected == sum(p.numel() for p in trained.parameters() if p.requires_grad)


COMMANDS = [
    CompressConfig(ratio=0.3, axis="width", criterion=("activation",)),
    CompressConfig(
        ratio=0.25,
        axis="both",
        criterion=("block_influence", "taylor"),
        **{"data": "my data.json", "protect": (2, 1), "pad": True, "tasks": "name", "limit": 3},
        recover=RecoverConfig(train="lora", fraction=0.05, trainer={"weight_decay": 0.1}),
    ),
    CompressConfig(ratio=0.5, axis="depth", data="demo", units=("neuron",)),
    CompressConfig(
        **{"ratio": 0.5, "axis": "depth", "data": "demo", "seed": 3, "allocation": "balanced"},
        **{"tasks": "name,pope", "task_folder": "mine", "batch_size": 4, "floors": True},
        recover=RecoverConfig(train="full", loss="sft", batch_size=2, seed=3),
    ),
]


@pytest.mark.parametrize("config", COMMANDS)
def test_a_command_gives_the_configuration_back(
    config: CompressConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def record(model: str, config: CompressConfig, out: Path, *rest: Any) -> dict[str, Any]:
        seen.extend((model, config, out))
        return {}

    monkeypatch.setattr("slimvlm.runs.compress.compress", record)
    command = compress_command("my model", config, "out folder")
    cli.main(shlex.split(command)[1:])
    assert seen == ["my model", config, Path("out folder")]


def test_recipes_of_the_chart_have_expected_values(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the chart sends people, numbers exist."""
    as_7b(monkeypatch, anatomy(model))
    assert rules().retention
    for ratio in (0.15, 0.3, 0.45, 0.6):
        for data in (True, False):
            found = advise(model, ratio=ratio, data=data, gpu=True)
            assert isinstance(found.recipe, Recipe)
            assert len(found.expected) >= 3
    assert load_config(model) is not None


def test_expected_values_are_of_as_many_layers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 % of the backbone of a model that is half embeddings is 60 % of its layers."""
    as_7b(monkeypatch, anatomy(model))
    plain = advise(model, ratio=0.3, gpu=True)
    whole = module.anatomy_of(model)
    layers = sum(layer.params for layer in whole.layers)
    wordy = replace(whole, embedding_params=layers // 2, head_params=layers - layers // 2)
    monkeypatch.setattr(module, "anatomy_of", lambda _: wordy)
    found = advise(model, ratio=0.3, gpu=True)
    assert plain.decoder_ratio == pytest.approx(0.3 * whole.backbone_params / layers)
    assert found.decoder_ratio == pytest.approx(0.6)
    assert any("60% of its layers" in note for note in found.notes)
    assert not any("of its layers" in note for note in plain.notes)
    assert found.expected == ()  # along depth with LoRA nothing was measured where so many went
    untrained = advise(model, ratio=0.3, gpu=True, data=False)
    values = {row.model: row.percent for row in untrained.expected}
    curve = next(row for row in rules().retention if row.model == "LLaVA-1.5-7B")
    assert values["LLaVA-1.5-7B"] == pytest.approx(curve.at(0.6 * 0.961))


def test_experts_are_spoken_of_where_there_are_some(tmp_path: Path) -> None:
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


def test_tokens_go_first_where_they_are_many() -> None:
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


def test_with_tokens_gone_layers_lose_less_and_cost_less() -> None:
    model = str(folders.folder("text"))
    shape = anatomy(model)
    request = resolved(request_of(model, CompressConfig(ratio=0.4, axis="width", data="demo")))
    whole = Sizes(shape=shape, tokens=100.0, samples=8)
    fewer = replace(whole, vocabulary=shape.vocab_size // 3)
    assert fewer.decoder_share(0.4) < whole.decoder_share(0.4)
    assert fewer.decoder_share(fewer.token_share) == pytest.approx(0)
    costs = [
        estimate_cost(sizes, request, torch.device("cpu"), "float32") for sizes in (fewer, whole)
    ]
    assert costs[0].pruning_hours < costs[1].pruning_hours


def test_no_token_is_advised_to_go_that_cannot(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("token can go" in note for note in advise(model, ratio=0.3, gpu=True).notes)
    wordy = replace(anatomy(model), vocab_size=2000, embedding_params=2000 * 64, head_params=0)
    monkeypatch.setattr(module, "anatomy_of", lambda _: wordy)
    found = advise(model, ratio=0.3, gpu=True)
    assert any("no token can go: the model has no tokenizer" in note for note in found.notes)
    assert "--vocab-size" not in found.command


def test_only_models_of_about_its_size_say_what_to_expect(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert advise(model, ratio=0.3, gpu=True).expected == ()  # it has 100,000 parameters
    as_7b(monkeypatch, anatomy(model))
    named = {row.model for row in advise(model, ratio=0.3, gpu=True, data=False).expected}
    assert named == {"LLaVA-1.5-7B", "Mini-InternVL-4B", "Bunny-3B"}
    whole = module.anatomy_of(model)
    small = replace(whole, hidden_size=1, layers=whole.layers[:2], embedding_params=0)
    monkeypatch.setattr(module, "anatomy_of", lambda _: replace(small, head_params=0))
    named = {row.model for row in advise(model, ratio=0.3, gpu=True, data=False).expected}
    assert named == {"demo"}


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_what_a_backward_pass_keeps_is_counted_for_every_family(name: str) -> None:
    config = tiny.CONFIGS[name]()
    float32, bfloat16 = (estimate.kept_bytes(config, dtype) for dtype in ("float32", "bfloat16"))
    text = config.get_text_config()
    assert min(float32, bfloat16) > 4 * text.num_hidden_layers * text.hidden_size


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_what_a_backward_pass_keeps_is_what_a_real_one_does(name: str) -> None:
    net = tiny.build(name)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 9, (1, 64))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net.base_model(input_ids=ids, use_cache=False)
    assert estimate.kept_bytes(net.config, "float32") == pytest.approx(
        sum(kept.values()) / 64, rel=0.15
    )
