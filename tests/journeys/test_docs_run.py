"""Every command in the documents runs, as the page on Python does: with the names in them, small.

Pages are run from top to bottom, the README and docs/compress.md first; what their commands write
is there for the other pages. `tests.contract.test_docs` checks that commands are spelled right,
this one that they work.
"""

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import slimvlm as sv
from slimvlm import cli
from tests import tiny_folder
from tests.contract.test_docs import COMMANDS, PYTHON
from tests.tables import tables

TABLES = tables(__file__)

pytestmark = pytest.mark.slow

ORIGINALS = Path(__file__).parents[1] / "fixtures" / "convert"
NAMED_IN_DOCUMENTS = {
    "llava-v1.5-7b": ORIGINALS / "llava" / "original",
    "clip-vit-large-patch14-336": ORIGINALS / "llava" / "vision_tower",
    "Bunny-v1_0-3B": ORIGINALS / "bunny" / "original_no_tower",
    "siglip-so400m-patch14-384": ORIGINALS / "bunny" / "siglip-tower",
    "Mini-InternVL-Chat-4B-V1-5": ORIGINALS / "internvl" / "original",
}
SMALLER = TABLES["smaller"]
"""Options that change how long a command takes and nothing else."""
TINY_MEMORY = "0.3MB"
"""A target for the tiny model where documents have one for 7B."""
ELSEWHERE = TABLES["elsewhere"]
CAN_QUANTIZE = find_spec("torchao") is not None
"""Whether the extra is installed."""
FIRST = ("README.md", "compress.md")
PAGES = sorted({page for page, _ in COMMANDS} - set(FIRST))
STUDY = TABLES["study"]


def write_rows(path, count, first=0):
    """Conversations of text in the form that the page shows."""
    rows = []
    for sample in tiny_folder.short_samples(first + count, sees=False)[first:]:
        (question, answer) = (message["content"][0]["text"] for message in sample.messages)
        asked = {"role": "user", "content": f"{sample.id}: {question}"}  # no two are the same
        turns = [asked, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the model, data and pictures that documents name."""
    return furnished(tmp_path_factory.mktemp("workshop"))


def furnished(root):
    tiny_folder.copied("llava", root / "MODEL")
    model = dict.fromkeys(("path/or/id", "llava-hf/llava-1.5-7b-hf"), root / "MODEL")
    for name, folder in {**model, **NAMED_IN_DOCUMENTS}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(folder)
    tiny_folder.write_llava_data(root)
    tiny_folder.write_llava_data(root / "coco")
    shutil.copy(root / "data.json", root / "mix.json")
    write_rows(root / "mine.jsonl", 30)
    write_rows(root / "unseen.jsonl", 6, first=30)
    tiny_folder.picture().save(root / "cat.png")
    (root / "study.yaml").write_text(STUDY)
    (root / "studies").symlink_to(Path(__file__).parents[2] / "studies")
    return root


@pytest.fixture(scope="module")
def after_first_pages(workshop):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        for command in [command for page in FIRST for command in commands_of(page)]:
            run(command, patch)
    shutil.copytree(workshop / "run", workshop / "runs" / "demo" / "width")
    return workshop


def commands_of(page):
    return [command for name, command in COMMANDS if name == page and command not in ELSEWHERE]


def run(command, patch):
    verb, *words = shlex.split(command)[1:]
    if verb == "quantize" and not CAN_QUANTIZE:
        return
    if "--out" in words:
        _remove(Path(words[words.index("--out") + 1]))
    fitting = [TINY_MEMORY if word == "8GiB" else word for word in words]
    try:
        cli.main([verb, *fitting, *shlex.split(SMALLER.get(verb, ""))])
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{command}: exit code {stop.code}")


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def test_the_readme_and_the_main_page_run_from_top_to_bottom(after_first_pages):
    written = ["run/summary.md", "scores/obs.json", "plan.json", "pruned", "recovered", "lost.html"]
    assert [name for name in written if not (after_first_pages / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, after_first_pages, monkeypatch):
    monkeypatch.chdir(after_first_pages)
    for command in commands_of(page):
        run(command, monkeypatch)


def test_the_page_on_python_runs_from_top_to_bottom(tmp_path, monkeypatch, unhurried):
    """Its examples are one program."""
    monkeypatch.chdir(furnished(tmp_path))
    names = {}
    for number, code in enumerate(code for page, code in PYTHON if page == "python.md"):
        if "sv.quantize(" not in code or CAN_QUANTIZE:
            exec(compile(code, f"example {number} of python.md", "exec"), names)
    for folder in ("run/checkpoint", "run-depth/checkpoint", "recovered", "refitted", "cut"):
        assert sv.anatomy(tmp_path / folder).total_params < names["before"].total_params
    assert names["table"]["avg"].notna().all()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = (code for page, code in PYTHON if page == "README.md")
    exec(compile(code, "README.md", "exec"), {})
    written = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"config.json", "model.safetensors"} <= written


def test_commands_that_are_run_elsewhere_are_still_in_the_documents():
    assert set(ELSEWHERE) <= {command for _, command in COMMANDS}
