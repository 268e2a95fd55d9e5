"""A configuration as a command and as a file: both give it back."""

from __future__ import annotations

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
from slimvlm.runs.command import compress_command, config_text, read_config

LORA = RecoverConfig(train="lora", fraction=0.05, trainer={"weight_decay": 0.1})
FULL = CompressConfig(
    ratio=0.25,
    axis="both",
    criterion=("block_influence", "taylor"),
    **{"data": "my data.json", "protect": (2, 1), "tasks": "name", "limit": 3},
    recover=LORA,
)
CONFIGS = [
    FULL,
    replace(FULL, recover=None),
    CompressConfig(ratio=0.3, axis="width", criterion=("activation",)),
    CompressConfig(ratio=0.5, axis="depth", data="demo", units=("neuron",)),
    CompressConfig(
        **{"ratio": 0.5, "axis": "depth", "data": "demo", "seed": 3, "allocation": "balanced"},
        **{"tasks": "name,pope", "task_folder": "mine", "batch_size": 4, "floors": True},
        recover=RecoverConfig(train="full", loss="sft", batch_size=2, seed=3),
    ),
]


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `compress` was called with last."""
    seen: list[Any] = []

    def record(model: str, config: CompressConfig, out: Path, *rest: Any) -> dict[str, Any]:
        seen[:] = model, config, out
        return {}

    monkeypatch.setattr("slimvlm.runs.compress.compress", record)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
def test_a_command_and_a_file_give_the_configuration_back(
    config: CompressConfig,
    tmp_path: Path,
    compressed: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option without a flag makes the command read the run's own file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out folder").mkdir()
    (tmp_path / "out folder" / "run.yaml").write_text(config_text("my model", config))
    command = shlex.split(compress_command("my model", config, "out folder"))
    has_no_flag = config.floors or (config.recover is not None and bool(config.recover.trainer))
    assert command[:3] == ["slimvlm", "compress", "--config" if has_no_flag else "my model"]
    cli.main(command[1:])
    assert compressed == ["my model", config, Path("out folder")]
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


def test_a_run_can_be_given_back(tmp_path: Path, compressed: list[Any]) -> None:
    words = ["my model", "--ratio", "0.3", "--axis", "width", "--data", "data.json"]
    cli.main(["compress", *words, "--samples", "6", "--train", "none", "--out", "first"])
    model, config, _ = compressed
    path = tmp_path / "run.yaml"
    path.write_text(config_text(model, config))
    cli.main(["compress", "--config", str(path), "--out", "second"])
    assert compressed == [model, config, Path("second")]
