"""lmms-eval's own runner and our evaluator give the same replies and scores on the same data."""

from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import ImageFile

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Questions
from slimvlm.data.samples import Question
from slimvlm.evaluation import lmms
from slimvlm.evaluation.ask import answer, evaluate
from slimvlm.evaluation.lmms import (
    LMMS_TASKS,
    check_names,
    evaluate_all,
    evaluate_with_lmms,
    split_names,
)
from slimvlm.evaluation.metrics import MME_FULL_SCORES
from slimvlm.evaluation.tasks import read_task
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.tables import tables
from tests.tiny_folder import SEEING, picture

TABLES = tables(__file__)

lmms_eval = pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # not ours
SHIPPED = Path(lmms_eval.__file__).parent / "tasks"
COUNT = 6


def prompt(index):
    return "Which colour " + "of these " * (index * 5 % 4) + f"is part {index}?"


def write_parquet(path, rows, image="image"):
    table = datasets.Dataset.from_list(list(rows))
    if image in table.column_names:
        table = table.cast_column(image, datasets.Image())
    table.to_parquet(path)


def write_task(folder, name, **fields):
    """A task file for lmms-eval on data.parquet."""
    common = {
        **{"task": name, "dataset_path": "parquet", "test_split": "test"},
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.parquet")}},
        "doc_to_text": "{{question}}\nAnswer with one word.",
        **{"doc_to_visual": "image", "doc_to_target": "answer"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | fields))


@pytest.fixture(scope="module")
def loaded():
    return load(str(folders.folder("llava")), "float32")


@pytest.fixture(scope="module")
def place(loaded, tmp_path_factory):
    """A folder with a task; every other answer is the model's own, so that some are right."""
    folder = tmp_path_factory.mktemp("lmms")
    rows = []
    for i in range(COUNT):
        text = prompt(i) + "\nAnswer with one word."
        question = Question(str(i), text, (), (picture(i),))
        right = answer(*loaded, [question], 6)[0][0] if i % 2 else "nothing"
        rows.append({"question": prompt(i), "answer": right, "image": picture(i)})
    write_parquet(folder / "data.parquet", rows)
    mean = {"aggregation": "mean", "higher_is_better": True}
    how = {"generation_kwargs": {"max_new_tokens": 6, "temperature": 0, "until": []}}
    how["metric_list"] = [{"metric": "exact_match", "ignore_case": True, **mean}]
    write_task(folder, "colours", output_type="generate_until", **how)
    return folder


def ours(place, **fields):
    """The same parquet file as a task of ours."""
    path = place / "ours.yml"
    common = {
        **{"name": "ours", "data": "data.parquet", "answer": "answer", "max_new_tokens": 6},
        "prompt": "{question}\nAnswer with one word.",
    }
    path.write_text(yaml.safe_dump(common | fields))
    return read_task(path)


def same(theirs, own):
    assert theirs.ids == own.ids
    assert theirs.replies == own.replies
    assert theirs.scores == own.scores
    assert theirs.offered == own.offered
    assert theirs.score == pytest.approx(own.score, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "limit", "batch_size"),
    [("llava", None, 1), ("llava", None, 4)]
    + [(kind, 4, 2) for kind in sorted({*SEEING} - {"llava"})],
)
def test_both_sources_agree(kind, limit, batch_size, loaded, place):
    model = loaded if kind == "llava" else load(str(folders.folder(kind)), "float32")
    theirs = evaluate_with_lmms(*model, ["colours"], limit, batch_size, place)["colours"]
    same(theirs, evaluate(*model, [ours(place)], limit, batch_size).tasks["ours"])
    if limit is None:
        assert 0 < theirs.score < 100
        assert len(set(theirs.replies)) > 1


def test_limit_and_repeatability_and_nothing_else_changes(loaded, place):
    whole, first, again = (
        evaluate_with_lmms(*loaded, ["colours"], limit, task_folder=place)["colours"]
        for limit in (None, 3, 3)
    )
    assert first == again
    assert first.ids == ("0", "1", "2") == whole.ids[:3]
    assert first.replies == whole.replies[:3]
    assert first.scores == whole.scores[:3]
    model, processor = loaded
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    random_state = torch.get_rng_state()
    model.train()
    evaluate_with_lmms(model, processor, ["colours"], 1, task_folder=place)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training
    model.eval()


# columns that the shipped scoring code reads, without the picture
SHIPPED_ROWS = TABLES["shipped_rows"]
IMAGE_COLUMNS = {"mmmu_val": "image_1", "mathvista_testmini_format": "decoded_image"}
# benchmark: replies (every question in order), scores of each question, score
CASES = TABLES["benchmarks"]


@pytest.fixture
def shipped(loaded, tmp_path, monkeypatch):
    """Run a benchmark that lmms-eval ships on data on disk; the model gives these replies."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(lmms, "batches_by_length", lambda p, *_: iter([list(range(len(p)))]))

    def run(name, replies, limit=None):
        task = next(row.task for key, row in LMMS_TASKS.items() if name in (key, row.task))
        column = IMAGE_COLUMNS.get(task, "image")
        given, found = SHIPPED_ROWS[task], []
        for i in range(max(len(v) for v in given.values() if isinstance(v, list))):
            row = {n: v.get("all", v) if isinstance(v, dict) else v for n, v in given.items()}
            row |= {n: v[i] for n, v in given.items() if isinstance(v, list)}
            found.append({**row, column: picture(i)})
        stored = tmp_path / f"{task}.parquet"
        write_parquet(stored, found, column)
        (file,) = SHIPPED.glob(f"*/{task}.yaml")
        written = yaml.load(file.read_text(), _Plain)
        assert written["task"] == task
        fields = {
            **{"include": str(file), "task": task, "process_docs": None},
            **{"dataset_path": "parquet", "dataset_name": None},
            "dataset_kwargs": {"data_files": {written["test_split"]: str(stored)}},
        }
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(fields))
        said = iter(replies)
        monkeypatch.setattr(
            lmms, "answer", lambda _m, _p, asked, _n: [(next(said), False) for _ in asked]
        )
        asked = Questions(tasks=name, limit=limit, task_folder=str(tmp_path))
        return evaluate_all(*loaded, asked, "tiny")

    return run


class _Plain(yaml.SafeLoader):
    """Reads task files without calling anything in them."""


_Plain.add_constructor("!function", lambda loader, node: str(node.value))


@pytest.mark.parametrize("name", CASES)
def test_benchmarks_score_as_shipped(name, shipped):
    if name == "mathvista":
        pytest.importorskip("Levenshtein")
    replies, scores, score = CASES[name]
    found = shipped(name, replies).tasks
    assert list(found) == [name]
    assert found[name].replies == tuple(replies)
    assert found[name].scores == pytest.approx(scores)
    assert found[name].score == pytest.approx(score)
    assert found[name].chance == LMMS_TASKS[name].chance
    assert found[name].details == ({"f1": pytest.approx(50)} if name == "pope" else {})


def test_mme_comes_in_halves_on_their_own_scales(shipped):
    replies = ["Yes", "No", "Yes", "Yes", "No", "No", "Yes", "No", "Yes", "no"]
    found = shipped("mme", replies).tasks
    assert set(found) == set(MME_FULL_SCORES)
    # existence: 3 of 4 right, 1 of 2 pairs; count: all; code: 3 of 4 right, 1 of 2 pairs
    assert found["mme_perception"].score == pytest.approx(75 + 50 + 200)
    assert found["mme_cognition"].score == pytest.approx(75 + 50)
    for half in found.values():
        assert 100 * sum(half.scores) / len(half.scores) == pytest.approx(half.score)
    assert found["mme_perception"].ids == ("0", "1", "2", "3", "8", "9")
    assert found["mme_cognition"].replies == tuple(replies[4:8])
    assert list(shipped("mme", ["Yes", "No"] * 2, limit=4).tasks) == ["mme_perception"]
    with pytest.raises(ConfigError, match="gave no mme_cognition_score"):
        shipped("mme_cognition", ["Yes", "No"] * 2, limit=4)


def test_missing_data_is_one_clear_line(loaded, tmp_path, monkeypatch):
    with lmms.contained():
        from lmms_eval.api.task import ConfigurableTask
        from tenacity import wait_none

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    write_task(tmp_path, "away", dataset_path="nobody/nothing", dataset_kwargs=None)
    with pytest.raises(ConfigError, match=r"'away'.*cannot be loaded.*nobody/nothing") as caught:
        evaluate_with_lmms(*loaded, ["away"], task_folder=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "limit", "folder", "message"), TABLES["refused"])
def test_requests_that_are_refused(name, limit, folder, message, place, monkeypatch):
    for variable in ("OPENAI_API_KEY", "API_TYPE"):
        monkeypatch.delenv(variable, raising=False)
    if name == "pope":
        monkeypatch.setattr(lmms, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=message):
        check_names([name], limit, place / folder)


def test_names_are_split():
    own, theirs = split_names("colour, mme,task.yaml,docvqa_val")
    assert own == "colour,task.yaml"
    assert theirs == ["mme", "docvqa_val"]
