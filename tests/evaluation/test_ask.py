"""Asking questions: the same answers in every batch, blind or not, resumed or not."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slimvlm.core.errors import ConfigError, DataError, OutputError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation import ask as evaluation
from slimvlm.evaluation.ask import answer, choose, evaluate, with_other_pictures
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.runs.tables import result_rows
from tests import tiny_folder as folders
from tests.handmade import Stopped
from tests.tiers import tiered
from tests.tiny_folder import SEEING, picture

pytestmark = pytest.mark.usefixtures("unhurried")
WORDS = ("red", "blue", "green")


def questions(count, sees=True):
    """Prompts of quite different lengths, every fourth with the answer "yes"."""
    return [
        Question(
            id=f"q{index}",
            prompt="Which colour " + "of these " * (index * 5 % 7) + f"is part {index}?",
            answers=("yes" if index % 4 == 0 else WORDS[index % 3],),
            images=(picture(index),) if sees else (),
        )
        for index in range(count)
    ]


def task(name="colours", count=9, sees=True, **changes):
    made = Task(name, "exact_match", 25.0, lambda limit: questions(count, sees)[:limit])
    return replace(made, **{"max_new_tokens": 4, **changes})


PASSAGES = ("A field of colours.", "It is red. It is blue, and this one is longer.", "yes")
PERPLEXITY = Task(
    *("passages", "perplexity", 0.0),
    load=lambda limit: [Question(t[:5], "", (t,)) for t in PASSAGES[:limit]],
    in_average=False,
)


@pytest.fixture(scope="module")
def llava():
    return load(folders.folder("llava"))


@pytest.fixture(scope="module")
def result(llava, unhurried):
    return evaluate(*llava, [task(), PERPLEXITY], name="tiny")


@pytest.mark.parametrize(
    "kind", tiered([*SEEING, "text"], lambda kind: kind in ("qwen2_5_vl", "text"))
)
def test_batches_change_no_reply(kind):
    model, processor = load(folders.folder(kind))
    asked = [task(sees=kind in SEEING)]
    one, eight, again = (
        evaluate(model, processor, asked, batch_size=size).tasks["colours"] for size in (1, 8, 8)
    )
    assert one == eight == again
    assert any(one.replies)


def test_replies_stay_with_their_questions_and_the_model_is_left_alone(llava, result):
    """They are asked longest first, and must come back in the task's order."""
    found, (model, processor) = result.tasks["colours"], llava
    assert found.ids == tuple(f"q{i}" for i in range(9))
    for question, reply in zip(questions(9), found.replies, strict=True):
        assert answer(*llava, [question], 4)[0][0] == reply
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    few = evaluate(model, processor, [task()], limit=3)
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert few.tasks["colours"].ids == ("q0", "q1", "q2")
    assert few.tasks["colours"].replies == found.replies[:3]
    with pytest.raises(ConfigError, match=r"'colours': the baseline has other questions"):
        few.retention(result)


def test_scores_follow_from_the_replies_and_answers_are_offered_or_not(llava, result):
    """Ask again with some replies declared right."""
    asked, given = questions(9), result.tasks["colours"].replies
    asked[:3] = [replace(asked[i], answers=(given[i],)) for i in range(3)]
    found = evaluate(*llava, [task(load=lambda limit: asked)]).tasks["colours"]
    assert found.scores == (1, 1, 1, 0, 0, 0, 0, 0, 0)
    assert found.score == pytest.approx(100 / 3)
    assert found.offered is False
    asked = [replace(q, images=(), choices=WORDS) for q in questions(2)]
    told = [replace(q, prompt=f"{q.prompt} red, blue or green?") for q in asked]
    for given, likeliest, offered in (
        (asked, False, False),
        (asked, True, True),
        (told, False, True),
        ([told[0], asked[1]], False, False),
    ):
        found = task(load=lambda limit, given=given: given, by_likelihood=likeliest)
        assert evaluate(*llava, [found]).tasks["colours"].offered is offered


def test_replies_that_reach_the_token_limit_are_counted(llava, tmp_path):
    """Also where they are read from a log. With every token an end, none does."""
    model, processor = load(folders.folder("llava"))
    for _ in range(2):
        found = evaluate(model, processor, [task()], log_folder=tmp_path).tasks["colours"]
        assert found.cut == sum(is_cut for _, is_cut in answer(*llava, questions(9), 4)) > 0
    rows = result_rows({"model": evaluate(model, processor, [task()])})[1]
    assert ["colours: replies cut off at max_new_tokens", "", "", f"{found.cut} of 9"] in rows
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    assert evaluate(model, processor, [task()]).tasks["colours"].cut == 0


def test_thoughts_are_no_answer_and_a_line_in_the_template_ends_them():
    model, processor = load(folders.folder("llava"))
    processor.chat_template += "{% if enable_thinking is not defined %}<think>{% endif %}"
    found = evaluate(model, processor, [task(metric="f1")]).tasks["colours"]
    assert all(reply.startswith("<think>") for reply in found.replies)  # and none has an end
    plain = copy.copy(processor)
    plain.chat_template = "{% set enable_thinking = false %}" + processor.chat_template
    asked = task(load=lambda limit: [replace(q, answers=(r[0],)) for q, r in told])
    told = [(q, answer(model, plain, [q], 4)[0]) for q in questions(9)]
    assert evaluate(model, plain, [asked]).tasks["colours"].score == 100
    assert evaluate(model, processor, [asked]).tasks["colours"].score == 0


def test_a_choice_that_begins_another_one_does_not_always_win(llava, monkeypatch):
    """Log-probabilities are divided by bytes, as in lm-eval's acc_norm; batches stay small."""
    values = {"cat": -3.0, "catfish": {"sea": -6.0, "house": -8.0}, "котик": -9.0}
    sizes = []

    def read(model, processor, pairs):
        sizes.append(len(pairs))
        found = [(q, values[choice]) for q, choice in pairs]
        return [v[q.id] if isinstance(v, dict) else v for q, v in found]

    monkeypatch.setattr(evaluation, "likelihoods", read)
    asked = [Question(name, "What?", (), choices=tuple(values)) for name in ("sea", "house")]
    assert choose(*llava, asked) == [("catfish", False), ("котик", False)]
    assert sizes == [2, 2, 2]


def test_perplexity_is_exp_of_the_mean_token_loss(llava, result):
    model, processor = llava
    total, count = 0.0, 0
    for passage in PASSAGES:
        ids = processor.tokenizer(passage, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.numel() - 1
    found = result.tasks["passages"]
    assert found.score == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.in_average is False


def test_blind_shows_other_pictures_and_gives_floors(llava, result):
    """Questions about the same picture may stand half a list apart; text has nothing to swap."""
    asked = questions(5)
    shown, given = (
        sorted(q.images[0].tobytes() for q in of) for of in (with_other_pictures(asked), asked)
    )
    assert shown == given
    asked = [replace(q, images=(picture(i // 3 % 2),)) for i, q in enumerate(questions(12))]
    asked.insert(4, replace(asked[0], images=()))
    blind = with_other_pictures(asked)
    assert [q.id for q in blind] == [q.id for q in asked]
    assert [bool(q.images) for q in blind] == [bool(q.images) for q in asked]
    assert all(b.images != q.images for b, q in zip(blind, asked, strict=True) if q.images)
    with pytest.raises(ConfigError, match=r"floors: question 'q0' finds no other images"):
        with_other_pictures([replace(q, images=(picture(0),)) for q in asked])
    asked = [task(), task("words", sees=False), PERPLEXITY, task("losses", metric="loss")]
    both = evaluate(*llava, asked, floors=True)
    others = task(load=lambda limit: with_other_pictures(task().load(limit)))
    colours, alone = both.tasks["colours"], result.tasks["colours"]
    blind = evaluate(*llava, [others]).tasks["colours"]
    assert blind.replies != alone.replies
    assert colours.blind == blind.score
    assert colours.majority == pytest.approx(100 * 3 / 9)  # "yes" answers 0, 4 and 8
    assert replace(alone, blind_scores=blind.scores) == colours
    assert [both.tasks[n].blind for n in ("words", "passages", "losses")] == [None] * 3
    assert both.tasks["passages"].majority is None
    with pytest.raises(DataError, match=r"^task 'colours': two questions have the id 'q0'$"):
        evaluate(*llava, [task(load=lambda limit: questions(2) + questions(1))])


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_the_question_that_is_too_long_is_named(llava, metric):
    """Words that become many tokens make it longer than one of more characters."""
    prompts = {"wordy": "the colours " * 25, "long": "%" * 250, "none": "red"}
    asked = [Question(name, text, ("red",)) for name, text in prompts.items()]
    with pytest.raises(DataError, match=r"^question 'long' has .* tokens, the model reads 256"):
        evaluate(*llava, [task(metric=metric, load=lambda limit: asked)])


def test_a_result_has_sizes_times_and_options(llava, result):
    shape = read_anatomy(llava[0])
    params = result.total_params, result.backbone_params
    assert params == (shape.total_params, shape.backbone_params)
    assert (result.prefill_ms, result.decode_ms) == (2.25, 1.0)
    assert (result.prefill_range_ms, result.decode_range_ms) == ((2.0, 2.5), (1.0, 1.0))
    assert result.average == result.tasks["colours"].score
    found = evaluate(*llava, [task(metric="yes_no")], limit=2, batch_size=3)
    assert (found.limit, found.batch_size) == (2, 3)
    assert found.dtype == str(llava[0].dtype).removeprefix("torch.")
    assert set(found.tasks["colours"].details) == {"f1", "yes_rate"}


def test_a_stopped_evaluation_asks_only_the_rest(llava, tmp_path, monkeypatch):
    tasks = [task(count=9), PERPLEXITY, task("more", count=6)]
    asked, budget, how = [], 99, {"batch_size": 2, "log_folder": tmp_path}

    def counted(*arguments):
        if len(asked) >= budget:
            raise Stopped
        asked.extend(question.id for question in arguments[2])
        return answer(*arguments)

    monkeypatch.setattr(evaluation, "answer", counted)
    whole = evaluate(*llava, tasks, batch_size=2)
    assert len(asked) == 15
    first = []
    for budget in (4, 9):  # noqa: B007
        asked = []
        with pytest.raises(Stopped):
            evaluate(*llava, tasks, **how)
        first += asked[: 9 - len(first)]
        for log in tmp_path.iterdir():
            with log.open("a") as file:
                file.write('{"id": "q0", "prom')  # cut short
    assert sorted(first) == [f"q{i}" for i in range(9)]
    assert len(asked) == 9
    monkeypatch.setattr(evaluation, "answer_losses", None)  # passages are not read again
    for budget, rest in ((99, 2), (0, 0)):  # noqa: B007
        asked = []
        assert evaluate(*llava, tasks, **how) == whole
        assert len(asked) == rest


def test_a_log_answers_only_for_what_was_asked_in_the_same_way(tmp_path, monkeypatch):
    """Weights alone are not enough: templates, pictures' sizes and settings change replies, too."""
    model, processor = load(folders.folder("llava"))
    asked = []
    for name in ("answer", "choose"):
        honest = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *a, f=honest: asked.append(1) or f(*a))

    def is_asked_once(choices=WORDS, **changes):
        load_ = lambda limit: [replace(q, choices=choices) for q in questions(2)]  # noqa: E731
        again = [task(load=load_, **changes)] * 2
        evaluate(model, processor, again, log_folder=tmp_path)
        once = len(asked) == 1
        asked.clear()
        return once

    assert is_asked_once()
    assert not is_asked_once()
    assert is_asked_once(by_likelihood=True)
    assert is_asked_once(choices=WORDS[:2])
    model.generation_config.repetition_penalty = 1.5
    assert is_asked_once()
    processor.chat_template = "{{ '' }}" + processor.chat_template
    assert is_asked_once()
    processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    assert is_asked_once()
    model.config.text_config.rope_parameters["rope_theta"] *= 2
    assert is_asked_once()
    monkeypatch.setattr(evaluation.documents, "identity_of_code", lambda: "a mended bug")
    assert is_asked_once()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        evaluate(model, processor, [task(count=1)], log_folder=tmp_path / "file" / "log")
