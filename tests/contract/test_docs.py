"""Every command in the documents is one that the command line takes; tables match the code."""

import functools
import importlib.util
import pkgutil
import re
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

import slimvlm as sv
from slimvlm import cli
from slimvlm.evaluation.metrics import LIKELIHOODS, METRICS
from slimvlm.evaluation.tasks import TaskRow
from slimvlm.models.families import BACKBONES, FAMILIES
from slimvlm.planning.plan import PlanFile
from slimvlm.scoring.criteria import CRITERIA
from tests.tables import criteria_table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


TITLE = re.compile("^#+ (.+)$", re.MULTILINE)


def _blocks(pattern):
    found = ((page.name, re.findall(pattern, page.read_text(), re.DOTALL | re.M)) for page in PAGES)
    return [(page, text) for page, texts in found for text in texts]


PYTHON = _blocks(r"```python\n(.*?)^ *```")
COMMANDS = [
    (page, line.split(" #")[0].strip())
    for page, block in _blocks(r"```bash\n(.*?)```")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith(("slimvlm", ".venv/bin/slimvlm"))
]
assert len(COMMANDS) >= 8


def test_the_reference_lists_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/python.md").read_text(), re.M)
    for name, home in sv._HOME.items():
        module, _, attribute = home.partition(":")
        module = module if module.startswith("slimvlm") else f"slimvlm.{module}"
        path = module if attribute == "*" else f"{module}.{attribute or name}"
        assert path in listed or module in listed, path


def test_the_page_on_python_has_an_example_of_every_public_name():
    """`tests.journeys.test_docs_run` runs them."""
    code = "".join(text for page, text in PYTHON if page == "python.md")
    assert [name for name in sv._HOME if not re.search(rf"\bsv\.{name}\b", code)] == []


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_accepted(page, command, monkeypatch, tmp_path):
    called = []
    monkeypatch.chdir(tmp_path)
    if named := re.search(r"--config (\S+)", command):
        path = tmp_path / named[1]
        path.parent.mkdir(parents=True)
        path.write_text("model: MODEL")

    for verb, function in [*cli.VERBS.items()]:
        record = functools.wraps(function)(lambda *_, verb=verb, **__: called.append(verb))
        monkeypatch.setitem(cli.VERBS, verb, record)
    words = shlex.split(command)[1:]
    cli.main(words)
    assert called == [words[0]]


def test_pages_have_the_table_of_criteria_and_every_model():
    page = (ROOT / "docs" / "criteria.md").read_text()
    assert criteria_table() in page.replace(r"\|", "|")  # which would divide a cell
    assert all(row.paper and row.about for row in CRITERIA.values())
    text = (ROOT / "docs" / "families.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in text and name not in BACKBONES] == []


def first_cells(section):
    """The names in the first column of the table in a section of docs/files.md."""
    text = (ROOT / "docs" / "files.md").read_text().split(f"\n## {section}\n")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return {name for row in rows[2:] for name in re.findall("`([^`]+)`", row.split("|")[1])}


def test_the_page_on_files_names_the_keys_of_tasks_and_plans():
    assert first_cells("Task") == {row.name for row in fields(TaskRow)}
    assert first_cells("plan.json") == {row.name for row in fields(PlanFile)}
    named = (ROOT / "docs" / "files.md").read_text().split("\n## Task\n")[1]
    assert [name for name in (*METRICS, *LIKELIHOODS) if f"`{name}`" not in named] == []


@pytest.fixture(scope="module")
def hooks():
    """What builds the site; it needs mkdocs only while it builds."""
    found = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "_hooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_page_is_in_one_section_of_the_site(hooks):
    placed = [page for pages in hooks.SECTIONS.values() for page in pages]
    written = {page.stem for page in (ROOT / "docs").glob("*.md")} | hooks.MADE
    assert sorted(placed) == sorted(written)


def test_llms_txt_lists_every_page_in_its_section_and_links_to_what_is_there(hooks):
    head, *sections = (ROOT / "docs" / "llms.txt").read_text().split("\n## ")
    assert re.fullmatch(r"# slimvlm\n\n> [^\n]+(\n> [^\n]+)*\n(\n[^#>].*)?", head, re.DOTALL)
    listed = {}
    for section in sections:
        name, _, body = section.partition("\n\n")
        rows = [
            re.fullmatch(r"- \[[^]]+\]\(([\w./-]+)\): .+", row) for row in body.splitlines() if row
        ]
        assert None not in rows, name
        listed[name] = [row[1] for row in rows]
    schemas = listed.pop("Schemas")
    assert {n: [f"{page}.md" for page in pages] for n, pages in hooks.SECTIONS.items()} == listed
    assert sorted(ROOT.glob("docs/schemas/*")) == sorted(ROOT / "docs" / name for name in schemas)


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_python_in_the_documents_compiles(page, block):
    text = textwrap.dedent(block)  # in a list, blocks are indented
    is_table_row = text.startswith('"')
    compile(f"{{{text}}}" if is_table_row else text, page, "exec")


def test_the_first_hour_s_example_is_a_row_of_data(tmp_path):
    hour = (ROOT / "docs" / "quickstart.md").read_text().split("## The first hour")[1]
    (row,) = re.findall(r"```json\n(.*?)```", hour.split("\n## ")[0], re.DOTALL)
    (tmp_path / "mine.jsonl").write_text(row)
    assert len(sv.load_samples(tmp_path / "mine.jsonl")) == 1


def slugs(text):
    """The anchors of a page's titles, as mkdocs makes them."""
    found = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in TITLE.findall(text)]
    return {re.sub(r"[-\s]+", "-", title) for title in found}


def test_links_files_and_names_that_pages_give_are_there():
    source = ROOT / "src" / "slimvlm"
    packages = "|".join(sorted(folder.name for folder in source.iterdir() if folder.is_dir()))
    whole = r"`((?:src|tests|tools|benchmarks|studies|docs)/[\w/.-]+)[`:]"
    inside = rf"`(?!runs/demo)((?:{packages})/[\w/]+(?:\.\w+)?)`"
    missing, found = [], 0
    for page in PAGES:
        text = page.read_text()
        named = [ROOT / name for name in re.findall(whole, text)]
        named += [source / name for name in re.findall(inside, text)]
        found += len(named)
        missing += [
            f"{page.name}: {path}"
            for path in named
            if not path.exists() and not path.with_suffix(".py").exists()
        ]
    assert found > 50
    assert missing == []
    for page, name in _blocks(r"`((?:slimvlm|slimvlm_tools)(?:\.\w+)+)(?:\(\))?`"):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            pytest.fail(f"{page}: {name}")
    folders = {page.name: page.parent for page in PAGES}
    titles = {page.resolve(): slugs(page.read_text()) for page in PAGES}
    anchors = [
        (page, target, anchor)
        for page, link in _blocks(r"\]\(([^):]*#[^)]+)\)")
        for target, _, anchor in [link.partition("#")]
        if anchor not in titles[(folders[page] / (target or page)).resolve()]
    ]
    assert anchors == []
    links = [link for link in _blocks(r"\]\(([^)#]+)\)") if not link[1].startswith("http")]
    assert [link for link in links if not (folders[link[0]] / link[1]).exists()] == []


def test_the_page_on_picture_tokens_names_every_family_with_a_knob():
    text = (ROOT / "docs" / "images-budget.md").read_text()
    rows = {name: row.pictures for name, row in FAMILIES.items()}
    knobs = {name: knobs for name, knobs in rows.items() if not isinstance(knobs, str)}
    assert [name for name in knobs if f"`{name}`" not in text] == []
    fields = {knob.field for row in knobs.values() for knob in row}
    assert [name for name in fields if f"`{name}`" not in text] == []
