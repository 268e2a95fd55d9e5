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
from slimvlm.core.options import PruneConfig
from slimvlm.runs import stages
from slimvlm.runs.request import Request
from tests import tiny_folder as folders

FORMATS = ("data.json", "data.jsonl", "data.parquet")
ASK, SAY, A, B = "Which colour?", "Red.", "a.png", "b.png"


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


SYSTEM, USER, ANSWER = told("system", "Be brief."), told("user", ASK), told("assistant", SAY)
PICTURED = told("user", None, ASK)
URL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
IMAGE, WORDS = {"type": "image"}, {"type": "text", "text": ASK}
SEEN, BOTH = [PICTURED, ANSWER], [told("user", None, None, ASK), ANSWER]
TEXT, BETWEEN, NULL = (
    [USER, ANSWER],
    told("user", "So ", None, "what?"),
    {"from": None, "value": None},
)
LATER = {"role": "user", "content": f"<image>\n{ASK}"}
USED = {  # row, turns, pictures
    "LLaVA": (llava(f"<image>\n{ASK}", image=A), SEEN, [A]),
    "LLaVA, text": (llava(image=None, model=""), TEXT, []),
    "several": (llava(f"<image>\n<image>\n{ASK}", image=[A, B]), BOTH, [A, B]),
    "in the middle": (llava("So <image>\nwhat?", image=B), [BETWEEN, ANSWER], [B]),
    "in a later turn": (
        chat(messages=[USER, ANSWER, LATER, ANSWER], images=A),
        [*TEXT, *SEEN],
        [A],
    ),
    "no placeholder": (llava(image=A), SEEN, [A]),
    "image beside empty images": (llava(image=A, images=[]), SEEN, [A]),
    "images beside null image": (chat(images=[B], image=None), SEEN, [B]),
    "system of the row": (chat(system="Be brief."), [SYSTEM, USER, ANSWER], []),
    "system of LLaMA-Factory": (llava(system="Be brief.", tools=""), [SYSTEM, USER, ANSWER], []),
    "TRL": (chat([IMAGE, WORDS], images=[A]), SEEN, [A]),
    "placeholder in a part": (chat([{**WORDS, "text": f"<image>{ASK}"}], images=[A]), SEEN, [A]),
    "Qwen-VL's part": (chat([{**IMAGE, "image": B}, WORDS]), SEEN, [B]),
    "both ways": (chat([IMAGE, {**IMAGE, "path": B}, WORDS], images=[A]), BOTH, [A, B]),
    "OpenAI": (chat([{"type": "image_url", "image_url": {"url": URL}}, WORDS]), SEEN, [None]),
    "OpenAI, weight 1": (chat(say={"weight": 1, "tool_calls": None}), TEXT, []),
    "ms-swift, loss": (chat(say={"loss": True}), TEXT, []),
    "null columns": (chat(system="", weight=None, videos=[]), TEXT, []),
    "null fields": (chat(messages=[{**NULL, **turn} for turn in chat()["messages"]]), TEXT, []),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("what", USED)
def test_a_field_is_used(what, name, home):
    row, turns, pictures = USED[what]
    if name == "data.parquet" and "[{'type'" in str(row):
        pytest.skip("a column of a table is of one type")
    (sample,) = load_samples(write(row, home, name), warn=lambda line: None)
    assert list(sample.messages) == turns
    assert [getattr(image, "name", None) for image in sample.images] == pictures


CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
REFUSED = {  # row, what the message names
    "video": (llava(f"<video>\n{ASK}", video="a.mp4"), "'video'"),
    "videos": (chat(videos=["a.mp4"]), "'videos'"),
    "audio": (chat(audios=["a.wav"]), "'audios'"),
    "tools": (chat(tools=CALL), "'tools'"),
    "calls beside content": (chat(say={"tool_calls": CALL}), "'tool_calls'"),
    "a call of before": (chat(say={"function_call": {"name": "f"}}), "'function_call'"),
    "refusal": (chat(say={"refusal": "I cannot."}), "'refusal'"),
    "thoughts": (chat(say={"reasoning_content": "Hm."}), "'reasoning_content'"),
    "weight 0 of a turn": (chat(say={"weight": 0}), "'weight'"),
    "weight 0 of a row": (chat(weight=0), "'weight'"),
    "loss off": (chat(say={"loss": False}), "'loss'"),
    "both kinds of turns": ({**llava(), **chat()}, "both messages and conversations"),
    "both kinds of pictures": (llava(image=A, images=[B]), "both images and image"),
    "two systems": (chat(system="No.", messages=[SYSTEM, ANSWER]), "system"),
    "both texts": (chat(say={"value": "Blue."}), "content and value"),
    "a tool's turn": (chat(messages=[USER, {"role": "tool", "content": "1"}, ANSWER]), "tool"),
    "a video part": (chat([{"type": "video", "video": "a.mp4"}, WORDS]), "'video'"),
    "an audio part": (chat([{"type": "input_audio", "input_audio": {}}, WORDS]), "'input_audio'"),
    "a text and its picture": (chat([{**WORDS, "image": A}]), "more than one"),
    "The Cauldron": ({"texts": [{"user": ASK, "assistant": SAY}]}, "no messages or conversations"),
    "a null picture": (chat([IMAGE, IMAGE, WORDS], images=[A, None]), "must be a path"),
    "MiniCPM's pictures": (llava(image={"<image_00>": A}), "must be a path"),
    "a picture on the web": (llava(image="https://a.b/c.png"), "not found"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_sample_holds_is_refused_by_name(what, home):
    row, named = REFUSED[what]
    with pytest.raises(DataError, match=r"--max-bad 0") as refusal:
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
    lines, how = [], {"processor": folders.processor("qwen2_5_vl"), "max_bad": 1}
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
    config = PruneConfig(ratio=0.3, data=str(data), samples=samples, seed=seed, general_text=0.0)
    request = Request(model=str(folders.folder("text")), prune=config, report_samples=test)
    return stages.read_split(request, lambda line: None)


def ids(samples):
    return {sample.id for sample in samples}


@pytest.mark.parametrize("seed", [0, 1])
def test_sorted_data_calibrates_validates_and_tests_on_all_sources(seed, sorted_mix):
    found = divided(sorted_mix, samples=128, test=32, seed=seed)
    for part, least in ((found.calibration, 16), (found.report, 3), (found.calibration[3::4], 3)):
        counts = [sum(s.id.startswith(source) for s in part) for source in SOURCES]
        assert min(counts) >= least, counts


def test_runs_share_their_test_samples(sorted_mix):
    first, more = divided(sorted_mix), divided(sorted_mix, samples=80)
    other = divided(sorted_mix, seed=5)
    assert ids(more.report) == ids(other.report) == ids(first.report)
    assert ids(divided(sorted_mix, test=8).report) < ids(first.report)
    assert ids(first.calibration) < ids(more.calibration)
    assert ids(first.calibration) != ids(other.calibration)
    turned = write(json.loads(sorted_mix.read_text())[::-1], sorted_mix.parent, "turned.json")
    assert ids(divided(turned).calibration) == ids(first.calibration)
