"""Every figure of a run's summary, card, report and JSON follows from what the run keeps.

Scores are computed anew from the kept replies, parameters and bytes from the weights, and losses
from the kept losses of samples. Only intervals and times are not.
"""

import json
import math
import re

import pytest
from safetensors import safe_open

from slimvlm.cli import main
from tests import tiny_folder as folders

pytestmark = pytest.mark.slow

STAGES = ("original", "pruned", "recovered")
TASKS = ("one", "two")
COUNT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory, unhurried):
    """A run with two tasks, of whose questions the original answers two of three as wanted."""
    home = tmp_path_factory.mktemp("figures")
    data = folders.write_llava_data(home, count=24)
    rows = [{"id": str(i), "q": f"What is {i}?", "a": "?"} for i in range(COUNT)]
    for name in TASKS:
        lines = [f"name: {name}", "data: rows.jsonl", f'prompt: "{name}: {{q}}"', "answer: a"]
        (home / f"{name}.yaml").write_text("\n".join([*lines, "max_new_tokens: 1"]))
    tasks, model = ",".join(str(home / f"{name}.yaml") for name in TASKS), folders.folder("llava")
    for _ in range(2):  # the second time with replies as answers
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = ["--out", str(home / "first.json"), "--force"]
        main(["evaluate", str(model), "--tasks", tasks, *out])
        said = json.loads((home / "first.json").read_text())["tasks"]
        for i, row in enumerate(rows):
            row["a"] = [said[name]["replies"][i] for name in TASKS] if i % 3 else "nothing"
    words = ["compress", str(model), "--ratio", "0.1", "--axis", "width", "--data", str(data)]
    words += ["--samples", "4", "--tasks", tasks, "--training-samples", "8", "--max-steps", "2"]
    words += ["--train", "projector", "--loss", "sft", "--batch-size", "2", "--local-steps", "0"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("slimvlm.cli.verbs.print_json", printed.append)
        main([*words, "--out", str(home / "out"), "--json"])
    main(["report", str(home / "out")])
    return home / "out", rows, model, json.loads(json.dumps(printed[0]))


def weights(folder):
    """Parameters and bytes of a checkpoint's tensors, and parameters of its language model."""
    total = backbone = size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                total += tensor.numel()
                size += tensor.numel() * tensor.element_size()
                backbone += tensor.numel() * ("vision" not in name and "projector" not in name)
    return total, backbone, size


def expected(out, rows, model):
    """The figures of each stage by name, from the files that the run keeps."""
    found = {}
    for stage in STAGES:
        tasks = json.loads((out / "results" / f"{stage}.json").read_text())["tasks"]
        figures = found[stage] = {}
        for name in TASKS:
            wanted = [[row["a"]] if isinstance(row["a"], str) else row["a"] for row in rows]
            replies = tasks[name]["replies"]
            right = sum(reply in answers for reply, answers in zip(replies, wanted, strict=True))
            figures[name] = 100 * right / COUNT
        figures["AVG"] = sum(figures[name] for name in TASKS) / len(TASKS)
        figures["AVG-%"] = 100 * figures["AVG"] / found["original"]["AVG"]
        data = json.loads((out / "results" / f"data-{stage}.json").read_text())["samples"]
        tokens = sum(sample["tokens"] for sample in data)

        def mean(name, data=data, tokens=tokens):
            return sum(sample[name] * sample["tokens"] for sample in data) / tokens

        figures["samples"], figures["tokens"] = len(data), tokens
        figures["loss"], figures["perplexity"] = mean("loss"), math.exp(mean("loss"))
        if stage != "original":
            figures["increase"] = mean("loss") - mean("baseline_loss")
            figures["agreement"] = 100 * sum(sample["same"] for sample in data) / tokens
            figures["divergence"] = mean("divergence")
        place = model if stage == "original" else out / "checkpoint"
        figures["total"], figures["backbone"], figures["bytes"] = weights(place)
    return found


def test_every_figure_follows_from_replies_losses_and_weights(run):
    out, rows, model, values = run
    found = expected(out, rows, model)
    assert 0 < found["pruned"]["AVG"] < 100, "nothing would be tested"
    for stage, figures in found.items():
        row, on_data = values[stage], values["held_out"][stage]
        assert row["total_params"] == figures["total"]
        assert row["backbone_params"] == figures["backbone"]
        assert row["weight_bytes"] == figures["bytes"]
        assert row["average"] == pytest.approx(figures["AVG"])
        assert {n: row["tasks"][n]["score"] for n in TASKS} == pytest.approx(
            {n: figures[n] for n in TASKS}
        )
        assert {row["tasks"][n]["n"] for n in TASKS} == {COUNT}
        if stage != "original":
            assert row["retention"]["percent"] == pytest.approx(figures["AVG-%"])
        assert (on_data["samples"], on_data["tokens"]) == (figures["samples"], figures["tokens"])
        for name in {"loss", "perplexity", "increase", "agreement", "divergence"} & {*figures}:
            assert on_data[name]["value"] == pytest.approx(figures[name], abs=1e-6)
    digits = {"one": 1, "two": 1, "AVG": 1, "AVG-% [95 % interval]": 1}
    digits |= {"backbone parameters": "M", "all parameters": "M", "weights MiB": "MiB"}
    digits |= {"loss of an answer token (nats)": 3, "perplexity": 2, "loss above the original's": 3}
    digits |= {"same next token as the original (%)": 1}
    digits |= {"KL divergence from the original (nats)": 3}
    names = [*TASKS, "AVG", "AVG-%", "backbone", "total", "bytes", "loss", "perplexity"]
    names += ["increase", "agreement", "divergence"]
    page, card = (out / "report.html").read_text(), (out / "checkpoint" / "README.md").read_text()
    for text in ((out / "summary.md").read_text(), card):
        table = {
            cells[0]: cells[-3:]
            for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
            if len(cells := [cell.strip() for cell in line.split(" |")]) >= 3
        }
        for (label, places), name in zip(digits.items(), names, strict=True):
            cells = [re.sub(r" \[.*| \*$", "", cell.lstrip("| ")) for cell in table[label]]
            for cell, stage in zip(cells, STAGES, strict=True):
                value = found[stage].get(name)
                if places == "M":
                    told = f"{value / 1e6:,.1f} M"
                elif places == "MiB":
                    told = f"{value / 2**20:.1f}"
                else:
                    told = "" if value is None else f"{value:.{places}f}"
                if cell != told:  # sums in another order may round otherwise
                    close = pytest.approx(
                        value, abs=0.6 * 10**-places if places in (1, 2, 3) else 0
                    )
                    assert float(cell) == close, (label, stage)
                assert cell in page
    sizes = [f"{found[stage]['total']:,}" for stage in ("original", "recovered")]
    assert f"| all parameters | {sizes[0]} | {sizes[1]} |" in card
    assert "trained on 4 samples" in card  # of 8: two steps of a batch of two
    share = found["recovered"]["AVG-%"]
    assert any(f"{near:.1f} % [" in card for near in (share - 1e-9, share + 1e-9))
    removed = 1 - found["pruned"]["backbone"] / found["original"]["backbone"]
    assert f"removes {removed:.2%} of the backbone" in (out / "summary.md").read_text()


def test_replies_that_were_cut_off_are_those_that_the_logs_mark(run):
    out, *_, values = run
    for name in TASKS:
        logs = [path.read_text().splitlines() for path in (out / "answers").glob(f"{name}-*")]
        cut = sorted(sum(json.loads(line).get("cut", False) for line in lines) for lines in logs)
        assert cut == sorted(values[stage]["tasks"][name]["cut"] for stage in STAGES)
