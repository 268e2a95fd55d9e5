"""What each of the 16 patches of a scene shows: the targets of the tower's own training."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from slimvlm.demo.scenes import COLORS, GRID, SHAPES, SIDE, Scene, draw_objects, load_art


def patch_coverage(scene: Scene, side: int = GRID) -> NDArray[np.float32]:
    """The share of each patch of a grid that each object covers (object, side, side)."""
    cover = np.zeros((len(scene.objects), SIDE, SIDE), np.float32)
    for mask, (sprite, top, left) in zip(cover, draw_objects(scene), strict=True):
        mask[top : top + sprite.shape[0], left : left + sprite.shape[1]] = sprite[..., 3]
    share: NDArray[np.float32] = cover.reshape(-1, side, SIDE // side, side, SIDE // side).mean(
        axis=(2, 4)
    )
    return share


@cache
def patch_classes() -> tuple[str, ...]:
    """All names that a patch can show; the first is the empty background."""
    shapes = [f"{c} {s}" for c in COLORS for s in SHAPES]
    return ("background", *load_art().names, *(str(d) for d in range(10)), *shapes)


@cache
def _class_index() -> dict[str, int]:
    return {name: i for i, name in enumerate(patch_classes())}


def patch_labels(scene: Scene, side: int = GRID) -> NDArray[np.int64]:
    """Labels the patches of a grid, row by row: 0 empty, -100 hardly touched, else the class."""
    cover = patch_coverage(scene, side)
    best, share = cover.argmax(axis=0), cover.max(axis=0)
    classes = np.array([_class_index()[o.name] for o in scene.objects])
    low = 0.08 if scene.kind == "digits" else 0.15
    labels = np.where(share > low, classes[best], np.where(share > 0.01, -100, 0))
    return labels.reshape(-1).astype(np.int64)
