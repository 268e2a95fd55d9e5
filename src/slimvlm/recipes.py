"""Which recipe for which budget: the study's decision chart as a table.

Reference:
    Huang et al. 2025, arXiv:2507.20749, Fig. 1 and Sec. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from slimvlm.config import Axis, Train
from slimvlm.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """What to do up to some ratio.

    Attributes:
        up_to: Largest ratio that the row is for.
        axis: Where to prune.
        train: What learns afterwards, None for no recovery.
        loss: Loss of the recovery.
        why: The finding behind it, for people.
    """

    up_to: float
    axis: Axis
    train: Train | None
    loss: str
    why: str


WITH_DATA = (
    Recipe(
        0.15,
        "depth",
        "projector",
        "sft",
        "up to 15 % dropping layers and tuning the projector keeps 95-99 %",
    ),
    Recipe(
        0.35,
        "depth",
        "lora",
        "sft+hidden",
        "up to about 30 % dropping layers keeps most once"
        " the backbone is trained with hidden-state distillation",
    ),
    Recipe(
        0.60,
        "width",
        "lora",
        "sft+hidden",
        "beyond about 40 % narrower layers recover better than fewer layers",
    ),
    Recipe(1.00, "width", "lora", "sft+hidden", "beyond 60 % the study advises against pruning"),
)
WITHOUT_DATA = Recipe(
    1.0, "width", None, "sft", "without training narrower layers keep more than fewer layers"
)


def recipe_for(ratio: float, has_data: bool) -> Recipe:
    """The study's choice for a ratio.

    Args:
        ratio: Share of the backbone to remove.
        has_data: Whether there is data to train on.

    Raises:
        ConfigError: If the ratio is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio {ratio} must be at least 0 and below 1")
    if not has_data:
        return WITHOUT_DATA
    return next(recipe for recipe in WITH_DATA if ratio <= recipe.up_to)
