"""The table of criteria: what each scores, what it needs, where it was published.

A criterion is one function and one row. ``docs/add-a-criterion.md`` walks through adding one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slimvlm.core.errors import ConfigError
from slimvlm.scoring.layers import (
    score_angular,
    score_block_influence,
    score_kl_greedy,
    score_spacing,
)
from slimvlm.scoring.obs import score_obs
from slimvlm.scoring.scores import Scores
from slimvlm.scoring.widths import (
    score_activation,
    score_flap,
    score_gate,
    score_magnitude,
    score_random,
    score_taylor,
    score_wanda,
    summed,
)

Capture = Literal[
    "nothing",
    "weights",
    "hidden_states",
    "activations",
    "moments",
    "grams",
    "gradients",
    "gates",
    "greedy",
]
Allowed = tuple[Any, ...] | range | None


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way to score units.

    Attributes:
        units: The units that it scores.
        capture: The statistics that it needs.
        function: ``(statistics, anatomy, **options) -> Scores``.
        paper: Title and arXiv id.
        about: One line for tables.
        options: Options of the function and their allowed values: some values, whole numbers
            from a least one on (a range), or any (None).
        capture_options: Options of the capture and their allowed values, likewise.
        fixed: Capture options that the criterion sets itself.
    """

    units: tuple[str, ...]
    capture: Capture
    function: Callable[..., Scores]
    paper: str
    about: str
    options: Mapping[str, Allowed] = field(default_factory=dict)
    capture_options: Mapping[str, Allowed] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_data(self) -> bool:
        """Whether calibration batches are needed."""
        return self.capture not in ("nothing", "weights")


_WIDTH = ("kv_group", "neuron")
_COUNT = range(1, 2**31)
_LLM_PRUNER = "LLM-Pruner, arXiv:2305.11627"

CRITERIA: dict[str, Criterion] = {
    "block_influence": Criterion(
        units=("layer",),
        capture="hidden_states",
        function=score_block_influence,
        paper="ShortGPT, arXiv:2403.03853",
        about="1 - mean cosine between a layer's input and output",
        options={"reduction": ("mean", "sum"), "last_layer": ("prenorm", "postnorm")},
    ),
    "angular": Criterion(
        units=("layer",),
        capture="hidden_states",
        function=score_angular,
        paper="Gromov et al., arXiv:2403.17887",
        about="the run of layers whose input and output are closest in angle",
        options={"last_layer": ("prenorm", "postnorm")},
    ),
    "spacing": Criterion(
        units=("layer",),
        capture="nothing",
        function=score_spacing,
        paper="compared in arXiv:2603.20275",
        about="removed layers as far apart as possible",
    ),
    "kl_greedy": Criterion(
        units=("layer",),
        capture="greedy",
        function=score_kl_greedy,
        paper="after SLEB, arXiv:2402.09025",
        about="divergence from the original's answers when the layer goes, one after another",
        capture_options={"rounds": _COUNT, "at_once": _COUNT},
    ),
    "taylor": Criterion(
        units=("layer", *_WIDTH),
        capture="gradients",
        function=score_taylor,
        paper=_LLM_PRUNER,
        about="first order: |weight x gradient| summed over the unit",
        capture_options={"gradient": ("batch", "per_sample")},
        fixed={"order": "first"},
    ),
    "taylor_second": Criterion(
        units=_WIDTH,
        capture="gradients",
        function=summed("taylor_second"),
        paper=_LLM_PRUNER,
        about="second order: weight² x mean squared gradient",
        fixed={"order": "second"},
    ),
    "taylor_mix": Criterion(
        units=_WIDTH,
        capture="gradients",
        function=summed("taylor_mix"),
        paper=_LLM_PRUNER,
        about="first and second order together",
        fixed={"order": "mix"},
    ),
    "gate": Criterion(
        units=_WIDTH,
        capture="gates",
        function=score_gate,
        paper="Michel et al., arXiv:1905.10650",
        about="gradient of a switch on each unit; no weight gradients",
    ),
    "activation": Criterion(
        units=_WIDTH,
        capture="activations",
        function=score_activation,
        paper="Minitron, arXiv:2407.14679",
        about="mean size of a unit's output",
    ),
    "wanda": Criterion(
        units=_WIDTH,
        capture="moments",
        function=score_wanda,
        paper="Wanda, arXiv:2306.11695",
        about="|weight| x size of its input, over the columns that read the unit",
    ),
    "flap": Criterion(
        units=_WIDTH,
        capture="moments",
        function=score_flap,
        paper="FLAP, arXiv:2312.11983",
        about="variance of the unit's output x squared weights that read it",
    ),
    "obs": Criterion(
        units=_WIDTH,
        capture="grams",
        function=score_obs,
        paper="after SlimGPT, arXiv:2412.18110 and OSSCAR, arXiv:2403.12983",
        about="squared error when the unit goes and the others are refitted, one after another",
        options={"group": _COUNT},
    ),
    "magnitude": Criterion(
        units=("layer", *_WIDTH),
        capture="weights",
        function=score_magnitude,
        paper=_LLM_PRUNER,
        about="size of the weights, l1 or l2",
        options={"reduction": ("mean", "sum")},
        capture_options={"p": (1, 2)},
    ),
    "random": Criterion(
        units=("layer", *_WIDTH),
        capture="nothing",
        function=score_random,
        paper="baseline",
        about="chance",
        options={"seed": None},
    ),
}


def criterion_named(name: str, options: Mapping[str, Any]) -> Criterion:
    """Look a criterion up and check its options.

    Raises:
        ConfigError: If the name, an option or an option's value is not known.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion {name!r} is not known. Choose from: {', '.join(CRITERIA)}")
    criterion = CRITERIA[name]
    known = {**criterion.options, **criterion.capture_options}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"criterion {name!r} has no option {option!r}. It has: {', '.join(known) or 'none'}"
            )
        allowed = known[option]
        if isinstance(allowed, range) and not (isinstance(value, int) and value in allowed):
            raise ConfigError(
                f"criterion {name!r}: {option}={value!r} must be a whole number of at least "
                f"{allowed.start}"
            )
        if isinstance(allowed, tuple) and value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ConfigError(f"criterion {name!r}: {option}={value!r} must be one of: {choices}")
    return criterion


def criteria_table() -> str:
    """The table of criteria as Markdown, as printed in the README."""
    rows = [
        "| criterion | units | needs data | what it measures | source |",
        "|---|---|---|---|---|",
    ]
    for name, row in CRITERIA.items():
        needs = "yes" if row.needs_data else "no"
        units = ", ".join(row.units)
        rows.append(f"| `{name}` | {units} | {needs} | {row.about} | {row.paper} |")
    return "\n".join(rows)
