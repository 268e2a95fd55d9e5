"""Every field of conversations in the wild is used or refused by name, and samples are drawn.

The rows are written by hand after LLaVA-665k, ShareGPT4V, OpenAI's fine-tuning files, TRL, Qwen-VL,
InternVL, LLaMA-Factory, ms-swift and The Cauldron. What each becomes is what its author meant.
"""

import json

import datasets
import pytest
from PIL import Image

from slimvlm import load_samples
from slimvlm.core.errors import ConfigError, DataError
from slimvlm.runs.recipe import Recipe, read_split
from tests import tiny_folder as folders
from tests.tables import tables

TABLES = tables(__file__)

FORMATS = ("data.json", "data.jsonl", "data.parquet")
ASK, SAY = "Which colour?", "Red."


def llava(ask=ASK, **more):
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": SAY}]
    return {"id": "x", "conversations": turns, **more}


def chat(ask=ASK, say=None, **more):
    """Messages; ``say`` adds fields to the answer's turn."""
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": SAY, **(say or {})}]
    return {"id": "x", "messages": turns, **more}


def told(role, *parts):
    """A turn as a sample has it; None stands for a picture."""
    shown = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": shown}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("home")
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(made / name)
    return made


def write(row, home, name):
    rows = row if isinstance(row, list) else [row]
    path = home / name
    if name == "data.parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        lines = name == "data.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("what", TABLES["used"])
def test_a_field_is_used(what, name, home):
    row, turns, pictures = TABLES["used"][what]
    if name == "data.parquet" and "[{'type'" in str(row):
        pytest.skip("a column of a table is of one type")
    (sample,) = load_samples(write(row, home, name), warn=lambda line: None)
    assert list(sample.messages) == [told(*turn) for turn in turns]
    assert [getattr(image, "name", None) for image in sample.images] == pictures


@pytest.mark.parametrize("what", TABLES["refused"])
def test_what_no_sample_holds_is_refused_by_name(what, home):
    row, named = TABLES["refused"][what]
    with pytest.raises(DataError, match=r"--max-bad-rows 0") as refusal:
        load_samples(write(row, home, "data.jsonl"), warn=lambda line: None)
    assert named in str(refusal.value)


def test_columns_that_are_not_read_are_said_once(home):
    for rows, said in (
        ([llava(img="a.png"), llava(width=8)], "no row has an image; {}: img, width"),
        (llava(image="a.png", model="v"), "{}: model"),
    ):
        lines = []
        load_samples(write(rows, home, "data.json"), warn=lines.append)
        (line,) = lines
        assert line.endswith(f"data.json': {said.format('unknown columns')}")
    load_samples(write([llava(), chat()], home, "data.json"), warn=pytest.fail)


@pytest.mark.parametrize("image", [None, "a.png"])
def test_a_model_s_own_token_for_pictures_is_broken_data(image, home):
    """It would train without a picture, or stop the training."""
    path = write([llava(f"<|image_pad|>{ASK}", image=image), llava()], home, "data.json")
    lines, how = [], {"processor": folders.processor("qwen2_5_vl"), "max_bad_rows": 1}
    assert len(load_samples(path, warn=lines.append, **how)) == 1
    assert "'<|image_pad|>'" in lines[0]


@pytest.mark.parametrize(
    "word", ["data/trian.jsonl", "nowhere/at.parquet", "./x/y", "~/data", "here/mix", "/no/such"]
)
def test_a_path_that_is_not_there_is_no_hub_dataset(word, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=r"no such file"):
        load_samples(word)


# Which rows.
SOURCES = ("gqa", "ocr", "chart", "text")


@pytest.fixture(scope="module")
def sorted_mix(tmp_path_factory):
    """A mix in the order of its sources, 100 rows of each."""
    rows = [{**llava(f"{s} {i}"), "id": f"{s}-{i}"} for s in SOURCES for i in range(100)]
    return write(rows, tmp_path_factory.mktemp("mix"), "data.json")


def divided(data, test=16, samples=32, seed=0):
    config = {"data": str(data), "samples": samples, "seed": seed, "test_samples": test}
    return read_split(Recipe(model=str(folders.folder("text")), ratio=0.3, **config))


def ids(samples):
    return {sample.id for sample in samples}


@pytest.mark.parametrize("seed", [0, 1])
def test_sorted_data_calibrates_validates_and_tests_on_all_sources(seed, sorted_mix):
    found = divided(sorted_mix, samples=128, test=32, seed=seed)
    for part, least in ((found.calibration, 16), (found.test, 3), (found.calibration[3::4], 3)):
        counts = [sum(s.id.startswith(source) for s in part) for source in SOURCES]
        assert min(counts) >= least, counts


def test_runs_share_their_test_samples(sorted_mix):
    first, more = divided(sorted_mix), divided(sorted_mix, samples=80)
    other = divided(sorted_mix, seed=5)
    assert ids(more.test) == ids(other.test) == ids(first.test)
    assert ids(divided(sorted_mix, test=8).test) < ids(first.test)
    assert ids(first.calibration) < ids(more.calibration)
    assert ids(first.calibration) != ids(other.calibration)
    turned = write(json.loads(sorted_mix.read_text())[::-1], sorted_mix.parent, "turned.json")
    assert ids(divided(turned).calibration) == ids(first.calibration)
