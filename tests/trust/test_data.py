"""Data of others: no file outside a folder is read, and no cache answers for other bytes."""

import gzip
import io
import json
import os

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data.read import load_samples, read_rows
from slimvlm.data.samples import LARGE_SIZE, open_image

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "own"}]
CONFIGS = "configs:\n- config_name: default\n  data_files: FILES\n"
CARDS = {
    "plain": f"---\n{CONFIGS}---\n",
    "a line first": f"\n---\n{CONFIGS}---\n",
    "spaces first": f"  \n---\n{CONFIGS}---\n",
    "a byte order mark": f"\ufeff---\n{CONFIGS}---\n",
    "a comment": f"---\n# --- a\n{CONFIGS}---\n",
    "a list": f"---\n{CONFIGS.replace('FILES', '[FILES]')}---\n",
}


def said(data):
    return [str(sample.messages[1]["content"][0]["text"]) for sample in load_samples(data)]


def write_rows(path, answer):
    turns = [TURNS[0], {"role": "assistant", "content": answer}]
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"messages": [turns] * 2}), path)
    else:
        path.write_text(json.dumps({"messages": turns}) + "\n")


@pytest.mark.parametrize("files", ["../secret.jsonl", "SECRET", "https://x.y/z.csv", "a/../../b"])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_no_card_leads_out_of_a_folder(name, card, files, tmp_path):
    write_rows(tmp_path / "secret.jsonl", "secret")
    folder = tmp_path / "data"
    folder.mkdir()
    text = CARDS[card].replace("FILES", files.replace("SECRET", str(tmp_path / "secret.jsonl")))
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=r"has no \.jsonl"):
        load_samples(folder)
    write_rows(folder / "rows.jsonl", "own")
    assert said(folder) == ["own"]


@pytest.mark.parametrize("name", ["x.parquet", "folder/x.jsonl", "folder/x.parquet"])
def test_changed_data_of_the_same_date_are_read(name, tmp_path):
    (tmp_path / "folder").mkdir()
    for answer in ("old", "NEW"):
        write_rows(tmp_path / name, answer)
        os.utime(tmp_path / name, (315532800, 315532800))
        assert set(said(tmp_path / name.split("/")[0])) == {answer}


def test_nothing_is_copied_elsewhere(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    write_rows(tmp_path / "x.parquet", "own")
    assert said(tmp_path / "x.parquet") == ["own", "own"]
    assert not list(home.rglob("*"))


def test_of_splits_the_one_for_training_is_read(tmp_path):
    for split in ("train", "test", "validation"):
        write_rows(tmp_path / f"{split}-00000-of-00001.parquet", split)
    assert set(said(tmp_path)) == {"train"}
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "rows.parquet")
    assert set(said(tmp_path)) == {"train"}


def test_pipes_links_and_compressed_files_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with gzip.open(folder / "rows.jsonl.gz", "wb") as file:
        file.write(b"x" * 1000)
    with pytest.raises(ConfigError, match=r"has no \.jsonl"):
        list(read_rows(folder))
    os.mkfifo(folder / "data-00000-of-00001.arrow")
    with pytest.raises(ConfigError, match="is not a regular file"):
        list(read_rows(folder))
    (folder / "data-00000-of-00001.arrow").unlink()
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read|not a regular file"):
        list(read_rows(folder))


@pytest.mark.parametrize(
    "metadata",
    ["5", '{"info": 5}', '{"info": {"features": 5}}', '{"info": {"features": {"messages": []}}}'],
)
def test_a_description_in_a_parquet_file_changes_nothing(metadata, tmp_path):
    table = pa.table({"messages": [TURNS]}).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert said(tmp_path / "x.parquet") == ["own"]


def test_a_table_that_ends_early_is_named(tmp_path):
    write_rows(tmp_path / "x.parquet", "own")
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content[:20] + content[40:])
    with pytest.raises(DataError, match="is not a parquet file"):
        load_samples(tmp_path / "x.parquet")


def test_a_picture_beyond_every_processor_is_reduced():
    buffer = io.BytesIO()
    Image.new("L", (9000, 4500), 40).save(buffer, "PNG")
    found = open_image(Image.open(io.BytesIO(buffer.getvalue())))
    assert found.size == (LARGE_SIZE[0], LARGE_SIZE[1] // 2)


def test_rows_that_repeat_a_long_text_are_converted_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("slimvlm.data.read.BATCH_BYTES", 2**20)
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), ["x" * 2**20])
    table = pa.table({"messages": [TURNS] * 64, "junk": long})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as file:
        file.write_table(table)
    converted = []
    monkeypatch.setattr(
        "slimvlm.data.read.plain_rows", lambda part, _: converted.append(len(part)) or []
    )
    for name in ("x.parquet", "x.arrow"):
        assert not list(read_rows(tmp_path / name))
    assert converted == [1] * 128


def test_a_table_of_more_rows_than_bytes_is_refused(tmp_path):
    rows = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 2], pa.int32()), ["s"])
    table = pa.table({"messages": rows})
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as file:
        file.write_table(table)
    parquet.write_table(pa.table({"messages": pa.nulls(10**6)}), tmp_path / "x.parquet")
    for name in ("x.parquet", "x.arrow"):
        with pytest.raises(DataError, match="rows, more than bytes"):
            list(read_rows(tmp_path / name))


def test_a_row_of_very_many_pictures_is_broken(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS, "images": ["a.png"] * 2000}))
    with pytest.raises(DataError, match="has 2000 images; at most 1024"):
        load_samples(tmp_path / "x.jsonl")


@pytest.mark.parametrize("line", ["[" * 5000, "9" * 5000, '{"a": "\\ud800', "\x00", "nul", "]"])
def test_a_line_that_no_reader_takes_is_named(line, tmp_path):
    write_rows(tmp_path / "x.jsonl", "own")
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 2") as caught:
        load_samples(tmp_path / "x.jsonl")
    assert "\n" not in str(caught.value)
    assert len(load_samples(tmp_path / "x.jsonl", max_bad_rows=1)) == 1
