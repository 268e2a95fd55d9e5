"""The demo that has ended is not repeated."""

from slimvlm.demo.run import run_demo
from slimvlm.runs import compress


def test_a_finished_demo_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "results_of", lambda *asked: {"original": asked[2]})
    monkeypatch.setattr(compress, "compress", None)
    assert run_demo(tmp_path, True, False, print) == {"original": tmp_path / "width"}
