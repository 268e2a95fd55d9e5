"""Read general text that every machine has: the descriptions of the packages that slimvlm needs."""

import random
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slimvlm.core.documents import digest
from slimvlm.data.chat import answered_sample
from slimvlm.data.samples import Question, Sample

SHARE = 0.2  # of what calibrates, where weights are repaired (docs/results.md)
PASSAGE, LEAST = 800, 100  # characters of a passage at most, whatever others have
_MARKUP = frozenset("<>{}[]|`#=")  # also what special tokens are written with
_WORDS = 6  # of a line of prose at least


def general_samples(
    count: int, seed: int, longest: int | None = None, usual: int | None = None
) -> list[Sample]:
    """Draw so many passages, or as many as there are, as answers to "Go on.".

    A sample has about the ``usual`` tokens of others, at 4 characters each, and at most
    ``longest``: none is shorter than a character, and a quarter is left for the chat template.
    """
    size = PASSAGE if usual is None else min(PASSAGE, max(4 * usual, LEAST))
    size = size if longest is None else min(size, longest * 3 // 4)
    parts = (text[at : at + size].strip() for text in _prose() for at in range(0, len(text), size))
    known = [part for part in dict.fromkeys(parts) if len(part) > size // 2]
    drawn = enumerate(random.Random(seed).sample(known, min(count, len(known))))
    rows = ((Question(f"general text {n}", "Go on.", ()), text) for n, text in drawn)
    return [replace(answered_sample(*row), is_general=True) for row in rows]


def identity_of_general_text() -> str:
    """Hash the text, which changes with the versions of the packages."""
    return f"general text {digest(_prose())[:16]}"


@cache
def _prose() -> tuple[str, ...]:
    """Read the prose of the descriptions, in the order of the packages' names."""
    texts, waiting = {"slimvlm": ""}, ["slimvlm"]
    while waiting:
        try:
            package = distribution(name := waiting.pop())
        except PackageNotFoundError:  # installed without what it needs
            continue
        if name != "slimvlm":  # its own changes too often
            text = str(package.metadata.json.get("description", ""))
            texts[name] = "\n".join(
                line.strip()
                for line in text.splitlines()
                if line.isascii() and line.isprintable() and _MARKUP.isdisjoint(line)
                if "://" not in line and len(line.split()) >= _WORDS
            )
        for needed in map(Requirement, package.requires or ()):
            is_extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
            if not is_extra and (other := canonicalize_name(needed.name)) not in texts:
                texts[other] = ""
                waiting.append(other)
    return tuple(text for _, text in sorted(texts.items()))
