"""Read general text that every machine has: the descriptions of its installed Python packages."""

import random
from functools import cache
from importlib.metadata import distributions

from slimvlm.core.errors import ConfigError
from slimvlm.data.chat import answered_sample
from slimvlm.data.samples import Question, Sample

PASSAGE = 800  # characters of a passage at most, so that it is not longer than a usual sample
_MARKUP = frozenset("<>{}[]|`#=")  # also what special tokens are written with
_WORDS = 6  # of a line of prose at least


def general_samples(count: int, seed: int, longest: int | None = None) -> list[Sample]:
    """Draw passages as answers to "Go on."; raise a `ConfigError` if there are too few.

    A sample has at most ``longest`` tokens: no token of a passage is shorter than a character, and
    a quarter is left for the chat template.
    """
    known = _passages(PASSAGE if longest is None else min(PASSAGE, longest * 3 // 4))
    if count > len(known):
        raise ConfigError(
            f"general_text: {count} passages are needed, and the descriptions of the installed "
            f"packages give {len(known)}"
        )
    drawn = enumerate(random.Random(seed).sample(known, count))
    return [answered_sample(Question(f"general text {n}", "Go on.", ()), text) for n, text in drawn]


@cache
def _passages(characters: int) -> tuple[str, ...]:
    """Divide the prose of all descriptions, in the order of the packages' names."""
    about = [package.metadata.json for package in distributions()]
    texts = {str(each.get("name")): str(each.get("description", "")) for each in about}
    found: dict[str, None] = {}
    for _, text in sorted(texts.items()):
        whole = "\n".join(line.strip() for line in text.splitlines() if _is_prose(line))
        parts = (whole[at : at + characters] for at in range(0, len(whole), characters))
        found |= dict.fromkeys(part.strip() for part in parts)
    return tuple(part for part in found if len(part) > characters // 2)


def _is_prose(line: str) -> bool:
    is_plain = line.isascii() and line.isprintable() and _MARKUP.isdisjoint(line)
    return is_plain and "://" not in line and len(line.split()) >= _WORDS
