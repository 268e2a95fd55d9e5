"""Two result files and a requirement: accept, refuse or not comparable, as a person judges them."""

import json

import pytest

from slimvlm import cli
from slimvlm.core.errors import ConfigError, RegressionError
from slimvlm.evaluation.gates import judge
from slimvlm.evaluation.on_data import DataResult, OnSample
from tests.tables import tables

ACCEPT, NO, REFUSE = 0, 2, 3  # exit codes; 2 is a mistake: the files do not compare
CODES = {"accept": ACCEPT, "not comparable": NO, "refuse": REFUSE}


def task(right, count=20, **changes):
    """A task of ``count`` questions, of which so many are answered rightly."""
    scores = [1.0] * right + [0.0] * (count - right)
    about = {"metric": "exact_match", "score": 100 * right / count, "chance": 0.0}
    about |= {"in_average": True, "ids": [f"q{i}" for i in range(count)], "scores": scores}
    about |= {"replies": ["red"] * count} | changes
    return {n: v * count if isinstance(v, list) and len(v) == 1 else v for n, v in about.items()}


def file(blind=False, limit=None, again="", **tasks):
    """A result's text, in which the first task's score may come again."""
    about = {"model": "m", "total_params": 20, "backbone_params": 10, "blind": blind}
    about |= {"prefill_ms": 1.0, "decode_ms": 1.0, "limit": limit}
    text = json.dumps(about | {"tasks": {name: task(**row) for name, row in tasks.items()}})
    return text.replace('"score"', f'{again}, "score"', 1) if again else text


PAIRS = tables(__file__)["pairs"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_files_is_judged_as_a_person_would(name, tmp_path, capsys):
    require, a, b, judged = PAIRS[name]
    require, code = require.replace("ENDLESS", "9" * 400), CODES[judged]
    for side, row in (("a", a), ("b", b)):
        (tmp_path / f"{side}.json").write_text(file(**row))
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
