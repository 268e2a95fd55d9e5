"""Training after pruning: only what may change changes, and a stop costs little."""

import copy
import itertools
import re
from dataclasses import replace
from functools import cache

import jaxtyping
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerState

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.core.options import RecoverConfig
from slimvlm.data import chat
from slimvlm.data.read import subset
from slimvlm.data.vocabulary import choose_tokens
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import hold_in_
from slimvlm.models.load import load
from slimvlm.models.parts import Parts
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.runs.cost import optimizer_steps
from slimvlm.scoring.score_model import score
from slimvlm.training import recover as recovery
from slimvlm.training import trainer
from slimvlm.training.recover import recover
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import Stopped, assert_equal, logits, plan_by_hand, stops
from tests.tables import tables
from tests.tiers import tiered
from tests.tiny_folder import KINDS, SEEING, short_samples
from tests.tolerances import AFTER_ADAM, FORWARD, LOSS, assert_close

TABLES = tables(__file__)

TRAINED = {
    "projector": r"multi_modal_projector\.",
    "lora": r"multi_modal_projector\.|language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj\.",
    "full": r"multi_modal_projector\.|language_model\.|lm_head\.",
}
lora_by_default = tiered(TRAINED, lambda train: train == "lora")
kinds = tiered(KINDS, lambda kind: kind == "llava")
SAMPLES = short_samples(8)
NO_DROPOUT = {"lora_dropout": 0.0}
STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def config(**changes):
    """Short, exact and without surprises."""
    values = {
        **{"train": "lora", "loss": "sft+hidden", "max_steps": 3, "batch_size": 2},
        **{"learning_rate": 5e-3, "lora_rank": 4, "bf16": False, **changes},
        "trainer": {"logging_steps": 1, "save_steps": 2, **changes.get("trainer", {})},
        "lora": {"lora_alpha": 8, **changes.get("lora", {})},
    }
    return RecoverConfig(**values)


def models(kind="llava"):
    """A student of which one layer and some units are gone, its teacher, their processor."""
    teacher, processor = load(folders.folder(kind))
    student = copy.deepcopy(teacher)
    groups = None if kind == "qwen2_5_vl" else [0, 2]
    plan = plan_by_hand(read_anatomy(student), [0, 1, 3], groups, range(64))
    prune_(student, plan)
    return student, teacher, processor


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    now = model.state_dict()
    assert list(now) == list(before)
    return {name for name in now if not torch.equal(now[name], before[name])}


def trained(**changes):
    """Weights after a run from the usual start."""
    student, teacher, processor = models()
    work = changes.pop("work", None)
    recover(student, teacher, SAMPLES, config(**changes), processor, work)
    return weights(student)


@pytest.mark.parametrize("train", lora_by_default)
def test_exactly_what_learns_changes_and_nothing_where_there_is_nothing_to_learn(train):
    student, teacher, processor = models()
    before, teacher_before = weights(student), weights(teacher)
    type_before = type(student)
    history = recover(student, teacher, SAMPLES, config(train=train), processor)
    expected = {name for name in before if re.search(TRAINED[train], name)}
    assert changed(student, before) == expected
    assert changed(teacher, teacher_before) == set()
    assert type(student) is type_before
    assert not student.training
    if train != "lora":
        assert history.trained_params == sum(before[name].numel() for name in expected)
    teacher, processor = load(folders.folder("llava"))
    student = copy.deepcopy(teacher)
    before = weights(student)
    history = recover(student, teacher, SAMPLES, config(train=train, loss="hidden"), processor)
    assert [row["loss_hidden"] for row in history.steps] == [0.0] * 3
    assert changed(student, before) == set()


def test_lora_takes_what_peft_takes_and_an_adapter_holds_modules_alone():
    student, _, processor = models()
    before = weights(student)
    where = r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    recover(student, None, SAMPLES, config(loss="sft", lora={"target_modules": where}), processor)
    learnt = r"multi_modal_projector\.|language_model\.layers\.\d+\.self_attn\.[qv]_proj\."
    assert changed(student, before) == {name for name in before if re.search(learnt, name)}
    student, _, processor = models()
    options = config(loss="sft", lora={"target_modules": "dense"})
    with pytest.raises(ConfigError, match=r"lora .*'dense'.*not found"):
        recover(student, None, SAMPLES, options, processor)
    options = config(loss="sft", keep_adapter=True)
    with pytest.raises(ConfigError, match=r"hold the parameter 'model\.image_newline'"):
        recover(tiny.build("llava_next"), None, SAMPLES, options, processor)


def test_lora_leaves_nothing_behind(monkeypatch):
    student, teacher, processor = models()
    batch = chat.encode_samples(processor, SAMPLES[:2])
    seen = []
    honest = trainer.merge

    def listening(adapted, *others):
        adapted.eval()
        seen.append(logits(adapted, batch))
        return honest(adapted, *others)

    monkeypatch.setattr(recovery, "merge", listening)
    before = logits(student, batch)
    recover(student, teacher, SAMPLES, config(), processor)
    after = logits(student, batch)
    assert_close(after, seen[0], FORWARD)
    assert float((after - before).abs().max()) > 1e-2
    names = [name for name, _ in student.named_modules()]
    assert not [name for name in names if re.search("lora|base_layer|adapter", name)]
    assert not hasattr(student, "peft_config")
    assert "forward" not in vars(student)


@pytest.mark.parametrize("kind", kinds)
def test_every_kind_learns_and_no_option_of_the_model_changes(kind):
    """The Trainer switches the cache off; a checkpoint that says so would answer slowly."""
    student, teacher, processor = models(kind)
    samples, before = short_samples(4, sees=kind in SEEING), student.config.to_dict()
    options = config(loss="sft+hidden+kl+rkl", max_steps=12, batch_size=4, learning_rate=2e-2)
    history = recover(student, teacher, samples, options, processor)
    assert [row["step"] for row in history.steps] == list(range(1, 13))
    for name in ("sft", "hidden", "kl", "rkl"):
        assert history.steps[-1][f"loss_{name}"] < history.steps[0][f"loss_{name}"], name
    assert student.config.to_dict() == before


@pytest.mark.parametrize(
    ("kind", "bf16"),
    tiered(
        itertools.product(SEEING, (False, True)),
        lambda kind, bf16: (kind, bf16) in (("llava", False), ("qwen2_5_vl", True)),
    ),
)
def test_batches_without_pictures_teach_the_projector_nothing(kind, bf16):
    blind = [replace(sample, id=f"blind {sample.id}") for sample in short_samples(3, sees=False)]
    options = {"train": "projector", "loss": "sft", "batch_size": 1, "bf16": bf16}
    student, _, processor = models(kind)
    before = weights(student)
    recover(student, None, blind, config(**options), processor)
    assert changed(student, before) == set()
    history = recover(
        student, None, blind + short_samples(1), config(**options | {"max_steps": 4}), processor
    )
    assert changed(student, before)
    assert len(history.steps) == 4
    assert not student.get_input_embeddings()._forward_hooks


def hidden_and_logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs, use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0]


def reference_losses(student, teacher, processor, samples, compared):
    """Every loss from its definition, one sample after the other, so without any padding."""
    sums = {name: [] for name in ("sft", "hidden", "kl", "rkl")}
    for sample in samples:
        inputs = chat.encode_samples(processor, [sample])
        labels = inputs.pop("labels")[0]
        hidden, own = hidden_and_logits(student, inputs)
        target, theirs = hidden_and_logits(teacher, inputs)
        answers = [i for i in range(len(labels)) if labels[i] != -100]
        sums["sft"] += [F.cross_entropy(own[i - 1], labels[i]) for i in answers]
        ids = inputs["input_ids"][0]
        positions = {"answer": [i - 1 for i in answers], "all": list(range(len(ids)))}[compared]
        for i in positions:
            sums["hidden"].append((hidden[i] - target[i]).square().mean())
            p, q = (F.softmax(x[i] / 2.0, -1) for x in (theirs, own))
            sums["kl"].append(4 * (p * (p / q).log()).sum())
            sums["rkl"].append(4 * (q * (q / p).log()).sum())
    return {name: float(torch.stack(values).mean()) for name, values in sums.items()}


@pytest.mark.parametrize(
    ("names", "positions"),
    [(("sft", "hidden", "kl", "rkl"), "answer"), (("hidden", "kl", "rkl"), "all")],
)
def test_losses_are_their_definitions_and_padding_counts_nowhere(names, positions):
    """Answers that are learnt are compared, too; a teacher alone is followed everywhere."""
    student, teacher, processor = models()
    samples = SAMPLES[:3]
    lengths = chat.encode_samples(processor, samples)["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    expected = reference_losses(student, teacher, processor, samples, positions)
    options = config(loss="+".join(names), max_steps=1, batch_size=3)
    history = recover(student, teacher, samples, options, processor)
    for name in names:
        found = torch.tensor(history.steps[0][f"loss_{name}"])
        assert_close(found, torch.tensor(expected[name]), LOSS)
    mean = sum(expected[name] for name in names) / len(names)
    assert history.steps[0]["loss"] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("steps", tiered([1, 3, 4, 5], lambda steps: steps == 3))
def test_every_step_is_in_the_log_and_weights_of_losses_count(steps):
    student, teacher, processor = models()
    options = config(loss="0.9*sft+0.1*hidden", max_steps=steps, trainer={"logging_steps": 2})
    history = recover(student, teacher, SAMPLES, options, processor)
    logged = [row["step"] for row in history.steps]
    assert logged == sorted({*range(2, steps + 1, 2), steps})
    for row in history.steps:
        expected = 0.9 * row["loss_sft"] + 0.1 * row["loss_hidden"]
        assert row["loss"] == pytest.approx(expected, abs=1e-3)


def test_gradient_checkpointing_changes_memory_alone():
    plain, thrifty = trained(lora=NO_DROPOUT), trained(lora=NO_DROPOUT, gradient_checkpointing=True)
    for name, value in plain.items():
        assert_close(thrifty[name], value, FORWARD)


def test_the_seed_decides_everything():
    torch.manual_seed(1)
    first = trained(fraction=0.5)
    torch.manual_seed(2)
    assert_equal(trained(fraction=0.5), first)
    other = trained(fraction=0.5, seed=1)
    assert any(not torch.equal(other[name], first[name]) for name in first)


def test_without_a_work_folder_nothing_is_written_and_the_history_names_the_samples(
    tmp_path, monkeypatch
):
    """The processor is the one in the model's folder."""
    monkeypatch.chdir(tmp_path)
    student, _, _ = models()
    history = recover(student, None, SAMPLES, config(loss="sft", fraction=0.5, seed=3))
    expected = tuple(sample.id for sample in subset(SAMPLES, 0.5, 3))
    assert history.sample_ids == expected
    assert history.num_samples == len(expected) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trimmed", [False, True])
def test_defaults_train_a_pruned_model_with_the_processor_it_was_read_with(trimmed):
    (student, processor), samples = load(folders.folder("text")), short_samples(4, sees=False)
    teacher = copy.deepcopy(student)
    tokens = choose_tokens(processor, samples) if trimmed else None
    plan = make_plan(read_anatomy(student), score(student, (), "random"), 0.4, tokens=tokens)
    prune_(student, plan)
    if trimmed:
        with pytest.raises(ConfigError, match=r"pass processor= or plan=.*tokens"):
            recover(student, teacher, samples)
    history = recover(student, teacher, samples, plan=plan)
    assert history.num_samples == 4
    assert history.teacher.startswith("the teacher shares")


# Refusals.
@pytest.mark.parametrize(("kind", "asked", "told"), TABLES["refused"])
def test_what_is_not_possible_is_refused_and_changes_nothing(kind, asked, told):
    student, _, processor = models(kind)
    before = weights(student)
    with pytest.raises(ConfigError, match=re.escape(told)):
        recover(student, None, SAMPLES, config(**asked), processor)
    assert changed(student, before) == set()


@pytest.mark.parametrize(
    ("dataset", "place", "told"),
    [
        ("demo", "", "dataset: must hold samples"),
        ([], "", "dataset: must hold samples"),
        (SAMPLES, "", "pass processor= or plan=: '' has none"),
        (SAMPLES, "/nowhere", "pass processor= or plan=: model '/nowhere'"),
    ],
)
def test_data_of_another_kind_and_a_model_from_nowhere_are_refused(
    dataset, place, told, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    student, teacher, _ = models()
    student.config._name_or_path = place
    with pytest.raises(ConfigError, match=re.escape(told)) as failure:
        recover(student, teacher, dataset)
    assert "\n" not in str(failure.value)


def test_a_teacher_of_another_width_is_refused():
    """Hidden states of different sizes cannot be compared; the message must say so."""
    student, teacher, processor = models()
    narrow = copy.deepcopy(teacher.config)
    narrow.text_config.hidden_size, narrow.text_config.head_dim = 32, 4
    other = type(teacher)(narrow)
    with pytest.raises(ConfigError, match="teacher"):
        recover(student, other, SAMPLES, config(loss="hidden"), processor)
    history = recover(student, other, SAMPLES, config(loss="sft+kl", max_steps=1), processor)
    assert history.num_samples == config().batch_size < len(history.sample_ids)
    assert history.teacher == "separate"  # what it says can be compared


@pytest.mark.parametrize("whose", ["the head", "", " of the teacher"])
def test_nan_is_traced_to_its_step_its_samples_and_its_layer(whose):
    student, teacher, processor = models()
    spoilt = student.lm_head
    if whose != "the head":
        spoilt = Parts(teacher if whose else student).layers[2]
    with torch.no_grad():
        next(spoilt.parameters())[0, 0] = float("nan")
    loss, place = "hidden", rf"from layer 2{whose} on"
    if whose == "the head":
        loss, place = "sft", "step 1"
    often = {"logging_steps": 10}
    options = config(train="projector", loss=loss, batch_size=1, trainer=often)
    with pytest.raises(NumericalError, match=place) as raised:
        recover(student, teacher, SAMPLES[:1], options, processor)
    assert f"(samples {SAMPLES[0].id})" in str(raised.value)


# Going on after a stop.


def stop_at(monkeypatch, step):
    honest = recovery.DistillationTrainer.training_step

    def stops(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(recovery.DistillationTrainer, "training_step", stops)


LONG = {"max_steps": 7, "lora": {"lora_dropout": 0.1}}


@cache
def uninterrupted(train):
    """Weights after a run that nobody stopped. Tests must not change them."""
    return trained(train=train, **LONG)


@pytest.mark.parametrize("train", lora_by_default)
def test_a_stopped_run_goes_on_bit_for_bit(train, tmp_path, monkeypatch):
    """Eight samples in batches of two: the stop lies in the second epoch."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            trained(train=train, work=tmp_path, **LONG)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    torch.manual_seed(1234)  # another process
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # the first steps must not be done again
        resumed = trained(train=train, work=tmp_path, **LONG)
    assert_equal(resumed, uninterrupted(train))


@pytest.mark.slow
def test_a_stop_while_a_checkpoint_is_written_costs_no_more_than_it(tmp_path, monkeypatch):
    honest = TrainerState.save_to_json

    def stops(self, json_path):
        if "checkpoint-4" in str(json_path):
            raise Stopped
        honest(self, json_path)

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", stops)
        with pytest.raises(Stopped):
            trained(work=tmp_path, **LONG)
    assert_equal(trained(work=tmp_path, **LONG), uninterrupted("lora"))


# Comforts.
@pytest.mark.parametrize(
    "loss", tiered(["sft+hidden+kl", "hidden+kl"], lambda loss: loss == "sft+hidden+kl")
)
def test_accumulated_batches_are_one_large_batch(loss):
    """Means are over tokens, however unequally spread; the second step has one sample alone."""
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        student, teacher, processor = models()
        how = {"loss": loss, "lora": NO_DROPOUT, "max_steps": -1, "epochs": 1.0}
        options = config(batch_size=size, gradient_accumulation=accumulation, **how)
        history = recover(student, teacher, SAMPLES[:5], options, processor)
        found.append((weights(student), [row["loss_kl"] for row in history.steps]))
    (large, whole), (small, parts) = found
    assert len(whole) == 2
    assert parts == pytest.approx(whole, rel=1e-3)
    for name, value in large.items():
        assert_close(small[name], value, AFTER_ADAM)


@pytest.mark.parametrize(
    ("train", "bf16"),
    tiered(itertools.product(TRAINED, (False, True)), lambda *case: case == ("lora", True)),
)
def test_half_precision_learns_in_full_and_comes_back_as_it_was(train, bf16):
    student, teacher, processor = models()
    hold_in_(student, torch.bfloat16)
    hold_in_(teacher, torch.bfloat16)
    before, buffers = weights(student), [value.clone() for value in student.buffers()]
    teacher.train()
    original = weights(teacher)
    history = recover(student, teacher, SAMPLES, config(train=train, bf16=bf16), processor)
    assert {value.dtype for value in weights(student).values()} == {torch.bfloat16}
    assert_equal(weights(teacher), original)
    assert {teacher.training, *(each.requires_grad for each in teacher.parameters())} == {True}
    for value, was in zip(student.buffers(), buffers, strict=True):  # rotary frequencies
        assert value.dtype is was.dtype
        assert torch.equal(value, was)
    assert changed(student, before)
    assert all(row["loss"] == row["loss"] for row in history.steps)


def test_a_head_that_no_loss_reads_stays():
    """Else several processes would wait for its gradient."""
    student, teacher, processor = models()
    before = weights(student)
    recover(student, teacher, SAMPLES, config(train="full", loss="hidden"), processor)
    assert "lm_head.weight" not in changed(student, before)


def test_a_training_goes_on_only_from_its_own_start(tmp_path, monkeypatch):
    student, teacher, processor = models()
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            recover(student, teacher, SAMPLES, config(**LONG), processor, tmp_path)
    others = copy.deepcopy(SAMPLES)
    others[0].messages[-1]["content"][0]["text"] = "Something else."
    shifted = models()
    for model in shifted[:2]:
        for parameter in model.parameters():
            parameter.data.add_(1e-3)
    for what, *start in (
        ("conversations", models()[0], teacher, others),
        ("pictures", models()[0], teacher, [replace(s, images=SAMPLES[1].images) for s in SAMPLES]),
        ("model", shifted[0], teacher, SAMPLES),
        ("teacher", models()[0], shifted[1], SAMPLES),
    ):
        with pytest.raises(ConfigError, match=rf"belongs to a run with another {what}\."):
            recover(*start, config(**LONG), processor, tmp_path)
    for name, value in (("seed", 7), ("train", "projector"), ("learning_rate", 1e-3)):
        asked = config(**{**LONG, name: value})
        with pytest.raises(ConfigError, match=rf"a run with another config\.{name}\."):
            recover(models()[0], teacher, SAMPLES, asked, processor, tmp_path)


@pytest.mark.parametrize(
    "end", tiered([{"max_steps": 3}, {"max_steps": -1, "epochs": 1}], lambda end: "epochs" in end)
)
def test_a_finished_training_is_not_trained_further(end, tmp_path, monkeypatch):
    """Its output may still be missing: the disk was full, or an evaluation was stopped."""
    student, teacher, processor = models()
    options = config(trainer=STEADY, **end)
    first = recover(student, teacher, SAMPLES, options, processor, tmp_path)
    again, teacher, processor = models()
    monkeypatch.setattr(recovery.DistillationTrainer, "train", stops)
    assert recover(again, teacher, SAMPLES, options, processor, tmp_path) == first
    assert_equal(weights(again), weights(student))


# PEFT reads what transformers renamed
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", kinds)
def test_a_kept_adapter_on_the_pruned_model_is_the_merged_one(kind, tmp_path):
    peft = pytest.importorskip("peft")
    student, _, processor = models(kind)
    samples = short_samples(4, kind in SEEING)
    pruned = copy.deepcopy(student)
    options = config(loss="sft", keep_adapter=True)
    recover(student, None, samples, options, processor, tmp_path)
    adapted = peft.PeftModel.from_pretrained(pruned, tmp_path / recovery.ADAPTER_FOLDER).eval()
    batch = chat.encode_samples(processor, samples[:2])
    before = logits(models(kind)[0], batch)
    assert_close(logits(adapted, batch), logits(student, batch), FORWARD)
    assert float((logits(student, batch) - before).abs().max()) > 1e-2


def test_the_more_was_pruned_the_larger_are_the_steps(monkeypatch):
    """Of all weights, and the smaller in a wider model; LoRA's and a given rate are their own."""
    model, _ = load(folders.folder("llava"))
    whole = read_anatomy(model)
    mild, severe = (plan_by_hand(whole, layers, None, None) for layers in ([0, 1, 2], [0]))

    def rate(plan, **changes):
        found = recovery.peak_rate(config(learning_rate=None, **changes), model, plan)
        assert recovery.peak_rate(config(learning_rate=0.5, **changes), model, plan) == 0.5
        return found

    assert rate(mild, train="lora") == rate(severe, train="lora") == 2e-4
    assert rate(severe, train="full") == pytest.approx(3 * rate(mild, train="full"))
    assert rate(mild, train="full") == pytest.approx(4e-4 / 4)
    assert rate(None, train="full") == rate(mild, train="full")  # a quarter of the decoder
    fewer = replace(plan_by_hand(whole), tokens=tuple(range(whole.vocab_size - 8)))
    assert rate(fewer, train="full") == rate(None, train="full")  # the decoder stays whole
    narrow = rate(mild, train="full")
    monkeypatch.setattr(recovery, "read_anatomy", lambda _: replace(whole, hidden_size=4 * 576))
    assert rate(mild, train="full") == pytest.approx(narrow / 4)


@pytest.mark.parametrize(
    ("given", "passes"),
    tiered(
        [({}, 4), ({"epochs": 2}, 2), ({"loss": "sft+kl"}, 1), ({"train": "lora"}, 1)],
        lambda given, _: given.keys() <= {"loss"},
    ),
)
def test_few_samples_are_read_again_until_they_suffice(given, passes):
    """Where all weights follow the teacher alone; and the estimate knows."""
    teacher, processor = load(folders.folder("llava"))
    student, _ = load(folders.folder("llava"))
    plan = plan_by_hand(read_anatomy(student), [0, 1, 2], None, None)
    prune_(student, plan)
    options = {"train": "full", "loss": "kl", "epochs": None, "max_steps": -1, **given}
    asked = config(**options)
    history = recover(student, teacher, SAMPLES[:4], asked, processor, plan=plan)
    assert len(history.steps) == 2 * passes
    assert optimizer_steps(asked, 4, plan.decoder_ratio) == 2 * passes
    if not given:
        assert asked.epochs_over(100_000, 0.5) == 1
        passes_over = [asked.epochs_over(n, r) for n, r in ((1000, 0.5), (1000, 0.75), (500, 0.75))]
        assert passes_over == sorted({*passes_over})
        assert asked.epochs_over(1, 0.75) == asked.epochs_over(100, 0.75)
