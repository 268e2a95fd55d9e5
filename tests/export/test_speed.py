"""Times of a model and its original in an engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import slimvlm as sv
from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.options import Workload
from slimvlm.evaluation.bench import bench
from slimvlm.export.engines.speed import bench_engine
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import save
from tests import tiny_folder
from tests.handmade import plan_by_hand

SMALL = Workload(prompt_tokens=8, new_tokens=5, batch_sizes=(1, 2), repeats=3)
# speaks as ask.py does; a layer takes a second, and one more for each round that went by
FAKE = """#!{python}
import json, sys
from pathlib import Path
verb, module, folder = sys.argv[2:]
assert (verb, module) == ("time", "vllm")
request = json.loads((Path(folder) / "request.json").read_text())
layers = json.loads((Path(request["checkpoint"]) / "config.json").read_text())["num_hidden_layers"]
log = Path(r"{log}")
print(json.dumps({{"version": "0.0"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    prompts, new = asked["prompts"], asked["new_tokens"]
    with log.open("a") as file:
        print(layers, len(prompts), len(prompts[0]), new, file=file)
    busy = 1 + len(log.read_text().splitlines()) // 2
    steps = [[layers * busy * (2 + step) for step in range(new)] for _ in prompts]
    print(json.dumps({{"seconds": steps, "peak_bytes": 7}}), flush=True)
"""


def pretend(path: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an interpreter beside a ``vllm`` on PATH."""
    path.mkdir()
    for name, text in (("vllm", "#!/bin/sh\n"), ("python", program)):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A text model without half of its layers, and the whole one."""
    model, words = sv.load(tiny_folder.folder("text"), dtype="float32", device="cpu")
    prune_(model, plan_by_hand(sv.anatomy(model), layers=(0, 2), neurons=range(40)))
    save(model, words, tmp_path / "small")
    return str(tmp_path / "small"), str(tiny_folder.folder("text"))


def test_an_engine_is_asked_in_turn_and_compared_run_by_run(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    pretend(tmp_path / "bin", FAKE.format(python=sys.executable, log=log), monkeypatch)
    found = bench_engine("vllm", *folders, SMALL)
    one = [f"{layers} 1 8 5" for layers in (2, 4, 4, 2, 2, 4)]
    two = [line.replace(" 1 8", " 2 8") for line in one]
    assert log.read_text().splitlines() == ["2 1 8 2", "4 1 8 2", *one, *two]
    assert found.device == "vLLM 0.0"
    assert found.baseline is not None
    # the machine became slower all the time; neighbouring runs tell nevertheless
    for speed_up in found.speed_ups:
        assert speed_up.prefill == pytest.approx(2, rel=0.35)
        assert speed_up.decode == pytest.approx(2, rel=0.35)
    assert found.model.speeds[0].prefill_ms / found.model.speeds[0].decode_ms == pytest.approx(2)
    assert found.model.speeds[0].peak_bytes == 7


def test_the_ideal_does_not_depend_on_where_a_model_runs(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = FAKE.format(python=sys.executable, log=tmp_path / "log")
    pretend(tmp_path / "bin", program, monkeypatch)
    there = bench_engine("vllm", *folders, SMALL)
    models = [sv.load(folder, dtype="float32", device="cpu")[0] for folder in folders]
    here = bench(*models, SMALL)
    assert there.model.weight_bytes == here.model.weight_bytes
    ideals = [[(s.prefill_ideal, s.decode_ideal) for s in b.speed_ups] for b in (there, here)]
    assert ideals[0] == ideals[1]


def test_an_engine_that_does_not_load_is_quoted(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "#!/bin/sh\necho 'loading' >&2; echo 'ValueError: no such layer' >&2; exit 1\n"
    pretend(tmp_path / "bin", program, monkeypatch)
    with pytest.raises(ReloadError, match="vllm ended early: ValueError: no such layer"):
        bench_engine("vllm", folders[0], workload=SMALL)


def test_a_quantised_model_is_refused(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path / "bin", "#!/bin/sh\nexit 1\n", monkeypatch)
    path = Path(folders[0]) / "config.json"
    quantised = {"quant_method": "compressed-tensors"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(ConfigError, match="is quantised"):
        bench_engine("vllm", folders[0], workload=SMALL)
