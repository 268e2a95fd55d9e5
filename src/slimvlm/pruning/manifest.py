"""What a checkpoint folder holds: the size and sha256 of every file, to find damage later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from slimvlm.core.documents import Count, built, read_object
from slimvlm.core.errors import ConfigError, DamagedError
from slimvlm.core.files import write_text

MANIFEST_FILE = "slimvlm_manifest.json"
FORMAT = "slimvlm-manifest/1"


@dataclass(frozen=True)
class Verification:
    """What became of a checkpoint since it was written.

    Attributes:
        folder: The checkpoint.
        num_files: Files that its manifest lists.
        missing: Listed files that are gone.
        changed: Listed files with other contents.
        extra: Files that nobody listed.
    """

    folder: str
    num_files: int
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every file, and no other, is what was written."""
        return not (self.missing or self.changed or self.extra)

    def require_whole(self) -> None:
        """Raise where something is wrong.

        Raises:
            DamagedError: If a file is missing, changed or extra; the message names each.
        """
        if not self.is_whole:
            found = {"missing": self.missing, "changed": self.changed, "extra": self.extra}
            told = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
            raise DamagedError(
                f"checkpoint {self.folder!r} is not what was written. {'; '.join(told)}"
            )


@dataclass(frozen=True)
class _Listed:
    """What a manifest says of a file."""

    size: Count
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """What `write_manifest` writes."""

    format: Literal["slimvlm-manifest/1"]
    files: Mapping[str, _Listed]


def write_manifest(folder: Path) -> None:
    """List every file of a finished checkpoint folder in ``slimvlm_manifest.json``.

    Raises:
        OutputError: If the disk is full.
    """
    files = {name: _described(folder / name) for name in sorted(_file_names(folder))}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    write_text(folder / MANIFEST_FILE, text + "\n")


def verify(folder: str | Path) -> Verification:
    """Compare a checkpoint folder with the manifest that was written with it.

    Every file is read. Damage by disks and copies is found, a forger is not: the manifest is not
    signed.

    Args:
        folder: A checkpoint folder, or a run folder with one inside.

    Raises:
        ConfigError: If there is no such folder, or it has no manifest that can be read.
    """
    folder = Path(folder)
    if (folder / "checkpoint" / MANIFEST_FILE).is_file():
        folder = folder / "checkpoint"
    listed = _read(folder)
    present = _file_names(folder)
    return Verification(
        folder=str(folder),
        num_files=len(listed),
        missing=tuple(sorted(listed.keys() - present)),
        changed=tuple(n for n in sorted(present & set(listed)) if _differs(folder / n, listed[n])),
        extra=tuple(sorted(present - listed.keys())),
    )


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise ConfigError(f"checkpoint {str(folder)!r} has no {MANIFEST_FILE}")
    found = built(_Manifest, read_object(path, "manifest"), f"manifest {str(path)!r}")
    return {name: asdict(file) for name, file in found.files.items()}


def _file_names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix() for path in files} - {MANIFEST_FILE}


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _differs(file: Path, listed: dict[str, Any]) -> bool:
    try:
        return file.stat().st_size != listed["size"] or _described(file) != listed
    except OSError:
        return True
