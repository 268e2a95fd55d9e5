"""Pages that the site takes from elsewhere: the README, and the command line's own help.

Nothing of it is committed; mkdocs calls these functions while it builds.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

SECTIONS = {
    "Start": ("index", "quickstart"),
    "How-to": (
        *("compress", "loading"),
        *("tokens", "images-budget", "experts", "recovery", "resume", "low-memory"),
        *("gpu", "scale-out", "studies", "tasks", "gates", "serving", "text-only", "convert"),
        *("draft-model", "report"),
        *("add-a-criterion", "add-a-family"),
    ),
    "Reference": (
        *("cli", "python", "files", "criteria", "losses", "families", "engines", "demo-model"),
    ),
    "Why": ("how-pruning-works", "results", "speed", "towers", "limits", "faq", "security", "log"),
    "Take part": (
        *("contributing", "changelog"),
        *("journey-compress", "journey-batch-to-slice", "journey-sample-to-loss"),
    ),
}
MADE = {"index", "cli", "contributing", "changelog"}
_written: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """Order the pages that exist; what is in no section comes last."""
    written = {page.stem for page in (ROOT / "docs").glob("*.md")} | MADE
    placed = [name for names in SECTIONS.values() for name in names]
    sections = {**SECTIONS, "More": tuple(sorted(written - set(placed)))}
    shown = {
        section: [f"{n}.md" for n in names if n in written] for section, names in sections.items()
    }
    config.nav = [{section: pages} for section, pages in shown.items() if pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside the docs folder, and the command line's."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_linked(text, "docs/")))
    files.append(File.generated(config, "cli.md", content=command_line_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave the docs folder into links between pages."""
    _written[page.file.src_uri] = _linked(markdown, "")
    return _written[page.file.src_uri]


def on_post_build(config: Any) -> None:
    """Put the Markdown of each page into the site, too: llms.txt links to it."""
    for name, text in _written.items():
        (Path(config.site_dir) / name).write_text(text, encoding="utf-8")


def command_line_page() -> str:
    """Every verb with the help that it prints."""
    from slimvlm.cli import VERBS

    parts = [
        "# Command line",
        "What `--help` prints, taken from the code when this page was built.",
    ]
    parts.append(f"```text\n{_help([])}```")
    parts += [f"## {verb}\n\n```text\n{_help([verb])}```" for verb in VERBS]
    return "\n\n".join(parts) + "\n"


def _help(arguments: list[str]) -> str:
    from slimvlm.cli import main

    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([*arguments, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).strip() + "\n"


def _linked(text: str, docs: str) -> str:
    """Links of a page at the root of the repository (``docs/``) or below docs, as the site's."""

    def replaced(match: re.Match[str]) -> str:
        shown, target, anchor = match["shown"], match["target"], match["anchor"] or ""
        if target.startswith(("http", "mailto")):
            return match[0]
        inside = target.removeprefix(docs) if docs and target.startswith(docs) else target
        name = target.removeprefix("../")
        if name in PAGES:
            return f"[{shown}]({PAGES[name]}{anchor})"
        is_page = not inside.startswith("../") and (ROOT / "docs" / inside).is_file()
        if is_page or inside in PAGES.values():
            return f"[{shown}]({inside}{anchor})"
        return shown  # a file of the repository that the site does not show

    return re.sub(
        r"\[(?P<shown>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)", replaced, text
    )
