"""What older transformers find in files written with ``compat``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import auto_class
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import save
from tests import tiny
from tests.handmade import logits, random_scores

FAMILIES = (
    *("llava-llama", "llava-phi", "llava-phi3", "llava_next", "llava_onevision", "vipllava"),
    *("paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("internvl-qwen2", "internvl-llama", "internvl-phi3"),
)
NOT_IN_4 = ("idefics3", "smolvlm")
VERSIONS = {
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.1", "huggingface_hub==1.3.4", "httpx==0.28.1", "httpcore==1.0.9"),
}
READ = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
assert transformers.__version__ == sys.argv[1], transformers.__version__
def read(work):
    inputs = load_file(work + "/inputs.safetensors")
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model, report = load(work + "/out", output_loading_info=True)
    problems = {kind: found for kind, found in report.items() if found}
    assert not problems, problems
    with torch.no_grad():
        found = model.eval()(**inputs, use_cache=False).logits
    save_file({"logits": found}, work + f"/{sys.argv[1]}.safetensors")

for work in sys.argv[2:]:
    try:
        read(work)
    except Exception as error:
        print(work, str(error)[-300:])
"""


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every family, pruned and written, with its inputs and logits."""
    written = {}
    for name in (*FAMILIES, *NOT_IN_4):
        model, work = tiny.build(name), tmp_path_factory.mktemp(name)
        shape = read_anatomy(model)
        prune_(model, make_plan(shape, random_scores(shape), 0.3, "both"))
        batch = tiny.batch(model)
        batch.pop("token_type_ids", None)  # PaliGemma: each version reads it in its own way
        if name.startswith("qwen"):  # older versions look for pictures after this token
            batch["input_ids"][:, 1] = model.config.vision_start_token_id
        written[name] = work, logits(model, batch)
        older = {"labels", "mm_token_type_ids"}  # of no use there, or not known
        batch = {key: value for key, value in batch.items() if key not in older}
        save(model, None, work / "out", compat=True)
        save_file(batch, work / "inputs.safetensors")
    return written


def packages(version: str, pytestconfig: pytest.Config) -> Path:
    """A folder with an older transformers, to stand before the newest; kept between runs."""
    folder = pytestconfig.cache.mkdir(f"transformers-{version}")  # type: ignore[union-attr]
    done = folder / "done"
    if not done.exists():
        wanted = (f"transformers=={version}", *VERSIONS[version])
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
        run = subprocess.run(
            [*pip, "--target", str(folder), *wanted], capture_output=True, text=True, check=False
        )
        if run.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {run.stderr[-200:]}")
        done.touch()
    return folder


def differences(
    version: str, works: dict[str, tuple[Path, torch.Tensor]], pytestconfig: pytest.Config
) -> dict[str, float]:
    """How far a version's logits are off; infinitely where it does not load a folder cleanly."""
    folders = [str(work) for work, _ in works.values()]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, version, *folders],
        env={**os.environ, "PYTHONPATH": str(packages(version, pytestconfig))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    print(run.stdout)
    found = {}
    for name, (work, expected) in works.items():
        written = work / f"{version}.safetensors"
        logits_there = load_file(written)["logits"] if written.exists() else torch.tensor(torch.inf)
        found[name] = float((logits_there - expected).abs().max())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_older_transformers_reads_the_same_model(
    version: str, works: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    works = {n: work for n, work in works.items() if n in FAMILIES or version[0] == "5"}
    found = differences(version, works, pytestconfig)
    assert {name: value for name, value in found.items() if value > 1e-4} == {}


@pytest.mark.slow
def test_what_4_57_is_not_named_for_it_does_not_read(
    works: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    found = differences("4.57.6", {name: works[name] for name in NOT_IN_4}, pytestconfig)
    assert {name: value for name, value in found.items() if not value > 1e-2} == {}


def test_the_newest_reads_them_too(tmp_path: Path) -> None:
    model = tiny.build("llava-llama")
    save(model, None, tmp_path / "out", compat=True)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in names)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, None)
    again = auto_class(model.config).from_pretrained(tmp_path / "out")
    batch = tiny.batch(model)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_what_older_versions_cannot_read_is_refused(tmp_path: Path) -> None:
    for name in ("gemma3", "llava-pixtral"):
        with pytest.raises(ConfigError, match=r"compat: .*known: llava"):
            save(tiny.build(name), None, tmp_path / "out", compat=True)
    assert not (tmp_path / "out").exists()
