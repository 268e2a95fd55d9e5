"""A compression that is only looked at, and options from a file."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimvlm import cli
from slimvlm.cli import parsed
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.load import anatomy
from slimvlm.runs import dry_run, estimate
from slimvlm.runs.command import compress_command, config_text, read_config
from slimvlm.runs.dry_run import foresee, foreseen_rows
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")
MODEL = str(folders.folder("llava"))
FULL = CompressConfig(
    ratio=0.25,
    axis="both",
    criterion=("block_influence", "taylor"),
    data="my data.json",
    protect=(2, 1),
    pad=True,
    tasks="name",
    recover=RecoverConfig(train="lora", loss="sft+hidden", fraction=0.05),
)
CONFIGS = [FULL, replace(FULL, recover=None), CompressConfig(ratio=0.5, axis="depth")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return folders.write_llava_data(tmp_path / "data", count=20)


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `compress` was called with."""
    seen: list[Any] = []

    def record(model: str, config: CompressConfig, out: Path, *rest: Any) -> dict[str, Any]:
        seen.extend((model, config, out))
        return {}

    monkeypatch.setattr("slimvlm.runs.compress.compress", record)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_survives_its_file(
    config: CompressConfig, tmp_path: Path, compressed: list[Any]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_text("my model", config))
    assert read_config(path)[:2] == ("my model", config)
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed == ["my model", config, Path("out")]


def test_the_command_line_comes_on_top(tmp_path: Path, compressed: list[Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_text("my model", FULL))
    cli.main(["compress", "other", f"--config={path}", "--ratio", "0.4", "--out", "out"])
    assert compressed[:2] == ["other", replace(FULL, ratio=0.4)]


def test_a_file_that_is_silent_on_training_leaves_it_to_the_chart(
    tmp_path: Path, compressed: list[Any]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "ratio": 0.1, "data": "d.json"}))
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed[1].recover.train == "projector"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 0.3", "must name a model"),
        ("- 1", "must name a model"),
        ("model: m\nratoi: 0.3", "ratoi"),
        ("model: m\nratio: much", "ratio"),
        ("model: m\nrecover: {train: half}", "train"),
        ("model: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as failure:
        parsed("compress", ["--config", str(path)])
    assert "run.yaml" in str(failure.value)


def test_a_run_can_be_given_back(data: Path, tmp_path: Path, compressed: list[Any]) -> None:
    from slimvlm.runs.compress import STAGES  # noqa: F401

    command = ["compress", MODEL, "--ratio", "0.3", "--axis", "width", "--data", str(data)]
    cli.main([*command, "--samples", "6", "--train", "none", "--out", "first"])
    first = list(compressed)
    written = tmp_path / "run.yaml"
    written.write_text(config_text(first[0], first[1]))
    compressed.clear()
    cli.main(["compress", "--config", str(written), "--out", "second"])
    assert compressed == [*first[:2], Path("second")]
    assert shlex.split(compress_command(*first))[:3] == ["slimvlm", "compress", MODEL]


def config_for(data: Path, **changes: Any) -> CompressConfig:
    recover = RecoverConfig(train="lora", loss="sft", max_steps=2)
    values = {"ratio": 0.3, "axis": "width", "data": str(data), "samples": 6, "recover": recover}
    return CompressConfig(**{**values, **changes})


def test_a_dry_run_says_what_would_be_done_and_reads_no_weight(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "device_flops", lambda *_: 1e9)
    model = folders.copied("llava", tmp_path / "model")
    (model / "model.safetensors").unlink()
    found = foresee(str(model), config_for(data), silent)
    assert found.plan.ratio == pytest.approx(0.3, abs=0.02)
    assert found.plan.before == anatomy(str(model))
    assert (found.calibration, found.training, found.report) == (6, 10, 4)
    assert found.dtype == "float32"
    assert found.cost.training_hours > 0
    more = foresee(str(model), config_for(data, samples=12), silent).cost
    assert more.pruning_hours > found.cost.pruning_hours
    assert {path.name for path in tmp_path.iterdir()} == {"data", "model"}


def test_a_dry_run_says_what_memory_has_no_room_for(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(data, device="cpu")

    def rows() -> dict[str, str]:
        return {row[0]: row[1] for row in foreseen_rows(foresee(MODEL, config, silent))}

    enough = rows()
    assert " in host memory (" in enough["hidden states"]
    assert enough["memory of pruning"].endswith(" on cpu")
    assert enough["memory of training"].endswith(" on cpu")
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 2**20)
    little = rows()
    assert ", more than the 1.0 MiB free on cpu: prune --low-memory" in little["memory of pruning"]
    assert (
        ", more than the 1.0 MiB free on cpu: a smaller --batch-size"
        in little["memory of training"]
    )


def test_a_dry_run_chooses_tokens(data: Path) -> None:
    found = foresee(MODEL, config_for(data, vocab_size=300), silent)
    assert found.plan.after.vocab_size == 300
    alone = foresee(MODEL, config_for(data, ratio=None, vocab_size=300), silent)
    assert alone.plan.layers == tuple(range(4))
    assert not alone.plan.cuts_layers


def test_a_dry_run_refuses_what_the_run_would_refuse(data: Path) -> None:
    with pytest.raises(ConfigError, match="task 'nothing'"):
        foresee(MODEL, config_for(data, tasks="nothing"), silent)
    with pytest.raises(ConfigError, match="criterion 'none'"):
        foresee(MODEL, config_for(data, criterion=("none",)), silent)


def test_the_flag_writes_nothing(
    data: Path, tmp_path: Path, compressed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", MODEL, "--ratio", "0.3", "--axis", "auto", "--data", str(data)]
    words += ["--samples", "6", "--train", "none", "--dry-run", "--out", str(tmp_path / "run")]
    cli.main(words)
    shown = capsys.readouterr().out
    assert "are tried" in shown
    assert "memory of pruning" in shown
    assert "memory of training" not in shown
    cli.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == 4
    assert compressed == []
    assert not (tmp_path / "run").exists()
