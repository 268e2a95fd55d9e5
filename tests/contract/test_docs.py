"""Every command in the documents is one that the command line takes; tables match the code."""

import functools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import slimvlm as sv
from slimvlm import cli
from slimvlm.models.families import BACKBONES, FAMILIES
from slimvlm.scoring.criteria import CRITERIA, criteria_table
from tests.handmade import refused

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_reference_lists_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/python.md").read_text(), re.M)
    for name, home in sv._HOME.items():
        module, _, attribute = home.partition(":")
        module = module if module.startswith("slimvlm") else f"slimvlm.{module}"
        path = module if attribute == "*" else f"{module}.{attribute or name}"
        assert path in listed or module in listed, path


def test_documents_show_commands_and_a_wrong_option_would_be_noticed():
    assert len(COMMANDS) >= 8
    assert refused("inspect", "demo", "--no-such-option")


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


def test_the_readme_has_the_table_of_criteria_and_a_page_names_every_family():
    assert criteria_table() in (ROOT / "README.md").read_text()
    assert all(row.paper and row.about for row in CRITERIA.values())
    text = (ROOT / "docs" / "families.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in text and name not in BACKBONES] == []
    assert [name for name in BACKBONES if name not in text] == []


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_python_in_the_documents_compiles(page, block):
    text = textwrap.dedent(block)  # in a list, blocks are indented
    is_table_row = text.startswith('"')
    compile(f"{{{text}}}" if is_table_row else text, page, "exec")


@pytest.mark.slow
def test_the_site_has_every_verb_and_no_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "cli.html").read_text()
    assert [verb for verb in cli.VERBS if f'<h2 id="{verb}">' not in page] == []
    assert "--token-weights" in page


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
    links = [link for link in _blocks(r"\]\(([^)#]+)\)") if not link[1].startswith("http")]
    assert [link for link in links if not (folders[link[0]] / link[1]).exists()] == []
