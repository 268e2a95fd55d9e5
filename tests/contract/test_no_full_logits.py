"""Nothing in a compression holds the logits of all tokens: only those of a chunk of positions."""

import pytest
import torch
import torch.nn.functional as F

from slimvlm.core.options import RecoverConfig
from slimvlm.data.chat import answered_sample
from slimvlm.data.roles import predicts_label
from slimvlm.data.samples import Question, Sample, Task
from slimvlm.evaluation.ask import answer, evaluate, likelihoods
from slimvlm.evaluation.on_data import evaluate_data
from slimvlm.models import losses
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import head_of, hidden_states
from slimvlm.models.load import load
from slimvlm.models.losses import CHUNK
from slimvlm.pruning import save
from slimvlm.pruning.cut import mask_
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.batches import answer_loss
from slimvlm.scoring.score_model import score
from slimvlm.training.recover import recover
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import Watched, logits, padded, plan_by_hand

pytestmark = pytest.mark.usefixtures("unhurried")
LONG = "It is red. There is a blue circle in the picture. " * 6
QUESTION = Question("q", LONG, (LONG,), choices=("yes", LONG))


def most_rows(vocabulary, run):
    """The most rows over a whole vocabulary in one tensor that an operation made meanwhile.

    What shares memory with an argument is not made: the transposed weights of a head, for one.
    """
    rows = [0]

    def look(_, given, made):
        places = {value.untyped_storage().data_ptr() for value in given}
        for value in made:
            is_made = value.untyped_storage().data_ptr() not in places
            if value.shape[-1:] == (vocabulary,) and is_made:
                rows.append(value.numel() // vocabulary)

    with Watched(look):
        run()
    return max(rows)


@pytest.fixture(scope="module")
def model():
    return tiny.build("gemma2")


@pytest.fixture(scope="module")
def batches(model):
    """Batches in which more positions count than fit in a chunk."""
    made = [tiny.batch(model, CHUNK + 40, seed) for seed in range(2)]
    return [{**batch, "labels": batch["input_ids"]} for batch in made]


def test_a_forward_pass_is_seen_and_the_answer_loss_and_the_walk_need_none(model, batches):
    assert most_rows(tiny.VOCAB, lambda: logits(model, batches[0])) == CHUNK + 40
    assert most_rows(tiny.VOCAB, lambda: answer_loss(model, batches)) == CHUNK
    whole, options = tiny.build("gemma2"), {"axis": "both", "local_steps": 1}
    rows = most_rows(tiny.VOCAB, lambda: walk_(whole, batches, 0.3, held_out=batches, **options))
    assert rows == CHUNK


@pytest.mark.parametrize("criterion", ["gate", "taylor"])
def test_scores(criterion, model, batches):
    assert most_rows(tiny.VOCAB, lambda: score(model, batches, criterion)) == CHUNK


@pytest.mark.parametrize("loss", ["sft", "0.5*sft+0.5*kl"])
def test_training(loss):
    teacher, processor = load(folders.folder("text"))
    student, _ = load(folders.folder("text"))
    turns = [folders.turn(role, LONG) for role in ("user", "assistant")]
    samples = [Sample(str(i), tuple(turns)) for i in range(2)]
    config = RecoverConfig(train="full", loss=loss, max_steps=1, batch_size=2, bf16=False)
    rows = most_rows(folders.VOCAB, lambda: recover(student, teacher, samples, config, processor))
    assert rows == CHUNK


def test_evaluation():
    seeing = load(folders.folder("text"))
    seeing[0].config.max_position_embeddings = 1024
    task = Task("passages", "perplexity", 0.0, lambda limit: [QUESTION], in_average=False)
    assert most_rows(folders.VOCAB, lambda: evaluate(*seeing, [task])) == CHUNK
    answered = [(QUESTION, LONG)] * 2
    assert most_rows(folders.VOCAB, lambda: likelihoods(*seeing, answered)) == CHUNK
    samples = [answered_sample(*pair) for pair in answered]
    for baseline in (None, seeing[0]):
        found = most_rows(folders.VOCAB, lambda b=baseline: evaluate_data(*seeing, samples, b))
        assert found == 32  # two models' at one time
    assert most_rows(folders.VOCAB, lambda: answer(*seeing, [QUESTION] * 2, 4)) == 2


def test_reading_back_what_was_written(model, batches, tmp_path, monkeypatch):
    """As with a picture of many tokens in the probe."""
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    monkeypatch.setattr(save, "probe", lambda *_: inputs)
    model.save_pretrained(tmp_path)
    assert most_rows(tiny.VOCAB, lambda: save.check_reload(model, None, tmp_path)) == CHUNK


def bent(name):
    """A tiny model whose family's cap on logits, or scale, is far from doing nothing."""
    model = tiny.build(name)
    config = model.config.get_text_config()
    if hasattr(config, "final_logit_softcapping") or tiny.is_multimodal(model.config):
        config.final_logit_softcapping = 0.5
    if hasattr(model, "logit_scale"):
        config.logit_scale = model.logit_scale = 0.25
    return model


BENT = ("llama", "gemma2", "llava-gemma2", "paligemma", "smolvlm", "gemma3", "cohere2")


@pytest.mark.parametrize("name", BENT)
def test_chunks_of_positions_and_padding_change_no_loss_and_no_divergence(name, monkeypatch):
    model, masked = bent(name), bent(name)
    mask_(masked, plan_by_hand(read_anatomy(model), [0, 2, 3]))
    data = [tiny.batch(model, 9 + 4 * seed, seed) for seed in range(2)]
    losses_of, apart = [], []
    for batch in data:
        counted = predicts_label(batch["labels"])
        original = logits(model, batch)[counted]
        wanted = batch["labels"][:, 1:][counted[:, :-1]]
        losses_of.append(F.cross_entropy(original, wanted, reduction="none"))
        theirs, ours = (x.log_softmax(-1) for x in (original, logits(masked, batch)[counted]))
        apart.append((theirs.exp() * (theirs - ours)).sum(-1))
    monkeypatch.setattr(losses, "CHUNK", 3)
    loss = float(torch.stack([values.mean() for values in losses_of]).mean())  # by sample
    divergence = float(torch.cat(apart).mean())
    for batches in (data, [padded(data)]):
        assert answer_loss(model, batches) == pytest.approx(loss, rel=1e-5)
        found = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            counted = predicts_label(batch["labels"])
            ours, theirs = (hidden_states(each, inputs)[0][counted] for each in (masked, model))
            both = ours[None], theirs[None], head_of(masked), head_of(model)
            loss_of = losses.divergence(*both, temperature=1.0).detach()
            found += [float(loss_of)] * len(ours)
        assert sum(found) / len(found) == pytest.approx(divergence, rel=1e-4)
