"""Losses on samples of the user's own: against whole logits, in any batch and vocabulary."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slimvlm import evaluate_data
from slimvlm.core.errors import ConfigError, DataError, NumericalError, RegressionError
from slimvlm.core.progress import silent
from slimvlm.data.chat import encode_samples
from slimvlm.evaluation import on_data
from slimvlm.evaluation.gates import judge
from slimvlm.evaluation.on_data import DataResult, Predictions, predictions_of
from slimvlm.models.hidden import head_weights_of
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.handmade import changed_copy

TEXTS = ["It is red and blue.", "Which colour is the left part?", "one two three four five"]


@pytest.fixture(scope="module", params=["llava", "text"])
def pair(request):
    """A model, another one with other weights, and the processor of both."""
    model, processor = load(folders.folder(request.param))
    return model, changed_copy(model), processor


def samples_for(processor, count=7):
    return folders.short_samples(count, sees=hasattr(processor, "image_processor"))


def values_of(result):
    """The figures without their intervals."""
    return {name: each and each.value for name, each in vars(result.figures).items()}


@torch.no_grad()
def by_hand(model, other, processor, samples):
    """Loss of both models, share of same tokens and KL, from whole logits, sample by sample."""
    rows = []
    for sample in samples:
        inputs = encode_samples(processor, [sample])
        labels = inputs.pop("labels")[0, 1:]
        where = labels != -100
        ours, theirs = (m(**inputs).logits[0, :-1][where].double() for m in (model, other))
        p, q = theirs.softmax(-1), ours.softmax(-1)
        losses = [F.cross_entropy(x, labels[where], reduction="none") for x in (ours, theirs)]
        same = (ours.argmax(-1) == theirs.argmax(-1)).double()
        rows.append(torch.stack([*losses, same, (p * (p / q).log()).sum(-1)]))
    first, second, same, divergence = torch.cat(rows, dim=1).mean(1).tolist()
    return first, second, same, divergence


def test_figures_are_those_of_whole_logits_and_of_no_batch(pair):
    model, other, processor = pair
    samples = samples_for(processor)
    loss, theirs, same, divergence = by_hand(model, other, processor, samples)
    for batch_size in (1, 3, 8):
        found = evaluate_data(model, processor, samples, other, batch_size=batch_size)
        expected = [loss, math.exp(loss), loss - theirs, 100 * same, divergence]
        assert list(values_of(found).values()) == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert [each.id for each in found.samples] == [sample.id for sample in samples]


def test_intervals_are_around_the_figures_and_a_model_differs_in_nothing_from_itself(pair):
    model, other, processor = pair
    samples = samples_for(processor)
    found = evaluate_data(model, processor, samples, other)
    for estimate in vars(found.figures).values():
        assert estimate.low <= estimate.value <= estimate.high
    assert found.figures.loss.low < found.figures.loss.high
    again = evaluate_data(model, processor, samples, other)
    assert again.figures == found.figures
    alone = evaluate_data(model, processor, samples[:1]).figures
    assert (alone.loss.low, alone.loss.high) == (None, None)
    figures = evaluate_data(model, processor, samples, model).figures
    assert (figures.increase.value, figures.increase.low, figures.increase.high) == (0, 0, 0)
    assert figures.agreement.low < figures.agreement.value == figures.agreement.high == 100
    assert figures.divergence.value == 0


def test_a_result_and_predictions_survive_their_files(pair, tmp_path):
    model, other, processor = pair
    samples, head = samples_for(processor), head_weights_of(other)
    predictions_of(other, processor, samples, head=head, name="other").save(tmp_path / "kept")
    kept = Predictions.load(tmp_path / "kept")
    live, read = (
        evaluate_data(model, processor, samples, base, name="ours") for base in (other, kept)
    )
    assert read.baseline == "other"
    assert read.samples == live.samples
    live.save(tmp_path / "result.json")
    assert DataResult.load(tmp_path / "result.json") == live
    (tmp_path / "broken.json").write_text('{"model": "x", "samples": []}')
    with pytest.raises(ConfigError, match="broken"):
        DataResult.load(tmp_path / "broken.json")


def test_of_plain_text_every_token_counts_and_vocabularies_may_differ():
    model, tokenizer = load(folders.folder("text"))
    found = evaluate_data(model, tokenizer, TEXTS, batch_size=2)
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS]
    assert [each.tokens for each in found.samples] == counts
    with torch.no_grad():
        ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
    assert found.samples[0].loss == pytest.approx(float(loss), abs=1e-5)
    # one has another order and one more token, which no answer needs; one has no merges
    samples = folders.short_samples(6, sees=False)
    turned, theirs = folders.with_turned_vocabulary(model, tokenizer)
    found = evaluate_data(model, tokenizer, samples, turned, baseline_processor=theirs)
    assert values_of(found)["increase"] == pytest.approx(0, abs=1e-6)
    assert values_of(found)["agreement"] == 100
    assert any("vocabularies differ" in note for note in found.notes)
    coarse = folders.without_merges(tokenizer)
    found = evaluate_data(model, tokenizer, samples, model, baseline_processor=coarse)
    assert found.figures.agreement is None
    assert any("6 of 6 samples" in note for note in found.notes)
    # the same texts in more tokens: nats for each token of the baseline
    fine = evaluate_data(model, tokenizer, samples)
    found = evaluate_data(model, coarse, samples, model, baseline_processor=tokenizer)
    nats = [sum(each.loss * each.tokens for each in r.samples) for r in (found, fine)]
    assert found.tokens > fine.tokens
    assert found.figures.loss.value == pytest.approx(nats[0] / fine.tokens)
    assert found.figures.increase.value == pytest.approx((nats[0] - nats[1]) / fine.tokens)
    figures = {"baseline": fine, "model": found}
    for bound, error in (("1.001x", None), ("0.999x", RegressionError)):
        exact = f"loss <= {float(bound[:-1]) * nats[0] / nats[1]:.6f}x"
        with pytest.raises(error) if error else nullcontext():
            judge([exact], {}, figures, silent)
    with pytest.raises(ConfigError, match="0 of 6 samples have the baseline's tokens"):
        judge(["kl <= 1"], {}, figures, silent)


def test_requests_that_are_refused_and_nan(pair):
    model, other, processor = pair
    samples = samples_for(processor)
    few = predictions_of(other, processor, samples[:3])
    for error, match, given, options in (
        (DataError, "no sample", [], {}),
        (ConfigError, "batch_size 0", samples, {"batch_size": 0}),
        (ConfigError, "not both", [*samples, "text"], {}),
        (ConfigError, "3 samples", samples, {"baseline": few}),
    ):
        with pytest.raises(error, match=match):
            evaluate_data(model, processor, given, **options)
    spoilt = changed_copy(model)
    with torch.no_grad():
        next(iter(spoilt.parameters()))[:] = float("nan")
        spoilt.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        evaluate_data(spoilt, processor, samples_for(processor))
    with pytest.raises(NumericalError, match="NaN"):
        evaluate_data(other, processor, samples_for(processor), spoilt)


def test_rows_beyond_the_vocabulary_are_no_tokens(pair):
    model, _, processor = pair
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 8)
    samples = samples_for(processor)
    found = evaluate_data(model, processor, samples, larger, baseline_processor=processor)
    assert found.figures.agreement.value == 100
    assert found.figures.divergence.value == pytest.approx(0, abs=1e-6)


def test_samples_with_pictures_are_batched_apart():
    processor = folders.processor("llava")
    seen, blind = folders.short_samples(3), folders.short_samples(2, sees=False)
    samples = [*blind, *(replace(each, id=f"seen {each.id}") for each in seen)]
    for places, _ in on_data.batches_of(processor, samples, 4):
        assert len({bool(samples[place].images) for place in places}) == 1
