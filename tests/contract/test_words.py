"""Help and messages use one word for one thing."""

import ast
import re
from pathlib import Path

import pytest

import slimvlm
from slimvlm import cli

# a word that is not used, and the one that is
OTHERWISE = {
    r"conversations?": "sample",
    r"held[- ]out": "validation samples, or test samples",
    r"unseen": "test samples",
    r"pictures?": "image",
    r"unpruned model|whole model of before": "original",
    r"smaller model": "compressed model",
    r"beside": "next to, in addition to, or against",
    r"the study's": "the paper's, or the extended paper's",
    r"passes over": "epochs",
}
TOLD = {"say", "to_log", "print", "write_text", "warn"}  # calls whose texts a user reads


def messages():
    """Texts of errors and of lines that are printed, with their places."""
    for path in sorted(Path(slimvlm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", getattr(called, "attr", ""))
            if isinstance(node, ast.Raise) or name in TOLD or name.endswith("Error"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                        text = inner.value.replace("messages or conversations", "")  # columns
                        yield f"{path.name}:{inner.lineno}", text


def wrong(texts):
    return [
        f"{place}: {found[0]!r} should be {better}"
        for place, text in texts
        for word, better in OTHERWISE.items()
        if (found := re.search(rf"\b(?:{word})\b", text, re.IGNORECASE))
    ]


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_uses_the_fields_words(verb, capsys):
    with pytest.raises(SystemExit) if verb else pytest.MonkeyPatch.context():
        cli.main([*([verb] if verb else []), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert wrong([(verb, shown)]) == []
    assert "ANNOTATED" not in shown


def test_messages_use_the_fields_words():
    assert wrong(messages()) == []
    assert wrong([("x", "held-out samples")])
