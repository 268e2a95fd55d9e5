"""A model folder that was tampered with: one line that names the file, and nothing is run."""

import json
import shutil
from pathlib import Path

import pytest
import transformers as hf

from slimvlm.core.errors import SlimError
from slimvlm.export.quantize import quantize
from slimvlm.models.families import BACKBONES, FAMILIES
from slimvlm.models.files import check_folder
from slimvlm.models.load import anatomy, load
from slimvlm.scoring.layerwise import open_checkpoint
from tests import tiny_folder as folders
from tests.tables import tables
from tests.trust.spoiled import INDEX, WEIGHTS, divide, renamed_part, write_pickle

TABLES = tables(__file__)


def _set(**fields):
    return lambda folder: folders.edit_json(folder / "config.json", lambda v: v.update(fields))


def _pickled_part(folder):
    renamed_part(folder, "part.bin")
    write_pickle(folder / "part.bin", folder.parent / "marked")


def _part_above(name):
    def move(folder):
        renamed_part(folder, name.format(folder.parent))
        shutil.move(folder / "a.safetensors", folder.parent / "a.safetensors")

    return move


def _linked_out(name):
    def link(folder):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return link


def _index(text):
    def write(folder):
        divide(folder, "a.safetensors", "b.safetensors")
        (folder / INDEX).write_text(text)

    return write


def _text(name, text):
    return lambda folder: (folder / name).write_text(text) and None


def _adapter(folder):
    shutil.copytree(folder, folder.parent / "base")
    row = {"base_model_name_or_path": str(folder.parent / "base"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(row))


SPOILED = {
    "a part is a pickle": (_pickled_part, "part.bin"),
    "a part lies above": (_part_above("../a.safetensors"), r"\.\./a\.safetensors"),
    "a part has an absolute path": (_part_above("{}/a.safetensors"), "a.safetensors"),
    "weights are linked out": (_linked_out(WEIGHTS), WEIGHTS),
    "the configuration is linked out": (_linked_out("config.json"), "config.json"),
    "it is an adapter": (_adapter, "adapter_config.json"),
    "the index is deep": (_index("[" * 5000), INDEX),
    "config.json is deep": (_text("config.json", '{"a":' * 3000 + "1" + "}" * 3000), "config.json"),
    **{why: (_set(**fields), named) for why, (fields, named) in TABLES["fields"].items()},
    **{why: (_text(name, text), named) for why, (name, text, named) in TABLES["texts"].items()},
    **{why: (_index(text), INDEX) for why, text in TABLES["indices"].items()},
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_refused_in_one_line(name, tmp_path):
    spoil, named = SPOILED[name]
    folder = folders.copied("text", tmp_path / "model")
    spoil(folder)
    too = name in ("a part is a pickle", "a part lies above", "absurd depth")
    for read in (load, *((open_checkpoint, anatomy) if too else ())):
        with pytest.raises(SlimError, match=named) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "marked").exists()


def test_the_layout_of_the_hub_s_cache_is_read(tmp_path):
    """Its snapshots are links to files that lie beside them, under ``blobs``."""
    repo = tmp_path / "models--own--tiny"
    snapshot, blobs = repo / "snapshots" / "main", repo / "blobs"
    folders.copied("text", snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("..") / ".." / "blobs" / str(number))
    model, words = load(snapshot)
    assert words is not None
    assert anatomy(model) == anatomy(folders.folder("text"))


def test_divided_weights_and_links_inside_are_read(tmp_path):
    folder = folders.copied("text", tmp_path / "model")
    divide(folder, "a.safetensors", "b.safetensors")
    (folder / "c.safetensors").symlink_to("a.safetensors")
    load(folder)
    linked = tmp_path / "link"
    linked.symlink_to(folder)
    load(linked)


def test_quantize_reads_no_pickle_either(tmp_path):
    folder = folders.copied("text", tmp_path / "model")
    (folder / WEIGHTS).unlink()
    write_pickle(folder / "pytorch_model.bin", tmp_path / "marked")
    with pytest.raises(SlimError, match="is a pickle"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "marked").exists()


@pytest.mark.parametrize("kind", sorted({*FAMILIES, *BACKBONES}))
def test_real_sizes_pass(kind, tmp_path):
    """The default configuration of every class describes the model that the class was made for."""
    config = hf.CONFIG_MAPPING[kind]()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    processor = hf.IMAGE_PROCESSOR_MAPPING.get(type(config), None)
    for made in processor.values() if isinstance(processor, dict) else ():
        pictures = json.loads(made().to_json_string())
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
        check_folder(folder)
    check_folder(folder)


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 3136, "longest_edge": 12845056}, {"height": 980}]
)
def test_real_sizes_of_pictures_pass(size, tmp_path):
    folder = folders.copied("text", tmp_path / "model")
    values = {"size": size, "min_pixels": 3136, "max_pixels": 12845056, "max_patches": 12}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    values["model_max_length"] = 1000000000000000019884624838656
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    check_folder(folder)


def test_the_small_files_of_a_hub_repository_are_looked_at(tmp_path, monkeypatch):
    folder = folders.copied("text", tmp_path / "snapshots" / "main")
    _pickled_part(folder)

    def in_cache(model, name):
        assert model == "own/tiny"
        return str(folder / name) if (folder / name).exists() else None

    monkeypatch.setattr("slimvlm.models.files.file_if_reachable", in_cache)
    with pytest.raises(SlimError, match=r"part\.bin"):
        load("own/tiny")
