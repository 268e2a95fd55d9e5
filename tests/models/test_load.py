"""Where models run: any accelerator that torch finds, or the device that a user names."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

import slimvlm as sv
from slimvlm.core.documents import asked
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, LoadConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.devices import computes_bfloat16, device_named, free_memory, with_float64
from slimvlm.models.load import check_models, load_as
from slimvlm.models.parts import text_config_of
from slimvlm.runs.compress import compress_command, option_values, read_config
from slimvlm.runs.recipe import decide
from slimvlm.runs.study import prepared
from slimvlm.runs.study.config import Grid, StudyConfig
from tests import tiny_folder as folders
from tests.handmade import logits
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

CPU = torch.device("cpu")
TEXT = {"input_ids": torch.tensor([[5, 9, 30, 31, 77]])}


@pytest.fixture
def two_of(monkeypatch, request):
    """A machine with two accelerators of a kind."""
    kind = request.param
    known = {"current_accelerator": torch.device(kind), "is_available": True, "device_count": 2}
    for name, value in known.items():
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    return kind


@pytest.mark.parametrize("two_of", ["cuda", "xpu", "mps"], indirect=True)
def test_each_process_has_an_accelerator_of_its_own(two_of, monkeypatch):
    assert device_named() == torch.device(two_of, 0)
    assert device_named("cpu") == CPU
    assert device_named(f"{two_of}:1") == torch.device(two_of, 1)
    for rank in (0, 1, 2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device_named(None) == device_named(two_of) == torch.device(two_of, rank % 2)
    for name in (f"{two_of}:2", "tpu", "gpu", "", "cuda:x"):
        with pytest.raises(ConfigError, match=f"device '{name}' must be one of: cpu, {two_of}"):
            device_named(name)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert device_named("cpu") == CPU
    with pytest.raises(ConfigError, match=rf"device '{two_of}:1': each of 3 processes"):
        device_named(f"{two_of}:1")


@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_a_device_is_checked_before_anything_is_read(name, tmp_path):
    model, out = str(folders.folder("text")), tmp_path / "out"
    config = CompressConfig(ratio=0.3, device=name, data=str(tmp_path / "none.json"))
    for work in (
        lambda: sv.load(model, device=name),
        lambda: sv.compress(model, config, out, say=silent),
        lambda: sv.score_checkpoint("nowhere", device=name),
        lambda: sv.walk_checkpoint("nowhere", (), out, 0.3, device=name),
        lambda: sv.quantize("nowhere", out, device=name),
        lambda: check_models(LoadConfig(device=name), "nowhere"),
    ):
        with pytest.raises(ConfigError, match=f"device '{name}' must be one of: cpu"):
            work()
    assert not out.exists()


@pytest.mark.parametrize(
    "how", [{"device": "cuda:1"}, {"attn_implementation": "eager", "device_map": "auto"}]
)
def test_where_and_how_a_model_is_read_is_no_part_of_what_is_asked(how, tmp_path):
    plain = CompressConfig(ratio=0.3)
    chosen = replace(plain, **how)
    assert chosen == plain
    assert asked(chosen) == asked(plain)
    assert not how.keys() & asked(chosen).keys()
    device = " --device cuda:1" if "device" in how else ""
    command = compress_command("demo", chosen, "out")
    assert device in command
    assert device or command == "slimvlm compress --config out/run.yaml --out out"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(option_values("demo", chosen)))
    again = read_config(tmp_path / "run.yaml")[1]
    assert {name: getattr(again, name) for name in how} == how
    for name, value in how.items():
        study = StudyConfig(grids=(Grid(ratio=(0.3,), model=("m",)),), prune={name: value})
        with pytest.raises(ConfigError, match=f"'{name}' changes no result"):
            prepared(study, silent)
    if "device_map" in how:
        with pytest.raises(ConfigError, match="device_map 'auto' cannot be used with training"):
            decide("demo", replace(chosen, data="d", recover=RecoverConfig()))


def test_a_study_has_the_same_stages_on_every_device():
    study = StudyConfig(grids=(Grid(ratio=(0.3,), model=(str(folders.folder("text")),)),))
    names = []
    for device in (None, "cpu"):
        stages = prepared(study, silent, device)[1].stages()
        assert {stage.recipe.device for stage in stages} == {device}
        names.append([stage.name for stage in stages])
    assert names[0] == names[1]


def test_a_run_goes_on_elsewhere(tmp_path, monkeypatch):
    """A run that began without a device, and was stopped, goes on with one."""
    model, out = str(folders.folder("text")), tmp_path / "run"
    config = CompressConfig(ratio=0.3, axis="width", criterion=("magnitude",), repair="none")
    with monkeypatch.context() as patch:
        patch.setattr("slimvlm.runs.compress.finish", lambda run, plan: None)
        sv.compress(model, config, out, say=silent)
    said = []
    sv.compress(model, replace(config, device="cpu"), out, say=said.append)
    assert any("resuming" in line for line in said), said
    found, again = read_config(out / "run.yaml")
    assert (found, again.device, again) == (model, "cpu", replace(config, recover=None))


@pytest.mark.parametrize(
    ("kind", "name"),
    tiered(product(["text", "llava"], ["eager", "sdpa"]), lambda *case: case == ("llava", "eager")),
)
def test_attention_and_device_map_are_those_that_were_asked_for(kind, name, tmp_path):
    model, words = sv.load(folders.folder(kind), device="cpu")
    chosen, _ = load_as(LoadConfig(attn_implementation=name, device="cpu"), folders.folder(kind))
    assert chosen.config._attn_implementation == name
    assert text_config_of(chosen.config)._attn_implementation == name
    assert_close(logits(chosen, TEXT), logits(model, TEXT), FORWARD)
    sv.save(chosen, words, tmp_path / "out")
    assert "_attn" not in (tmp_path / "out" / "config.json").read_text()
    placed, _ = load_as(LoadConfig(device_map="auto"), folders.folder(kind))
    on = {key: value.to(placed.device) for key, value in TEXT.items()}
    assert_close(logits(placed, on).cpu(), logits(model, TEXT), FORWARD)
    whole, _ = load_as(LoadConfig(device_map="auto"), folders.folder(kind), "cpu")
    assert not hasattr(whole, "hf_device_map")  # a teacher's place is told


WRONG = yaml.safe_load(Path(__file__).with_name("load.yaml").read_text())


@pytest.mark.parametrize(("values", "told"), WRONG)
def test_how_a_model_is_read_is_checked_before_its_weights(values, told, tmp_path, monkeypatch):
    for number in (2, 3):
        name = f"transformers.utils.import_utils.is_flash_attn_{number}_available"
        monkeypatch.setattr(name, lambda: False)
    folder = folders.copied("text", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for work in (
        lambda: sv.load(folder, **values),
        lambda: check_models(LoadConfig(**values), str(folder)),
    ):
        with pytest.raises(ConfigError, match=told) as refusal:
            work()
        assert "\n" not in str(refusal.value)


def test_attention_that_a_class_lacks_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_flex_attn", False)
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_supports_flex_attn", False)
    with pytest.raises(ConfigError, match="attn_implementation 'flex_attention' cannot be") as told:
        sv.load(folders.folder("text"), attn_implementation="flex_attention")
    assert "\n" not in str(told.value)


def test_bfloat16_and_float64_are_used_where_they_are_native(monkeypatch):
    card = SimpleNamespace(is_bf16_supported=lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert not computes_bfloat16(torch.device("xpu"))
    assert not computes_bfloat16(torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert not computes_bfloat16(torch.device("xpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert computes_bfloat16(CPU)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.6
    assert not computes_bfloat16(CPU)
    values = torch.zeros(2, device="meta")
    assert with_float64(values) is values
    moved = []
    monkeypatch.setattr("slimvlm.models.devices.has_float64", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append("cpu") or self)
    with_float64(values)
    assert moved == ["cpu"]


def test_free_memory_counts_a_containers_limit_and_what_torch_keeps(tmp_path, monkeypatch):
    limit, used = tmp_path / "most", tmp_path / "taken"
    monkeypatch.setattr("slimvlm.models.devices.CONTAINER_LIMITS", [(limit, used)])
    whole = free_memory(CPU)
    limit.write_text("1000\n")
    used.write_text("400\n")
    assert free_memory(CPU) == 600
    for pages in ("inactive_file 150\n", "inactive_file 1\ntotal_inactive_file 150\n"):  # v2, v1
        (tmp_path / "memory.stat").write_text(f"anon 5\n{pages}active_file 7\n")
        assert free_memory(CPU) == 750
    limit.write_text("max\n")
    assert free_memory(CPU) == pytest.approx(whole, rel=0.5)
    found = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 20}
    xpu = SimpleNamespace(**{k: lambda device, v=v: v for k, v in found.items()})
    monkeypatch.setattr(torch, "get_device_module", lambda device: xpu)
    assert free_memory(torch.device("xpu", 0)) == 130
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert free_memory(torch.device("mps")) == 70
    assert free_memory(CPU) > 0
