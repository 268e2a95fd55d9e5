"""Several processes train one model, and come to what one process comes to."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimvlm import cli
from slimvlm.core.errors import ConfigError
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tolerances import AFTER_ADAM, assert_close

ROOT = Path(__file__).parents[2]
OPTIONS = ("--loss", "sft+hidden+kl", "--lora-rank", "4", "--learning-rate", "5e-3")
SETTINGS = """
model: original
ratio: 0.3
recover: {bf16: false, trainer: {logging_steps: 1}, lora: {lora_alpha: 8, lora_dropout: 0}}
"""
"""A file of ``--config``, for what has no flag."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data and a pruned model."""
    home = tmp_path_factory.mktemp("ranks")
    seeing = folders.write_llava_data(home / "data", count=8)
    blind = folders.write_llava_data(home / "blind", count=8, pictures=False)
    pairs = zip(json.loads(seeing.read_text()), json.loads(blind.read_text()), strict=True)
    mixed = [(row, other | {"id": f"blind {other['id']}"}) for row, other in pairs]
    (home / "data" / "mixed.json").write_text(json.dumps([row for pair in mixed for row in pair]))
    (home / "settings.yaml").write_text(SETTINGS)
    pruned = str(home / "pruned")
    asked = ["--ratio", "0.3", "--criterion", "magnitude", "--out", pruned]
    cli.main(["prune", str(folders.folder("llava")), *asked])
    return home


def command(home, out, *options, file="data.json"):
    data = str(home / "data" / file)
    given = ["--teacher", str(folders.folder("llava")), "--data", data, "--out", str(home / out)]
    given += ["--config", str(home / "settings.yaml")]
    return ["recover", str(home / "pruned"), *given, *OPTIONS, *options]


def torchrun(arguments, count=2):
    """The command line in several processes on this machine's CPU."""
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    many = [*start, "--nproc-per-node", str(count), "-m", "slimvlm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [*many, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def history(home, out):
    return json.loads((home / out / "slimvlm_history.json").read_text())


def train_twice(home, name, batch, options, file):
    """Train in two processes and in one with twice the batch; return what two of them say."""
    done = torchrun(command(home, name, "--batch-size", str(batch), *options, file=file))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [option for option in options if option != "--shard"]
    cli.main(command(home, f"{name}-alone", "--batch-size", str(2 * batch), *alone, file=file))
    found, expected, before = (
        load_file(home / out / "model.safetensors") for out in (name, f"{name}-alone", "pruned")
    )
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert_close(found[key], value, AFTER_ADAM)
    assert any(float((found[key] - before[key]).abs().max()) > 1e-3 for key in found)
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--shard",), ("--shard", "--train", "full")],
    ids=" ".join,
)
def test_two_processes_are_one_with_twice_the_batch(options, home):
    """On the same samples, with whole models (DDP) and with divided ones (FSDP2)."""
    name = "-".join(("two", *options)).replace("--", "")
    said = train_twice(home, name, 2, (*options, "--max-steps", "2"), "data.json")
    assert said.count("trained on 8 samples") == 1, "one process alone talks"
    ours, theirs = history(home, name), history(home, f"{name}-alone")
    assert ours["sample_ids"] == theirs["sample_ids"]
    for row, other in zip(ours["steps"], theirs["steps"], strict=True):
        for key in ("loss_sft", "loss_hidden", "loss_kl"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    assert ("sharded" in ours["teacher"]) == ("--shard" in options)
    assert not [path for path in home.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--train", "projector"), ("--train", "full", "--gradient-checkpointing")],
    ids=" ".join,
)
def test_a_process_without_pictures_keeps_up(options, home):
    """Half of the samples have none, and one sample is a process's share of a step."""
    name = "-".join(("mixed", *options)).replace("--", "")
    train_twice(home, name, 1, ("--max-steps", "8", *options), "mixed.json")


@pytest.mark.slow
def test_a_divided_model_wants_pictures_everywhere_or_nowhere(home):
    done = torchrun(command(home, "never", "--shard", file="mixed.json"))
    assert done.returncode != 0
    assert re.search(r"sample 'blind s\d' has no image and others have", done.stderr)
    assert not (home / "never").exists()


def test_one_process_cannot_shard(home):
    assert "torchrun" in refused(*command(home, "never", "--shard"))
    assert not (home / "never").exists()
    with pytest.raises(ConfigError, match="torchrun"):
        load(home / "pruned", shard=True)
