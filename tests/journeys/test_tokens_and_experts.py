"""Fewer tokens and experts from the verbs: prune, plan, compress, in memory and layer by layer."""

import json
import shutil
from dataclasses import replace
from unittest import mock

import jaxtyping
import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.cli import steps
from slimvlm.core.options import MemoryOptions, PlanConfig, PruneConfig
from slimvlm.models.load import anatomy
from slimvlm.runs import stages
from slimvlm.runs.advise import dry_run, dry_run_rows
from slimvlm.runs.recipe import TRIMMED, decide, read_split, resolve
from tests import tiny, tiny_folder, tiny_words
from tests.handmade import assert_untouched, snapshot
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")
FEW = 420
"""Tokens that stay, of 533."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(tiny_words.CORPUS))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        [
            {"role": "user", "content": f"How wide are {n} stones?"},
            {"role": "assistant", "content": f"They are {n * n} wide."},
        ]
        for n in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Data for the models with experts."""
    return str(tiny_folder.write_llava_data(tmp_path_factory.mktemp("data"), pictures=False))


def model():
    return str(tiny_words.folder("text"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Complete folders of text models: with many tokens, dense, and with experts of a type."""
    found = {"tokens": model(), "text": str(tiny_folder.folder("text"))}
    words = tiny_folder.processor("text")
    llama4 = tiny.CONFIGS["llama4"]().text_config
    for config in (tiny.CONFIGS["qwen3_moe"](), llama4):
        config.vocab_size = tiny_folder.VOCAB
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(config.model_type)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        words.save_pretrained(path)
        found[config.model_type] = str(path)
    return found


def pruned(model, out, heard=None, **options):
    memory = MemoryOptions(low_memory=options.pop("low_memory", False))
    say = (heard if heard is not None else []).append
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    with mock.patch.object(steps, "to_log", say):
        steps.prune(model, out, None, PruneConfig(**given), memory)
    return sv.Plan.load(out / "slimvlm_plan.json")


def test_tokens_alone_need_neither_a_ratio_nor_data(tmp_path, text):
    heard = []
    plan = pruned(model(), tmp_path / "out", heard, vocab_size=FEW, vocab_text=text)
    assert plan.tokens is not None
    assert len(plan.tokens) == FEW
    assert not plan.cuts_layers
    assert f"{FEW} of 533 tokens stay" in "\n".join(heard)
    smaller, words = sv.load(tmp_path / "out", device="cpu")
    assert smaller.config.vocab_size == len(words) == FEW


def test_experts_alone_need_neither_a_ratio_nor_data(models, tmp_path):
    plan = pruned(models["qwen3_moe"], tmp_path / "out", experts=0.25, samples=4)
    assert plan.criteria == {"expert": "reap"}
    assert [len(kept) for kept in plan.experts] == [3, 0, 3, 3]
    assert plan.neurons == sv.Plan.everything(plan.before).neurons
    smaller, _ = sv.load(tmp_path / "out", device="cpu")
    assert smaller.config.num_experts == 3
    assert anatomy(tmp_path / "out") == plan.after
    assert "3 of 4 experts" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("asked", "criteria"),
    tiered(map(tuple, TABLES["criteria"]), lambda asked, _: asked.get("axis") == "depth"),
)
def test_experts_and_their_neurons_have_criteria_of_their_own(
    models, tmp_path, seen, asked, criteria
):
    plan = pruned(models["qwen3_moe"], tmp_path / "out", data=seen, **asked)
    assert plan.criteria == criteria
    assert (plan.neurons != sv.Plan.everything(plan.before).neurons) == ("ratio" in asked)
    assert (len(plan.layers) < 4) == ("layer" in criteria)
    assert anatomy(tmp_path / "out") == plan.after


@pytest.mark.parametrize(
    ("name", "asked", "tolerance"),
    tiered(
        [
            ("tokens", {"vocab_size": FEW, "ratio": 0.4, "axis": "width"}, 1e-5),
            ("llama4_text", {"experts": 0.5, "axis": "depth"}, 0.0),
            ("qwen3_moe", {"experts": 0.5, "ratio": 0.4, "criterion": ("activation", "reap")}, 0.0),
        ],
        lambda name, *_: name == "qwen3_moe",
    ),
)
def test_layer_by_layer_the_same_is_written(
    models, tmp_path, data, seen, text, name, asked, tolerance
):
    options = {"data": seen, "samples": 8, "local_steps": 0, **asked}
    if name == "tokens":
        options |= {"data": data, "vocab_text": text}
    plan = pruned(models[name], tmp_path / "at once", **options)
    assert (plan.criteria.get("expert") == "reap") == ("experts" in asked)
    assert pruned(models[name], tmp_path / "by layer", low_memory=True, **options) == plan
    whole, pieces = (sv.load(tmp_path / n, device="cpu")[0] for n in ("at once", "by layer"))
    ours, theirs = whole.state_dict(), pieces.state_dict()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, atol=tolerance, rtol=10 * tolerance)
    for file in ("tokenizer.json", "generation_config.json") if name == "tokens" else ():
        one, other = ((tmp_path / n / file).read_text() for n in ("at once", "by layer"))
        assert one == other


@pytest.mark.parametrize(
    ("name", "asked"), tiered(map(tuple, TABLES["written"]), lambda name, _: name == "tokens")
)
def test_a_written_plan_has_them_and_is_applied(models, tmp_path, text, name, asked):
    if name == "tokens":
        asked = {**asked, "vocab_text": text}
    file, out = tmp_path / "plan.json", tmp_path / "out"
    made = steps.plan(models[name], file, PlanConfig(**asked))
    assert (made.tokens is not None) == (name == "tokens")
    assert made.criteria == ({} if name == "tokens" else {"expert": "reap"})
    assert name != "tokens" or not made.cuts_layers
    steps.prune(models[name], out, file)
    assert anatomy(out) == made.after


RECOVER = sv.RecoverConfig(
    **{"train": "lora", "loss": "sft+hidden+kl", "max_steps": 2},
    **{"batch_size": 2, "lora_rank": 2, "bf16": False},
)


@pytest.mark.slow
def test_a_run_trains_and_asks_with_fewer_tokens(tmp_path, data, text):
    shown = {"data": data, "samples": 8, "local_steps": 0, "test_samples": 3}
    asked = {"ratio": 0.35, "axis": "width", "vocab_size": FEW, "vocab_text": text}
    config = sv.CompressConfig(recover=RECOVER, **shown, **asked)
    heard = []
    sv.compress(model(), config, tmp_path / "run", say=heard.append)
    assert f"{FEW} of 533 tokens stay" in "".join(heard)
    smaller, words = sv.load(tmp_path / "run", device="cpu")
    assert smaller.config.vocab_size == len(words) == FEW
    recovered = json.loads((tmp_path / "run" / "results" / "data-recovered.json").read_text())
    assert recovered["baseline"] == "original"
    assert f"{FEW} of" in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.slow
def test_a_run_trains_with_fewer_experts(models, tmp_path, seen):
    shown = {"data": seen, "samples": 6, "local_steps": 0, "test_samples": 0}
    config = sv.CompressConfig(experts=0.25, recover=RECOVER, **shown)
    sv.compress(models["qwen3_moe"], config, tmp_path / "run", say=[].append)
    assert anatomy(tmp_path / "run").expert_counts == [3]
    assert "3 of 4 experts" in (tmp_path / "run" / "summary.md").read_text()


def opened(data, where="", **options):
    """A recipe whose axis is open, with what is said, and the tokens of its further trials."""
    heard = []
    alone = {"samples": 16, "general_text": 0.0, "recover": None, "test_samples": 0}
    asked = {"ratio": 0.4, "axis": "auto", "local_steps": 0, **alone, **options}
    recipe, _, _ = resolve(
        where or model(), sv.CompressConfig(data=data, **asked), None, heard.append
    )
    fewer = [trial.tokens for trial in recipe.trials if trial.is_trimmed]
    return recipe, heard, fewer[0] if fewer else None


@pytest.mark.slow
def test_where_the_axis_is_open_fewer_tokens_are_tried_on_the_same_answers(data):
    request, heard, fewer = opened(data)
    assert request.tokens is None
    assert f"{len(fewer)} of 533 tokens stay" in heard[-1]
    rare = tiny_folder.turn("assistant", "It jumps over the lazy dog.")
    loaded, processor = stages.load_original(request, "cpu")
    before = snapshot(loaded)
    samples = list(read_split(request).calibration)
    samples[3::4] = [replace(s, messages=(s.messages[0], rare)) for s in samples[3::4]]
    calibration = stages.Calibration(processor, samples, request.hold_out)
    scores = list(stages.calibrate(request, loaded, calibration).values())
    losses = stages.try_axes(request, loaded, calibration, scores)
    assert_untouched(loaded, before)
    *_, last = losses
    best = last.removesuffix(TRIMMED)
    assert best != last
    student, _ = stages.load_original(request, "cpu")
    held_out = {"held_out": calibration.held_out, "tokens": fewer}
    walked = sv.walk_(student, calibration.fitted, 0.4, best, scores=scores, **held_out)
    sv.trim_tokenizer_(processor, walked.plan)
    judges = samples[3::4]
    said = sv.evaluate_data(student, processor, judges).samples
    whole, words = stages.load_original(request, "cpu")
    read = [sample.tokens for sample in sv.evaluate_data(whole, words, judges).samples]
    assert sum(s.tokens for s in said) > sum(read)  # some answers are in shorter pieces now
    means = [s.loss * s.tokens / count for s, count in zip(said, read, strict=True)]
    assert losses[last] == pytest.approx(sum(means) / len(means), rel=1e-4)


@pytest.mark.parametrize("lost", tiered([0.5, 2.0], lambda lost: lost < 1))
def test_a_run_takes_fewer_tokens_where_answers_lose_less_by_it(tmp_path, data, lost, monkeypatch):
    tried = {"depth": 1.5, "width": 1.0, "width" + TRIMMED: lost}
    monkeypatch.setattr(stages, "try_axes", lambda *_, **__: tried)
    asked = {"ratio": 0.4, "axis": "auto", "samples": 16, "local_steps": 0, "test_samples": 3}
    sv.compress(model(), sv.CompressConfig(data=data, **asked), tmp_path / "run", say=[].append)
    plan = sv.Plan.load(tmp_path / "run" / "plan.json")
    assert (plan.axis, plan.tokens is not None) == ("width", lost < 1)
    assert plan.ratio == pytest.approx(0.4, abs=0.02)
    assert anatomy(tmp_path / "run") == plan.after


def test_a_dry_run_says_how_many_tokens_go(data):
    asked = {"ratio": 0.4, "axis": "auto", "samples": 16, "test_samples": 0, "general_text": 0.0}
    asked["recover"] = None
    found = dry_run(model(), sv.CompressConfig(data=data, **asked), [].append)
    assert found.fewer_tokens == len(opened(data)[2])
    told = dict(row for row in dry_run_rows(found) if row[0])["axes"]
    assert f"again after trimming to {found.fewer_tokens:,} tokens" in told
    all_stay = sv.CompressConfig(data=data, vocab_size="all", **asked)
    assert dry_run(model(), all_stay, [].append).fewer_tokens == 0
    shape = anatomy(model())
    gone = shape.vocab_size - len(opened(data, ratio=0.05)[2])
    assert 0 <= gone * shape.token_params - 0.05 * shape.backbone_params < shape.token_params


def test_all_tokens_stay_where_that_is_asked_or_nothing_else_is_possible(data, tmp_path):
    for asked in ({"vocab_size": "all"}, {"axis": "width"}):
        assert opened(data, **asked)[1:] == ([], None)
    place = tmp_path / "model"
    shutil.copytree(model(), place)
    words = json.loads((place / "tokenizer.json").read_text())
    words["model"]["dropout"] = 0.1
    (place / "tokenizer.json").write_text(json.dumps(words))
    _, heard, fewer = opened(data, str(place))
    assert fewer is None
    assert "the vocabulary stays whole: tokens: " in heard[-1]


def test_experts_alone_need_no_axis_and_no_walk_chooses_their_neurons(models, tmp_path, seen):
    for axis in (None, "chart", "auto"):
        asked = PruneConfig(experts=0.25, data="data.json", axis=axis)
        found = decide("model", asked)
        assert (found.axis, found.ratio, found.criterion) == ("width", 0.0, ("reap",))
    asked = {"ratio": 0.3, "axis": "width", "criterion": ("obs",), "data": "no file"}
    with pytest.raises(sv.SlimError, match="has experts, whose neurons no walk chooses"):
        pruned(models["qwen3_moe"], tmp_path / "out", **asked)
    shape = anatomy(models["qwen3_moe"])
    found = decide("model", PruneConfig(ratio=0.3, axis="auto", data=seen), shape)
    assert [trial.axis for trial in found.trials] == ["both"]


def test_heads_that_guess_further_tokens_are_counted_out(tmp_path, monkeypatch):
    model = tiny.build("qwen3_5_text")
    model.config.mtp_num_hidden_layers = 1
    model.save_pretrained(tmp_path / "model")
    heard = []
    config = PruneConfig(ratio=0.2, axis="depth", criterion=("spacing",))
    monkeypatch.setattr(steps, "to_log", heard.append)
    steps.prune(str(tmp_path / "model"), tmp_path / "out", None, config)
    assert any("mtp_num_hidden_layers becomes 0" in line for line in heard)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mtp_num_hidden_layers"] == 0
    assert "`mtp_num_hidden_layers` is 0" in (tmp_path / "out" / "README.md").read_text()
    assert model.config.mtp_num_hidden_layers == 1
    heard.clear()
    steps.prune(str(tmp_path / "out"), tmp_path / "again", None, config)
    assert not any("mtp" in line for line in heard)


@pytest.mark.parametrize(("name", "options", "message"), TABLES["refused"])
def test_what_cannot_be_is_said_before_weights_are_read(
    models, tmp_path, name, options, message, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(sv.SlimError, match=message):
        pruned(models[name], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
