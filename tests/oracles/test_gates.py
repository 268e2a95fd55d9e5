"""Two result files and a requirement: accept, refuse or not comparable, as a person judges them."""

import json

import pytest

from slimvlm import cli
from slimvlm.core.errors import ConfigError, RegressionError
from slimvlm.evaluation.gates import judge
from slimvlm.evaluation.on_data import DataResult, OnSample

ACCEPT, NO, REFUSE = 0, 2, 3  # exit codes; 2 is a mistake: the files do not compare


def task(right, count=20, **changes):
    """A task of ``count`` questions, of which so many are answered rightly."""
    scores = [1.0] * right + [0.0] * (count - right)
    about = {"metric": "exact_match", "score": 100 * right / count, "chance": 0.0}
    about |= {"in_average": True, "ids": [f"q{i}" for i in range(count)], "scores": scores}
    return about | {"replies": ["red"] * count} | changes


def loss(value, metric="loss"):
    return task(0, metric=metric, score=value, scores=[value] * 20, in_average=False)


def file(blind=False, limit=None, **tasks):
    about = {"model": "m", "total_params": 20, "backbone_params": 10, "blind": blind}
    return json.dumps(about | {"prefill_ms": 1.0, "decode_ms": 1.0, "limit": limit, "tasks": tasks})


NINE = [f"q{i}" for i in range(1, 21)]
PAIRS = {  # the requirement, the original, the other one
    "a little worse": ("t >= 0.9x", file(t=task(16)), file(t=task(15)), ACCEPT),
    "much worse": ("t >= 0.9x", file(t=task(16)), file(t=task(10)), REFUSE),
    "keeps enough": ("retention >= 85%", file(t=task(18)), file(t=task(16)), ACCEPT),
    "keeps too little": ("retention >= 90%", file(t=task(18)), file(t=task(16)), REFUSE),
    "one asked of all": ("t >= 0.9x", file(t=task(16), limit=20), file(t=task(16)), ACCEPT),
    "alone": ("avg >= 50%", file(s=task(1), t=task(12)), file(t=task(12)), ACCEPT),
    "averages over other tasks": ("avg >= 1.0x", file(s=task(10)), file(t=task(12)), NO),
    "its worst task is left out": (
        *("avg >= 1.0x", file(s=task(8), t=task(16)), file(t=task(17)), NO),
    ),
    "shares no task": ("retention >= 90%", file(s=task(10)), file(t=task(12)), NO),
    "blind": ("t >= 1.0x", file(t=task(10), blind=True), file(t=task(12)), NO),
    "other questions": ("t >= 1.0x", file(t=task(10)), file(t=task(12, ids=NINE)), NO),
    "fewer questions": ("avg >= 1.0x", file(t=task(10)), file(t=task(8, 8)), NO),
    "other answers": ("t >= 1.0x", file(t=task(9, asked="a")), file(t=task(9, asked="b")), NO),
    "other images": (
        *("avg >= 1.0x", file(t=task(9, pictures=["a"] * 20))),
        *(file(t=task(9, pictures=["b"] * 20)), NO),
    ),
    "another metric": ("t >= 1.0x", file(t=task(9)), file(t=task(12, metric="anls")), NO),
    "loss beside perplexity": (
        *(
            "t <= 1.1x",
            file(t=loss(2.0, "perplexity"), s=task(9)),
            file(t=loss(1.0), s=task(9)),
            NO,
        ),
    ),
    "its score is not its scores'": ("t >= 90%", file(t=task(9)), file(t=task(0, score=99.9)), NO),
    "scores of five": (
        "t >= 90%",
        file(t=task(9)),
        file(t=task(0, score=500.0, scores=[5.0] * 20)),
        NO,
    ),
    "twice the same key": (
        *(
            "t >= 90%",
            file(t=task(9)),
            file(t=task(9)).replace('"score": 45.0', '"score": 9, "score": 45.0'),
            NO,
        ),
    ),
    "nothing right before": ("retention >= 95%", file(t=task(0)), file(t=task(1)), NO),
    "nothing right at all": ("t >= 0.9x", file(t=task(0)), file(t=task(0)), NO),
    "an endless bound": (f"t <= {'9' * 400}%", file(t=task(9)), file(t=task(9)), NO),
    # the original guesses on s: what is kept of that says nothing, unless it is asked for
    "guesses": (
        *("retention >= 90%", file(s=task(11, chance=50.0), t=task(18))),
        *(file(s=task(0, chance=50.0), t=task(18)), ACCEPT),
    ),
    "guesses do not help": (
        *("retention >= 90%", file(s=task(11, chance=50.0), t=task(18))),
        *(file(s=task(20, chance=50.0), t=task(12)), REFUSE),
    ),
    "named guesses": (
        *("s >= 0.9x", file(s=task(11, chance=50.0))),
        *(file(s=task(0, chance=50.0)), REFUSE),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_files_is_judged_as_a_person_would(name, tmp_path, capsys):
    require, a, b, code = PAIRS[name]
    for side, text in (("a", a), ("b", b)):
        (tmp_path / f"{side}.json").write_text(text)
    with pytest.raises(SystemExit) if code else pytest.MonkeyPatch.context() as ended:
        cli.main(
            ["compare", *(str(tmp_path / f"{side}.json") for side in "ab"), "--require", require]
        )
    told = capsys.readouterr().err
    assert not code or ended.value.code == code, told
    assert ("accepted: " in told) == (code == ACCEPT)


@pytest.mark.parametrize(
    ("require", "nats", "tokens", "code"),
    [
        ("loss <= 1.1x", 105, 10, ACCEPT),
        ("loss <= 1.1x", 138, 10, REFUSE),
        ("loss <= 1.1x", 138, 14, REFUSE),  # the same text in more tokens: each is cheaper
        ("perplexity <= 1.1x", 138, 14, REFUSE),
        ("increase <= 0.5", 138, 14, REFUSE),
        ("loss <= 1.1x", 105, 8, ACCEPT),
        ("agreement >= 90%", 105, 10, ACCEPT),
        ("agreement >= 90%", 105, 8, NO),  # no token of both is the same
    ],
)
def test_the_same_text_costs_what_it_costs_in_any_tokens(require, nats, tokens, code):
    """Of each text the original's ten tokens cost 10 nats each."""
    both = {"same": 10, "divergence": 0.1} if tokens == 10 else {"baseline_tokens": 10}
    before = tuple(OnSample(f"{i}", 10, 10.0) for i in range(9))
    after = tuple(OnSample(f"{i}", tokens, nats / tokens, 10.0, **both) for i in range(9))
    results = {"a": DataResult("a", before), "b": DataResult("b", after, "a")}
    try:
        judge([require], {}, results, lambda _: None)
        found = ACCEPT
    except (ConfigError, RegressionError) as error:
        found = REFUSE if isinstance(error, RegressionError) else NO
    assert found == code
