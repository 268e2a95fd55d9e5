"""A checkpoint's manifest lists every file; what became of each later is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimvlm.core.errors import ConfigError, DamagedError
from slimvlm.models.load import load
from slimvlm.pruning.manifest import MANIFEST_FILE, verify, write_manifest
from slimvlm.pruning.save import save
from tests import tiny_folder as folders


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Something with the form of a checkpoint."""
    folder = tmp_path / "checkpoint"
    (folder / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter.safetensors"):
        (folder / name).write_text(name)
    write_manifest(folder)
    return folder


def test_a_saved_checkpoint_is_whole(tmp_path: Path) -> None:
    model, processor = load(folders.folder("llava"))

    def note(folder: Path) -> None:
        (folder / "notes").write_text("mine")

    save(model, processor, tmp_path / "out", also=note)
    found = verify(tmp_path / "out")
    assert found.is_whole
    listed = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["files"]
    present = {f.name for f in (tmp_path / "out").iterdir()}
    assert set(listed) | {MANIFEST_FILE} == present >= {"model.safetensors", "notes"}
    load(tmp_path / "out")
    assert verify(tmp_path / "out").is_whole, "loading has changed something"


def test_damage_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "adapter" / "adapter.safetensors").write_text("adapter/adapter.safetensorz")
    (checkpoint / "model.safetensors").write_text("model")
    (checkpoint / "adapter" / "new").write_text("")
    found = verify(checkpoint)
    assert found.missing == ("config.json",)
    assert found.changed == ("adapter/adapter.safetensors", "model.safetensors")
    assert found.extra == ("adapter/new",)
    with pytest.raises(DamagedError) as damage:
        found.require_whole()
    told = ("missing: config.json", "extra: adapter/new", "changed: adapter/adapter.safetensors, m")
    assert all(part in str(damage.value) for part in (str(checkpoint), *told))


def test_one_flipped_bit_is_found(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    assert verify(checkpoint).changed == ("model.safetensors",)


def test_a_link_to_nowhere_is_damage(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to("nowhere")
    assert verify(checkpoint).changed == ("config.json",)


def test_a_run_folder_means_its_checkpoint(checkpoint: Path) -> None:
    assert verify(checkpoint.parent) == verify(checkpoint)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"format": "other/1", "files": {}}', '{"format": 1}', "\udcff",
             '{"format": "slimvlm-manifest/1", "files": {"a": 7}}',
             '{"format": "slimvlm-manifest/1", "files": 7}']
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_named(text: str | None, checkpoint: Path) -> None:
    manifest = checkpoint / MANIFEST_FILE
    manifest.unlink()
    if text is not None:
        manifest.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=MANIFEST_FILE):
        verify(checkpoint)
