"""NaN and infinity stop everything that reads a model, with the place in one line."""

import math
from dataclasses import replace

import pytest

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.core.options import Workload
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.ask import answer, evaluate
from slimvlm.evaluation.bench import bench
from slimvlm.evaluation.metrics import METRICS
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models.load import anatomy, load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import prune_checkpoint
from slimvlm.training.recover import History
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tiers import tiered
from tests.trust.spoiled import edit_weights

QUESTION = Question("q1", "Which colour?", ("red",), choices=("red", "blue"))
SHORT = Workload(prompt_tokens=8, new_tokens=4, batch_sizes=(1,), repeats=1)
NORM = "model.layers.1.input_layernorm.weight"


def spoilt(out, name, value):
    """A text model with one wrong weight."""
    folder = folders.copied("text", out)
    edit_weights(folder, lambda weights: weights[name].flatten()[0].fill_(value))
    return folder


def task(**how):
    return Task(
        name="own", **{"metric": "exact_match", "chance": 0, **how}, load=lambda _: [QUESTION]
    )


USES = {
    "chat": lambda model, words, _: answer(model, words, [QUESTION], 4),
    "evaluate": lambda model, words, _: evaluate(model, words, [task()]),
    "likelihood": lambda model, words, _: evaluate(model, words, [task(by_likelihood=True)]),
    "perplexity": lambda model, words, _: evaluate(model, words, [task(metric="perplexity")]),
    "bench": lambda model, _, __: bench(model, workload=SHORT),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_no_number_is_refused(use, value, tmp_path):
    model, words = load(spoilt(tmp_path / "model", NORM, value))
    with pytest.raises(NumericalError, match="NaN or infinity in") as caught:
        USES[use](model, words, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, "auto"), (math.inf, "auto"), (1e6, "float16")]
)
def test_low_memory_writes_no_weight_that_is_no_number(value, dtype, tmp_path):
    folder = spoilt(tmp_path / "model", "model.embed_tokens.weight", value)
    plan = Plan.everything(anatomy(folder))
    with pytest.raises(NumericalError, match=r"NaN or infinity in weight 'model\.embed_tokens"):
        prune_checkpoint(folder, plan, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["score", "scores", "blind_scores", "details"])
def test_a_score_that_is_no_number_is_no_score(field, tmp_path):
    good = TaskResult(
        "exact_match", 100.0, 0.0, True, ("q",), ("r",), (1.0,), {"f1": 1.0}, 0.0, (0.5,)
    )
    bad = {"score": math.nan, "details": {"f1": math.inf}}.get(field, (math.nan,))
    with pytest.raises(NumericalError, match="NaN or infinity in a score"):
        replace(good, **{field: bad})
    path = tmp_path / "result.json"
    Result("m", 1, 1, {"own": good}, prefill_ms=1.0, decode_ms=1.0).save(path)
    assert Result.load(path).tasks["own"] == good
    path.write_text(path.read_text().replace("0.5", "NaN").replace("100.0", "Infinity"))
    with pytest.raises(ConfigError, match=r"result '.*result\.json'.*NaN or infinity"):
        Result.load(path)


def test_a_metric_that_gives_no_number_stops(monkeypatch):
    monkeypatch.setitem(METRICS, "exact_match", lambda *_: math.nan)
    model, words = load(folders.folder("text"))
    with pytest.raises(NumericalError, match="exact_match"):
        evaluate(model, words, [task()])


@pytest.mark.parametrize(
    ("low_memory", "value"),
    tiered([(False, 0.0), (True, 1e38), (True, 0.0), (False, 1e38)], lambda *case: case[1] == 0),
)
def test_weights_that_say_nothing_end_in_one_line(low_memory, value, tmp_path):
    model = folders.copied("text", tmp_path / "m")
    same = lambda name: value and "embed" not in name  # noqa: E731
    edit_weights(model, lambda ws: [w.fill_(value) for name, w in ws.items() if not same(name)])
    data = folders.write_llava_data(tmp_path / "data", pictures=False)
    words = ("prune", model, "--ratio", "0.3", "--data", data, "--out", tmp_path / "o")
    told = refused(*words, "--samples", "8", *["--low-memory"] * low_memory)
    assert "its output is zero for all samples" in told
    assert not [path for path in tmp_path.iterdir() if path.name not in ("m", "data")]


def test_a_tied_head_that_differs_is_named(tmp_path):
    model = folders.copied("text", tmp_path / "m")
    folders.edit_json(model / "config.json", lambda values: values.update(tie_word_embeddings=True))
    edit_weights(model, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ConfigError, match="two different matrices"):
        load(model)


@pytest.mark.parametrize(
    "row", ["{}", '{"loss": 1}', '{"step": 1, "loss": NaN}', '{"step": 1e308}']
)
def test_a_history_without_steps_is_named(row, tmp_path):
    values = '"num_samples": 1, "sample_ids": ["a"], "trained_params": 1'
    (tmp_path / "history.json").write_text(f'{{"steps": [{row}], {values}}}')
    with pytest.raises(ConfigError, match="steps must be rows of finite numbers"):
        History.load(tmp_path / "history.json")
