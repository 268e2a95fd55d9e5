"""Activations between layers: on the device, in host memory, or in a folder of mapped files.

A store holds named sets of tensors, one entry for each batch: ``batches`` (inputs, and arguments of
layers), ``<stream>-<i>`` (inputs of layer ``i``), and results that are kept for a restart. A killed
run resumes after the last layer whose entries are all there.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.documents import digest, is_begun_for, note_request
from slimvlm.core.errors import OutputError, SlimError
from slimvlm.core.files import explained, held, new_file, working_folder
from slimvlm.core.progress import Say, silent
from slimvlm.models.devices import digest_of_tensors, free_memory

Tensors = Mapping[str, Tensor]

PINNING = ("cuda", "xpu")  # devices to which copies from pinned host memory need no waiting


class Memory:
    """A store that ends with its process, on a device or where each tensor was computed."""

    def __init__(self, device: torch.device | None = None, pinned: bool = False) -> None:
        self.device, self.pinned = device, pinned
        self.keeps_objects = device is None  # so layers may change their arguments
        self._sets = defaultdict[str, dict[int, tuple[dict[str, Tensor], Any]]](dict)

    def drop(self, name: str) -> None:
        """Remove a set."""
        self._sets.pop(name, None)

    def write(self, name: str, place: int, tensors: Tensors, about: Mapping[str, Any] = {}) -> None:
        """Write an entry, with a JSON note, in place of an older one."""
        stored = {key: self.held(value) for key, value in tensors.items()}
        self._sets[name][place] = stored, about

    def read(self, name: str, place: int, device: torch.device, begin: str = "") -> Tensors:
        """Read the tensors of an entry, or those whose names begin with ``begin``."""
        return {
            key: value.to(device, non_blocking=device.type in PINNING)
            for key, value in self._sets[name][place][0].items()
            if key.startswith(begin)
        }

    def held(self, value: Tensor) -> Tensor:
        """Move a tensor to where this store can keep it in memory."""
        value = value.detach()
        if self.device is None or value.device == self.device:
            return value
        pinned = self.pinned and value.device.type in PINNING  # torch rounds to powers of two
        return torch.empty_like(value, device=self.device, pin_memory=pinned).copy_(value)

    def about(self, name: str, place: int) -> Any:
        """Read the note of an entry; None if there is no such entry."""
        return self._sets[name].get(place, (None, None))[1]


class Scratch:
    """A store in a folder of folders of files, one for each entry; by default a temporary one."""

    keeps_objects = False

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            self._temporary = TemporaryDirectory(prefix="slimvlm-scratch-")
            folder = Path(self._temporary.name)
        self.folder = folder
        self._notes: dict[Path, str] = {}  # of entries that were written or checked here
        folder.mkdir(parents=True, exist_ok=True)

    def drop(self, name: str) -> None:
        """As `Memory.drop`."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self._notes = {p: note for p, note in self._notes.items() if p.parent.name != name}

    def write(self, name: str, place: int, tensors: Tensors, about: Mapping[str, Any] = {}) -> None:
        """As `Memory.write`."""
        path = self._path(name, place)
        path.parent.mkdir(exist_ok=True)
        # copies: safetensors writes none that share memory, such as a mask and its view
        stored = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        note = json.dumps(about)
        code = digest([name, path.name, digest_of_tensors(stored), note])
        with new_file(path, outlives_power_cut=False) as partial:
            save_file(stored, partial, {"about": note, "digest": code})
        self._notes[path] = note

    def read(self, name: str, place: int, device: torch.device, begin: str = "") -> Tensors:
        """As `Memory.read`; mapped on a CPU."""
        with safe_open(self._path(name, place), framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(begin)}  # noqa: SIM118

    def held(self, value: Tensor) -> Tensor:
        """As `Memory.held`: in host memory."""
        return value.detach().cpu()

    def about(self, name: str, place: int) -> Any:
        """As `Memory.about`; None also for an entry that does not hold what was written."""
        path = self._path(name, place)
        damaged = (OSError, SafetensorError, KeyError, TypeError)  # metadata may be None
        if path not in self._notes:
            with suppress(*damaged), safe_open(path, framework="pt") as file:
                noted = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                its = [name, path.name, digest_of_tensors(tensors), noted["about"]]
                if noted["digest"] == digest(its):
                    self._notes[path] = noted["about"]
        return json.loads(self._notes[path]) if path in self._notes else None

    def _path(self, name: str, place: int) -> Path:
        return self.folder / name / f"{place:06}.safetensors"

    def keep_if_same(
        self, request: dict[str, Any], file: str = "request.json", spared: str = ""
    ) -> None:
        """Drop earlier work, but for the spared set, unless ``file`` notes the same request."""
        note = self.folder / file
        if is_begun_for(note, request):
            return
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != spared:
                shutil.rmtree(path)  # an error here: what stayed would pass for the new request's
        self._notes = {p: noted for p, noted in self._notes.items() if p.parent.name == spared}
        note_request(note, request)

    def announce(self, needed: int, say: Say) -> None:
        """Announce the size of the folder; refuse to begin if the disk has too little room."""
        say(f"scratch: {needed / 2**30:.2f} GiB in {self.folder}, removed at the end")
        free = shutil.disk_usage(self.folder).free
        stored = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        if needed - stored > free:
            raise OutputError(
                f"scratch {str(self.folder)!r}: {needed / 2**30:.1f} GiB needed, "
                f"{stored / 2**30:.1f} GiB there already, {free / 2**30:.1f} GiB free"
            )


Store = Memory | Scratch


@dataclass(frozen=True)
class StatesPlace:
    """Where hidden states between layers are kept, decided from free memory."""

    needed: float  # bytes of all that is kept at one time
    device: torch.device  # where layers run
    kind: Literal["device", "host", "files"]
    free: tuple[int, int]  # bytes on the device and on the host

    @classmethod
    def of(cls, needed: float, device: torch.device, taken: int = 0) -> "StatesPlace":
        """Choose the device if a quarter of its free memory is enough, else the host if a half is.

        ``taken`` bytes of the device's free memory will be used for something else.
        """
        host = torch.device("cpu")
        on_device, on_host = free_memory(device) - taken, free_memory(host)
        free = max(on_device, 0), max(on_device if device == host else on_host, 0)
        if device.type != "cpu" and needed <= free[0] / 4:
            return cls(needed, device, "device", free)
        return cls(needed, device, "host" if needed <= free[1] / 2 else "files", free)

    def __str__(self) -> str:
        """Say how much is kept, where, and why there."""
        size, on_device, on_host = (f"{n / 2**30:.2f} GiB" for n in (self.needed, *self.free))
        why = f"{on_host} free on the host"
        if self.device.type != "cpu":
            why = f"{on_device} free on {self.device}, {why}"
        where = {"device": f"on {self.device}", "host": "in host memory", "files": "in files"}
        return f"{size} {where[self.kind]} ({why})"

    def store(self, folder: Path | None = None) -> Store:
        """Make a store there; files are in a folder, or in a temporary one."""
        if self.kind == "files":
            files = Scratch(folder)
            files.announce(int(self.needed), silent)
            return files
        if self.kind == "device":
            return Memory()
        return Memory(torch.device("cpu"), pinned=self.needed <= self.free[1] / 4)


@contextmanager
def scratch_folder(scratch: str | Path | None) -> Iterator[Path]:
    """A folder of its own, removed at the end; if a place was given, only when all went well."""
    if scratch is None:
        with TemporaryDirectory(prefix="slimvlm-scratch-") as made:
            yield Path(made)
        return
    folder = Path(scratch).absolute() / "slimvlm-scratch"
    if folder.is_symlink():  # a lock would be written next to its target
        working_folder(folder)  # refuses it
    try:
        with held(folder), explained(folder):
            working_folder(folder)
            try:
                yield folder
                shutil.rmtree(folder)
            except SlimError as error:  # would come again with the same model and data
                if not isinstance(error, OutputError):  # this goes on with more room
                    shutil.rmtree(folder)
                raise
    finally:
        with suppress(OSError):  # not empty, or not ours to remove
            folder.parent.rmdir()
