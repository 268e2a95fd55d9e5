"""Draw seeded 64x64 images of emojis, handwritten digits and coloured shapes.

A single object fills most of the image, several objects have a quadrant each; patches are 16
pixels wide. A scene belongs to the training or to the test split by a checksum of its composition,
so the splits never share one. Digits also come from disjoint parts of the handwritten images.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from slimvlm.core.tables import read_table

Split = Literal["train", "test"]
SceneKind = Literal["single", "multi", "count", "digits", "shapes"]
SCENE_KINDS: tuple[SceneKind, ...] = get_args(SceneKind)

T = TypeVar("T")

ASSETS = Path(__file__).parent / "assets"

SIDE = 64
CELL = 32
PATCH = 16
GRID = SIDE // PATCH
CELLS = ("top left", "top right", "bottom left", "bottom right")
SEEN_STYLES = ("noto", "twemoji")
UNSEEN_STYLE = "fluent"
TEST_SHARE = 8  # one composition, and one digit image, in this many is of the test split
SHAPES = ("circle", "square", "triangle", "cross")
DATA: dict[str, Any] = read_table(__file__, "demo.yaml")
COLORS: dict[str, list[int]] = DATA["colors"]
BACKGROUNDS: list[list[int]] = DATA["backgrounds"]


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one item."""
    return items[int(rng.integers(len(items)))]


class Art(NamedTuple):
    """The emoji images: each concept's word and category, and RGBA images by art style."""

    names: tuple[str, ...]
    categories: dict[str, str]  # by name
    styles: dict[str, NDArray[np.uint8]]


class Placed(NamedTuple):
    """One object of a scene."""

    name: str  # concept, digit ("0" to "9") or "colour shape" ("red circle")
    cell: int  # index into `CELLS`; -1 for a lone object that fills the image
    source: int = -1  # concept index or digit image index
    style: str = ""  # art style of an emoji


class Scene(NamedTuple):
    """An image's contents in reading order."""

    kind: SceneKind
    objects: tuple[Placed, ...]
    background: int  # index into `BACKGROUNDS`
    pose: int  # seed of sizes, offsets, mirroring and ink

    @property
    def key(self) -> str:
        """The composition: scenes with equal keys differ by small shifts and background."""
        parts = [f"{o.name}@{o.cell}" for o in self.objects]
        if self.kind in ("single", "digits"):
            parts += [f"{o.source}:{o.style}" for o in self.objects]
        if self.kind == "single":
            parts += [str(self.background), str(self.pose % 64)]
        return f"{self.kind}|" + ",".join(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in reading order."""
        return tuple(o.name for o in self.objects)


@cache
def load_art() -> Art:
    """Read the packaged emoji images."""
    with np.load(ASSETS / "emoji64.npz") as z:
        styles = {k: z[k] for k in (*SEEN_STYLES, UNSEEN_STYLE)}
        names = tuple(str(n) for n in z["names"])
        return Art(names, dict(zip(names, map(str, z["cats"]), strict=True)), styles)


@cache
def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the packaged handwritten digits: images (28x28) and labels."""
    with np.load(ASSETS / "mnist10k.npz") as z:
        return z["x"], z["y"]


@cache
def digit_sources(split: Split) -> NDArray[np.int64]:
    """Return the indices of a split's handwritten images."""
    indices = np.arange(len(load_digits()[1]), dtype=np.int64)
    chosen: NDArray[np.int64] = indices[(indices % TEST_SHARE == 0) == (split == "test")]
    return chosen


def make_scene(
    kind: SceneKind,
    rng: np.random.Generator,
    split: Split = "train",
    styles: Sequence[str] = SEEN_STYLES,
    names: Sequence[str] | None = None,
) -> Scene:
    """Draw scenes until one belongs to the split; ``names`` are the emojis, else random ones."""
    labels, pool, colors = load_digits()[1], digit_sources(split), list(COLORS)
    known = load_art().names
    while True:
        if kind == "digits":
            if rng.integers(2):
                row = int(rng.integers(2))
                cells = [2 * row, 2 * row + 1]
            else:
                cells = sorted(int(c) for c in rng.permutation(4)[:3])
            sources = [int(pool[i]) for i in rng.integers(len(pool), size=len(cells))]
            objects = [Placed(str(labels[i]), c, i) for i, c in zip(sources, cells, strict=True)]
        elif kind == "shapes":
            count = int(rng.integers(1, 5))
            cells = sorted(int(c) for c in rng.permutation(4)[:count])
            drawn = [rng.permutation(len(of))[:count] for of in (SHAPES, colors)]
            looks = [f"{colors[int(c)]} {SHAPES[int(s)]}" for s, c in zip(*drawn, strict=True)]
            objects = list(map(Placed, looks, cells))
        else:
            chosen = names
            if chosen is None and kind == "single":
                chosen = [pick(rng, known)]
            elif chosen is None and kind == "multi":
                picked = rng.choice(len(known), size=int(rng.integers(2, 5)), replace=False)
                chosen = [known[int(i)] for i in picked]
            elif chosen is None:
                times = int(rng.integers(1, 5))
                others = int(rng.integers(0, 5 - times))
                picked = rng.choice(len(known), size=1 + others, replace=False)
                chosen = [known[int(picked[0])]] * times + [known[int(i)] for i in picked[1:]]
            free = [-1] if kind == "single" else rng.permutation(4)[: len(chosen)].tolist()
            objects = [
                Placed(name, cell, known.index(name), pick(rng, styles))
                for name, cell in zip(chosen, free, strict=True)
            ]
            objects.sort(key=lambda o: o.cell)
        background = int(rng.integers(len(BACKGROUNDS)))
        scene = Scene(kind, tuple(objects), background, int(rng.integers(1 << 30)))
        if (zlib.crc32(scene.key.encode()) % TEST_SHARE == 0) == (split == "test"):
            return scene


@lru_cache(maxsize=8192)
def _sprite(style: str, source: int, size: int) -> NDArray[np.float32]:
    picture = Image.fromarray(load_art().styles[style][source], "RGBA")
    if size != SIDE:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return (np.asarray(picture) / 255).astype(np.float32)


@lru_cache(maxsize=256)
def _shape_sprite(name: str, size: int) -> NDArray[np.float32]:
    color, shape = name.split()
    n = size * 4  # drawn larger, then reduced
    mask = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((n // 12, n // 12, n - n // 12, n - n // 12), fill=255)
    elif shape == "triangle":
        draw.polygon([(n // 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    else:
        third = n // 3
        draw.rectangle((third, 0, n - third, n - 1), fill=255)
        draw.rectangle((0, third, n - 1, n - third), fill=255)
    alpha = np.asarray(mask.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    rgb = np.broadcast_to(np.asarray(COLORS[color], np.float32) / 255, (size, size, 3))
    return np.concatenate([rgb, alpha[..., None]], axis=2)


def draw_objects(scene: Scene) -> Iterator[tuple[NDArray[np.float32], int, int]]:
    """Yield each object's RGBA sprite (height, width, 4) in 0 to 1, and its top and left pixel."""
    rng = np.random.default_rng(scene.pose)
    ink = rng.uniform(0, 0.35, size=3).astype(np.float32)
    for item in scene.objects:
        if scene.kind == "digits":
            alpha = load_digits()[0][item.source].astype(np.float32) / 255
            sprite = np.empty((*alpha.shape, 4), np.float32)
            sprite[..., :3], sprite[..., 3] = ink, alpha
        elif scene.kind == "shapes":
            sprite = _shape_sprite(item.name, int(rng.integers(20, 31)))
        else:
            low, high = (48, 65) if item.cell < 0 else (27, 33)
            sprite = _sprite(item.style, item.source, int(rng.integers(low, high)))
            if rng.integers(2):
                sprite = sprite[:, ::-1]
        room = (SIDE if item.cell < 0 else CELL) - sprite.shape[0]
        top, left = (int(v) for v in rng.integers(0, room + 1, size=2))
        row, column = divmod(max(item.cell, 0), 2)
        yield sprite, top + CELL * row, left + CELL * column


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64x64 pixels."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    for sprite, top, left in draw_objects(scene):
        window = canvas[top : top + sprite.shape[0], left : left + sprite.shape[1]]
        window += sprite[..., 3:] * (sprite[..., :3] - window)
    return Image.fromarray((canvas * 255).clip(0, 255).astype(np.uint8))
