"""Conversations, questions and tasks as plain values, and their images."""

import io
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from slimvlm.core.errors import DataError, raised_as

Message = dict[str, Any]
"""One turn in Hugging Face chat form: ``{"role": "user", "content": [{"type": "image"}, {"type":
"text", "text": "..."}]}``. An image entry is a placeholder; the images are in `Sample.images`, in
order."""


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from or to calibrate on."""

    id: str  # in messages about bad data and in per-sample results
    messages: tuple[Message, ...]  # the last one is the assistant's
    images: tuple[Image.Image | Path, ...] = ()
    """The images (or their paths), one per ``{"type": "image"}`` entry, in order."""
    # set by `load_samples`: hash of its content, by which it is drawn; about how many tokens it has
    place: int = field(default=0, compare=False, repr=False)
    tokens: int = field(default=0, compare=False, repr=False)
    is_general: bool = False  # general text, not the user's
    is_cut: bool = False  # the end of the last answer is missing, so that none is taught


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str  # unique within its task
    prompt: str  # the user's text; images come before it
    answers: tuple[str, ...]  # those that are accepted; the first is the one shown
    images: tuple[Image.Image | Path, ...] = ()
    choices: tuple[str, ...] = ()  # letters or words, where the metric needs them
    group: str = ""  # that a metric may report on separately (for example ``"adversarial"``)


@dataclass(frozen=True)
class Task:
    """A benchmark: questions, how they are scored and what luck alone would give."""

    name: str
    metric: str
    """One of `slimvlm.evaluation.metrics`; or ``perplexity`` or ``loss`` of the first answer."""
    chance: float  # score of guessing, in percent
    load: Callable[[int | None], Sequence[Question]] = field(compare=False)
    """Returns the first ``limit`` questions (all if None), always in the same order."""
    max_new_tokens: int = 8
    like: str = ""  # the published benchmark that this one stands for, if any
    in_average: bool = True  # whether it counts in AVG; text perplexity does not
    by_likelihood: bool = False  # the reply is the likeliest choice, not what the model generates


Item = TypeVar("Item")
VALIDATION_EVERY = 4


def split_validation(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Set every fourth calibration item aside, for validation."""
    fitted = [item for number, item in enumerate(items, 1) if number % VALIDATION_EVERY]
    return fitted, list(items[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded. Others are refused: some of Pillow's decoders start programs."""

# larger images are refused unread: decoded, they take more than 256 MiB (Pillow's own limit)
MAX_PIXELS = 89_478_485
# images with more pixels are reduced to this size: their copies in float32 take gigabytes
LARGE_PIXELS, LARGE_SIZE = 2**25, (4096, 4096)
MAX_ASPECT = 200  # longer side over shorter one; processors that keep the shape fail beyond it
_GLANCE = (64, 64)


def open_image(image: Image.Image | Path) -> Image.Image:
    """Load an image as RGB; raise a `DataError` if it is broken, cut off or too large."""
    # decoders raise almost anything when a file is broken
    with raised_as(DataError, Exception, f"image {str(image)!r}: cannot be read"):
        if isinstance(image, Path):
            return _decoded(image)
        if (content := _file_of(image)) is not None:
            return _decoded(io.BytesIO(content))
        return ImageOps.exif_transpose(image).convert("RGB")


def size_of(image: Image.Image | Path) -> tuple[int, int]:
    """Read the width and height of an image as it is stored."""
    if not isinstance(image, Path):
        return image.size
    with Image.open(image, formats=FORMATS) as opened:
        return opened.size


def identifying_bytes(image: Image.Image | Path, may_move: bool = False) -> bytes:
    """Identify an image by content, or its file's size and place; ``may_move``: name for place."""
    if isinstance(image, Path):
        stat = image.stat()
        place = image.name if may_move else f"{image} {stat.st_mtime_ns}"
        return f"{place} {stat.st_size}".encode()
    return f"{image.mode} {image.size}".encode() + (_file_of(image) or image.tobytes())


def _file_of(image: Image.Image) -> bytes | None:
    """Return the encoded file of a lazy image, which must not be decoded in place."""
    source = getattr(image, "fp", None)
    return source.getvalue() if isinstance(source, io.BytesIO) else None


def find_image(source: Any, name: str, root: Path) -> Image.Image | Path:
    """Return an image, or its path inside ``root``, after decoding it as a check."""
    if isinstance(source, Image.Image):
        return source
    content = source.get("bytes") if isinstance(source, dict) else None
    where = f"sample {name!r}: image"
    with raised_as(DataError, Exception, f"{where} cannot be read"):  # decoders raise anything
        if isinstance(source, str) and source.startswith("data:image/"):  # as OpenAI's files have
            content = b64decode(source.partition(",")[2])
        if isinstance(content, bytes) and content:
            _decoded(io.BytesIO(content), glance=True)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    place = source.get("path") if isinstance(source, dict) else source
    if not isinstance(place, str):
        raise DataError(f"{where} must be a path or an image")
    where = f"{where} {place if len(place) < 100 else f'{place[:100]}...'!r}"
    with raised_as(DataError, (OSError, ValueError, RuntimeError), f"{where} is not a path"):
        path = (root / place).resolve()
        is_file = path.is_file()
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{where} lies outside {str(root)!r}")
    if not is_file:
        raise DataError(f"{where} not found in {str(root)!r}")
    with raised_as(DataError, Exception, f"sample {name!r}: image cannot be read"):
        _decoded(path, glance=True)
    return path


def _decoded(source: Path | io.BytesIO, glance: bool = False) -> Image.Image:
    """Decode an image as RGB. With ``glance`` check its shape, and decode a JPEG at small size."""
    with Image.open(source, formats=FORMATS) as opened:
        size = f"{opened.width} x {opened.height} pixels"
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{size}; at most {MAX_PIXELS:,} are read")
        if glance:
            if max(opened.size) > MAX_ASPECT * min(opened.size):
                raise ValueError(f"{size}; one side may be {MAX_ASPECT} times the other")
            opened.draft("RGB", _GLANCE)
        elif opened.width * opened.height > LARGE_PIXELS:
            opened.thumbnail(LARGE_SIZE)
        return ImageOps.exif_transpose(opened).convert("RGB")  # as transformers reads files
