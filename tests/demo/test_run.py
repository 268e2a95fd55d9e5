"""What the demo writes beside its run, and tells to do next."""

from PIL import Image

from slimvlm.demo.questions import TASKS
from slimvlm.demo.run import SHOWN, run_demo
from slimvlm.runs import compress


def test_a_finished_demo_is_not_repeated_and_has_pictures_to_ask_about(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "results_of", lambda *_: {"original": "known"})
    out = tmp_path / "demo"
    results, lines = run_demo(out, True, False, print)
    assert results == {"original": "known"}
    for name in SHOWN:
        (image,) = TASKS[name].load(1)[0].images
        assert Image.open(out / "pictures" / f"{name}.png").tobytes() == image.tobytes()
    assert any(str(out / "pictures") in line for line in lines)
    assert any(f"report {out / 'width'}" in line for line in lines)
