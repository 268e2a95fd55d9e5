"""Data files become samples; what is broken is named, counted and never used."""

import io
import json
import random
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from transformers.image_utils import load_image

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data import chat
from slimvlm.data.chat import encode_samples, length_of
from slimvlm.data.read import fitted, load_samples, subset
from slimvlm.data.samples import Sample, find_image, identifying_bytes, open_image
from slimvlm.models.load import load_config
from slimvlm.models.parts import context_of
from tests import tiny_pictures
from tests.tables import tables
from tests.tiny_folder import folder, picture, processor, turn

TABLES = tables(__file__)


def silent(line):
    raise AssertionError(f"unexpected warning: {line}")


def llava(name, *said, **more):
    """A LLaVA row; the turns alternate between human and gpt."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": name, "conversations": turns, **more}


def chat_row(name, *said, **more):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]
    return {"id": name, "messages": turns, **more}


def said(text):
    return {"type": "text", "text": text}


GOOD = llava("good", "Which colour?", "Red.")


@pytest.fixture
def home(tmp_path):
    """A folder with two pictures, one of them deeper."""
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    picture(0).save(home / "a.png")
    picture(1).save(home / "deep" / "b.png")
    picture(2).save(tmp_path / "outside.png")
    return home


def write(home, *rows, name="data.json"):
    path = home / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def test_a_broken_line_is_named_and_blank_ones_are_no_rows(home):
    path = home / "data.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"id": "cut", "mess\n' + json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl'.*line 2 is not JSON"):
        load_samples(path, warn=silent)
    warnings = []
    assert len(load_samples(path, max_bad_rows=1, warn=warnings.append)) == 2
    assert "line 2" in warnings[0]
    row = json.dumps({key: value for key, value in GOOD.items() if key != "id"})
    path.write_text(f"\n{row}\n\n{json.dumps({**GOOD, 'id': None})}\n")
    assert {sample.id for sample in load_samples(path, warn=silent)} == {"0", "1"}


def table(with_pictures=True):
    """What people publish: messages with placeholders, pictures as an Image column."""
    rows = []
    for index in range(3):
        shown = [{"type": "image", "text": None}] if with_pictures else []
        row = chat_row(f"r{index}", [*shown, said(f"Which {index}?")], [said("Red.")])
        rows.append({**row, "images": [picture(index)]} if with_pictures else row)
    made = datasets.Dataset.from_list(rows)
    if with_pictures:
        made = made.cast_column("images", datasets.Sequence(datasets.Image()))
    return made


WAYS = {
    "rows.parquet": lambda path: table().to_parquet(str(path)),
    "saved": lambda path: (
        table().save_to_disk(str(path)),
        (path / "cache-1.arrow").write_bytes(b"of another time"),
    ),
    "splits": lambda path: datasets.DatasetDict({"train": table()}).save_to_disk(str(path)),
    "hub": lambda path: (
        (path / "data").mkdir(parents=True),
        table().to_parquet(str(path / "data" / "train-00000-of-00001.parquet")),
    ),
}
"""Ways to store a table; ``hub`` is the layout of a downloaded hub dataset."""


@pytest.mark.parametrize("way", WAYS)
def test_tables_are_read(way, home):
    WAYS[way](home / way)
    samples = sorted(load_samples(home / way, warn=silent), key=lambda sample: sample.id)
    assert [sample.id for sample in samples] == ["r0", "r1", "r2"]
    for index, sample in enumerate(samples):
        expected = (turn("user", None, f"Which {index}?"), turn("assistant", "Red."))
        assert sample.messages == expected
        (image,) = sample.images
        assert isinstance(image, Image.Image)
        assert image.convert("RGB").tobytes() == picture(index).tobytes()
    table(with_pictures=False).save_to_disk(str(home / "text"))
    assert all(not s.images for s in load_samples(home / "text", warn=silent))


def test_an_images_folder_comes_before_the_data_s_own(home, tmp_path):
    path = write(tmp_path, llava("x", "Which?", "Red.", image="b.png"))
    (sample,) = load_samples(path, images=home / "deep", warn=silent)
    assert sample.images == (home / "deep" / "b.png",)
    with pytest.raises(ConfigError, match=r"images '.*nowhere' is not a folder"):
        load_samples(path, images=home / "nowhere", warn=silent)
    rows = [llava("x", "W?", "Red.", image="shown.png")]
    datasets.Dataset.from_list(rows).save_to_disk(str(home / "saved"))
    picture(0).save(home / "shown.png")
    with pytest.raises(DataError, match=r"'shown\.png' not found in '.*saved'"):
        load_samples(home / "saved", warn=silent)
    (sample,) = load_samples(home / "saved", images=home, warn=silent)
    assert sample.images == (home / "shown.png",)
    picture(0).save(home / "saved" / "shown.png")
    (sample,) = load_samples(home / "saved", warn=silent)
    assert sample.images == (home / "saved" / "shown.png",)


def shown(image):
    return llava("bad", "W?", "Red.", image=image)


BROKEN = TABLES["broken_rows"]


@pytest.mark.parametrize("why", BROKEN)
def test_a_broken_row_is_named_and_skipped_up_to_a_limit(why, home):
    row, message = BROKEN[why]
    path = write(home, row, GOOD, row)
    warnings = []
    samples = load_samples(path, max_bad_rows=2, warn=warnings.append)
    assert [sample.id for sample in samples] == ["good"]
    *named, total = warnings
    assert len(named) == 2
    assert all("'bad'" in line and message in line for line in named)
    assert "2 broken rows skipped, 1 samples read" in total
    for given_rows, most in (((row, GOOD, row), 1), ((GOOD, row), 0)):
        with pytest.raises(DataError) as refusal:
            load_samples(write(home, *given_rows), max_bad_rows=most, warn=lambda line: None)
        assert all(part in str(refusal.value) for part in (message, "'bad'", str(path)))


# Pictures that must not be decoded, or cannot be.
def png_header(width, height):
    """The beginning of a picture that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def encoded(form, size=(200, 150)):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, form)
    return file.getvalue()


UNREADABLE = {
    "bomb": (png_header(60_000, 60_000), "cannot be read"),
    "too many pixels": (png_header(10_000, 9_000), "10000 x 9000 pixels; at most 89,478,485"),
    "too long": (encoded("PNG", (402, 2)), "402 x 2 pixels; one side may be 200 times"),
    "text": (b"not a picture", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    **{
        f"cut {form} at {share}": (content[: int(len(content) * share)], "cannot be read")
        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
        for share in (0.3, 0.95)
        for content in (encoded(form),)
    },
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("stored", ["file", "bytes"])
@pytest.mark.parametrize("why", UNREADABLE)
def test_an_unreadable_picture_is_counted_and_named(why, stored, home):
    content, message = UNREADABLE[why]
    if stored == "bytes" and not content:
        pytest.skip("no bytes mean a path")
    (home / "bad.png").write_bytes(content)
    image = {"bytes": content, "path": None} if stored == "bytes" else "bad.png"
    row = llava("bad", "W?", "Red.", image=[image])
    path = home / "data.parquet"
    datasets.Dataset.from_list([row, llava("good", "W?", "Red.")]).to_parquet(path)
    warnings = []
    assert [s.id for s in load_samples(path, max_bad_rows=1, warn=warnings.append)] == ["good"]
    assert "'bad'" in warnings[0]
    assert message in warnings[0]
    with pytest.raises(DataError, match=r"'bad'.*--max-bad-rows 0"):
        load_samples(path, warn=silent)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_whole_pictures_are_read(form, home):
    (home / "picture").write_bytes(encoded(form))
    (sample,) = load_samples(write(home, shown("picture")), warn=silent)
    assert open_image(sample.images[0]).size == (200, 150)


def test_a_dataset_and_a_link_cannot_open_files_elsewhere(home, tmp_path):
    """`datasets` itself would open any path that stands in an image column."""
    image = {"bytes": None, "path": str(tmp_path / "outside.png")}
    table = datasets.Dataset.from_list([{**llava("bad", "W?", "Red."), "image": image}])
    stored = table.cast_column("image", datasets.Image()).data.table
    parquet.write_table(stored, home / "rows.parquet")
    (home / "link.png").symlink_to(tmp_path / "outside.png")
    for source, named in (
        (home / "rows.parquet", r"'bad'.*outside\.png' "),
        (write(home, shown("link.png")), ""),
    ):
        with pytest.raises(DataError, match=named + "lies outside"):
            load_samples(source, warn=silent)


GOOD_LINE = json.dumps(GOOD).encode()
LATIN = GOOD_LINE.replace(b"Red", b"R\xe9d")
CUT = GOOD_LINE + b'\n{"id": "cut", "mess\n'
REFUSED = {
    "row is a text": ("data.json", b"[%b, 1]" % GOOD_LINE, DataError, "row 1 is not an object"),
    "cut": ("data.json", b'[{"id": "cut", "conv', DataError, r"data\.json'.*not JSON"),
    "object": ("data.json", b'{"rows": [%b]}' % GOOD_LINE, DataError, "must be a list of samples"),
    "no text": ("data.json", b"\xff\xfe\x00\x01", DataError, r"data\.json"),
    "in latin-1": ("data.json", LATIN, DataError, "can't decode byte 0xe9"),
    "row in latin-1": ("data.jsonl", LATIN, DataError, "line 1 .*can't decode byte 0xe9"),
    "empty list": ("data.json", b"[]", DataError, "no usable sample"),
    "no lines": ("data.jsonl", b"", DataError, "no usable sample"),
    "parquet": ("data.parquet", b"PAR1 but not really", DataError, r"data\.parquet"),
    "csv": ("data.csv", b"a,b\n", ConfigError, r"data\.csv'.*\.json, \.jsonl or \.parquet"),
    "cut line in a folder": ("rows/data.jsonl", CUT, DataError, r"rows'.*line 2 is not JSON"),
    "script": ("rows/rows.py", b"", ConfigError, r"rows': has no \.jsonl, \.json, \.parquet or"),
    "empty folder": ("empty/", b"", ConfigError, r"empty'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_broken_source_is_named(why, home):
    name, content, error, message = REFUSED[why]
    (home / name.rpartition("/")[0]).mkdir(exist_ok=True)
    if not name.endswith("/"):
        (home / name).write_bytes(content)
    source = home / (name.split("/")[0])
    most = 0 if why.startswith(("row", "cut line")) else 100
    with pytest.raises(error, match=message):
        load_samples(source, max_bad_rows=most, warn=silent)


def test_a_source_that_cannot_be_read_is_named(home, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = write(home, GOOD)
    monkeypatch.setattr(Path, "read_text", denied)
    for place in (path, path.parent):
        with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
            load_samples(place, warn=silent)


def test_limit_counts_good_samples_from_the_start_also_of_the_demo(home):
    bad = BROKEN["empty answer"][0]
    rows = [bad, *(llava(f"s{i}", "Q?", "A.") for i in range(5)), bad]
    path = write(home, *rows)
    warnings = []
    assert len(load_samples(path, limit=3, max_bad_rows=2, warn=warnings.append)) == 3
    every = load_samples(path, max_bad_rows=2, warn=warnings.append)
    assert {sample.id for sample in every} == {f"s{i}" for i in range(5)}
    assert load_samples(path, limit=3, max_bad_rows=2, warn=warnings.append) == every[:3]
    samples = load_samples("demo", limit=3, warn=silent)
    assert len(samples) == 3
    assert all(m["role"] in ("user", "assistant", "system") for s in samples for m in s.messages)


def test_what_a_model_cannot_read_is_broken(home):
    long = llava("long", "Which colour? " * 40, "Red.")
    seen = llava("seen", "<image>Which colour?", "Red.", image="a.png")
    path, words = write(home, long, seen, GOOD), processor("text")
    assert len(load_samples(path, warn=silent)) == 3
    with pytest.raises(DataError, match=r"'seen': .*the model cannot see \(--max-bad-rows 0\)"):
        load_samples(path, warn=silent, processor=words)
    told = []
    samples = load_samples(path, None, 1, 2, told.append, words, max_length=60)
    assert [sample.id for sample in samples] == ["good"]
    assert [line.partition("sample ")[2][:6] for line in told[:2]] == ["'long'", "'seen'"]
    assert "tokens, --max-length is 60" in told[0]
    with pytest.raises(ConfigError, match="max_length 60 needs a processor"):
        load_samples(path, warn=silent, max_length=60)
    with pytest.raises(ConfigError, match="max_length 0 must be at least 1"):
        load_samples(path, warn=silent, processor=words, max_length=0)


def test_a_subset_depends_on_the_seed_and_every_folder_keeps_its_share():
    samples = mixed(0, 400, 0, folders=4)
    chosen = subset(samples, 0.1, seed=1)
    random.seed(2)
    assert chosen == subset(samples, 0.1, seed=1) != subset(samples, 0.1, seed=2)
    folders = [s.images[0].parent.name for s in chosen]
    assert {folders.count(str(i)) for i in range(4)} == {10}
    samples = mixed(0, 60, 0, folders=60)
    draws = [subset(samples, 0.5, seed) for seed in range(8)]
    assert {s.id for chosen in draws for s in chosen} == {s.id for s in samples}


def mixed(texts, ones, several, folders=1):
    """Samples of every stratum, mixed."""
    made = []
    for index, images in enumerate([0] * texts + [1] * ones + [3] * several):
        paths = (Path(f"/home/{index % folders}/{index}.png"),) * images
        made.append(Sample(str(index), (turn("user", "Q"), turn("assistant", "A")), paths))
    random.Random(7).shuffle(made)
    return made


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 30), st.integers(0, 9))
def test_subsets_are_stratified_nested_and_of_the_right_size(texts, ones, several, seed):
    samples = mixed(texts, ones, several)
    smaller = set()
    for fraction in (0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
        chosen = subset(samples, fraction, seed)
        names = {s.id for s in chosen}
        assert chosen == [s for s in samples if s.id in names]
        assert len(chosen) == len(names) == max(round(fraction * len(samples)), 1)
        assert smaller <= names
        smaller = names
        for images, count in ((0, texts), (1, ones), (3, several)):
            share = sum(len(s.images) == images for s in chosen) / len(samples)
            assert abs(share - fraction * count / len(samples)) <= 2 / len(samples)
    assert chosen == samples


@pytest.mark.parametrize("name", tiny_pictures.BY_DEFAULT)
def test_long_pictures_are_counted_and_short_ones_not_processed(name, monkeypatch):
    """The estimate is never too low, in company and turned, and seldom much too high."""
    words = tiny_pictures.made(name)[1]
    monkeypatch.setattr(chat, "length_of", counted := Mock(side_effect=chat.length_of))
    for sizes in ([(90, 40)], [(40, 90)], [(300, 200)] * 2):
        shown = tuple(Image.new("RGB", size) for size in sizes)
        turns = turn("user", *[None] * len(sizes), "Q?"), turn("assistant", "A.")
        sample = Sample("s", turns, shown)
        length = length_of(words, sample)
        fitted(words, sample, length)
        with pytest.raises(DataError, match=f"has {length} tokens"):
            fitted(words, sample, length - 1, is_asked=False)
        counted.reset_mock()
        assert fitted(words, sample, 10 * length) is sample
        assert not counted.called


def test_pictures_in_memory_and_in_files_that_may_move_are_told_apart(home):
    """Decoded in place, the pixels of every picture of a benchmark would stay in memory."""
    contents = [{"bytes": (home / name).read_bytes()} for name in ("a.png", "deep/b.png", "a.png")]
    first, other, same = (find_image(content, "x", home) for content in contents)
    assert identifying_bytes(first) == identifying_bytes(same) != identifying_bytes(other)
    assert isinstance(first, Image.Image)
    assert isinstance(first.fp, io.BytesIO)
    wide, high = (Image.new("L", size) for size in ((4, 2), (2, 4)))
    assert identifying_bytes(wide) != identifying_bytes(high)
    moved = home / "deep" / "a.png"
    moved.write_bytes((home / "a.png").read_bytes())
    assert identifying_bytes(moved) != identifying_bytes(home / "a.png")
    movable = [identifying_bytes(path, may_move=True) for path in (moved, home / "a.png")]
    assert movable[0] == movable[1]
    moved.write_bytes(moved.read_bytes() + b" ")
    assert identifying_bytes(moved, may_move=True) != movable[0]


# Samples that are longer than a model can read: found, refused or cut.

KINDS = ["text", "llava", "qwen2_5_vl"]


def talk(*lengths, sees=False):
    """Exchanges whose answers have so many words."""
    turns = []
    for number, length in enumerate(lengths):
        shown = [None] if sees else []
        turns.append(turn("user", *shown, f"Which colour is part {number}?"))
        turns.append(turn("assistant", " ".join(["red"] * length)))
    return Sample("s", tuple(turns), tuple(picture(i) for i in range(len(lengths) * sees)))


@pytest.mark.parametrize("kind", KINDS)
def test_turns_go_from_the_end_with_their_pictures(kind):
    words = processor(kind)
    sample = talk(3, 4, 5, sees=kind != "text")
    two = Sample("s", sample.messages[:4], sample.images[:2])
    length = length_of(words, sample)
    assert fitted(words, sample, length - 1, cuts=True) == two
    assert fitted(words, sample, length, cuts=True) is sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_the_end_of_the_only_answer_goes(kind, tokens):
    words = processor(kind)
    sample = talk(60, sees=kind != "text")
    most = length_of(words, sample) - tokens
    found = fitted(words, sample, most, cuts=True)
    said, whole = (s.messages[-1]["content"][0]["text"] for s in (found, sample))
    assert whole.startswith(said)
    assert most - 3 < length_of(words, found) <= most
    assert found.messages[:-1] == sample.messages[:-1]
    assert (encode_samples(words, [found])["labels"] != -100).any()


def test_too_long_is_named_with_its_cure_counted_and_said(tmp_path):
    words, sample = processor("text"), talk(60)
    with pytest.raises(DataError, match=r"'s' has \d+ tokens, --max-length is 20 .*-long truncate"):
        fitted(words, sample, 20)
    with pytest.raises(DataError, match=r"the model reads 20"):
        fitted(words, sample, 20, is_asked=False)
    with pytest.raises(DataError, match="nothing of its answer"):
        fitted(words, sample, 5, cuts=True)
    data = written(tmp_path / "data.jsonl", talk(3), talk(200), talk(300), talk(4))
    words, context = processor("text"), context_of(load_config(folder("text")))
    assert context == 256
    for asked, told in ((10, "--max-length is 10 "), (300, "the model reads 256 ")):  # the lower
        with pytest.raises(DataError, match=told):
            load_samples(data, processor=words, max_length=asked, context=context)
    said = []
    how = {"warn": said.append, "processor": words, "context": context, "too_long": "truncate"}
    found = load_samples(data, **how)
    assert [length_of(words, sample) <= 256 for sample in found] == [True] * 4
    assert found[0] == load_samples(data)[0]
    assert said == [f"data {str(data)!r}: 2 samples were cut to 256 tokens"]
    load_samples(written(data, talk(200), talk(300)), limit=1, max_bad_rows=1, **how)
    assert said[1:] == [f"data {str(data)!r}: 1 samples were cut to 256 tokens"]
    written(data, talk(3), talk(200))
    with pytest.raises(DataError, match=r"'1' has .* the model reads 256"):
        load_samples(data, warn=said.append, processor=words, context=context)


def written(path, *samples):
    lines = []
    for number, sample in enumerate(samples):
        turns = [{"role": m["role"], "content": m["content"][0]["text"]} for m in sample.messages]
        lines.append(json.dumps({"id": str(number), "messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def test_a_turned_photo_is_read_as_transformers_reads_it(tmp_path):
    shown = Image.new("RGB", (8, 4), "red")
    exif = shown.getexif()
    exif[0x0112] = 6  # a quarter turn
    shown.save(tmp_path / "photo.jpg", exif=exif)
    theirs = load_image(str(tmp_path / "photo.jpg"))
    for source in (tmp_path / "photo.jpg", Image.open(tmp_path / "photo.jpg")):
        ours = open_image(source)
        assert ours.size == theirs.size == (4, 8)
        assert ours.tobytes() == theirs.tobytes()
