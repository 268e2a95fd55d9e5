"""Tables: groups of layers and legal widths, floors and marks of results, held-out figures."""

import re
from dataclasses import replace

import pytest

from slimvlm.evaluation.on_data import DataResult, OnSample
from slimvlm.evaluation.results import TaskResult
from slimvlm.models.cost import Picture
from slimvlm.models.load import anatomy
from slimvlm.runs.tables import (
    LEGEND,
    anatomy_rows,
    as_markdown,
    as_table,
    held_out_notes,
    held_out_text,
    result_json,
    result_rows,
    training_notes,
)
from tests import tiny
from tests.evaluation.test_compare import TEXT, answered, questions, result
from tests.tables import tables

TABLES = tables(__file__)


def test_notes_say_what_training_learnt_and_whether_it_did_harm():
    def on_data(divergence):
        rows = [OnSample(f"s{i}", 10, 2.0, 2.0, 9, divergence) for i in range(3)]
        return DataResult("m", tuple(rows))

    asked = questions("pets", 4)
    stages = ("original", "pruned", "recovered")
    results = {
        n: result(n, pets=answered(asked, r))
        for n, r in zip(stages, ("1111", "1110", "1100"), strict=True)
    }
    data = dict(zip(stages, map(on_data, (None, 0.002, 0.009)), strict=True))
    learnt, moved, worse = training_notes(results, data, "sft+kl")
    assert "learnt the data's answers (loss sft+kl)" in learnt
    assert "0.002 nats became 0.009" in moved
    assert "(AVG 75.0 and 50.0): ship the pruned one" in worse
    fine = {
        "original": results["original"],
        "pruned": results["recovered"],
        "recovered": results["pruned"],
    }
    assert training_notes(fine, {}, "kl") == []


def printed(shape):
    return [[name.strip(), value] for name, value in anatomy_rows(shape)]


def shape_of(name):
    return anatomy(tiny.CONFIGS[name]())


@pytest.mark.parametrize("name", TABLES["rows"])
def test_layers_that_differ_have_rows_of_their_own(name):
    rows = iter(printed(shape_of(name)))
    for expected in TABLES["rows"][name]:  # in this order
        assert expected in rows
    names = [name for name, _ in printed(shape_of("llava-llama"))]
    assert len(names) == len(set(names))
    assert not any("expert" in name for name in names)


def test_legal_widths_and_the_share_of_tokens():
    odd = shape_of("qwen3_vl_moe")
    odd = odd.with_layers([replace(s, intermediate_size=36) for s in odd.layers])
    assert ["legal neurons", "8 to 32 in steps of 8, and 36"] in printed(odd)
    for name, expected in (
        ("llava-llama", r"128; all 128 are \d+% of the backbone"),
        ("gemma3n", "all are kept: its layers"),
    ):
        assert re.match(expected, dict(printed(shape_of(name)))["one token"])
    shape = shape_of("lfm2_vl")
    for retypable in (False, True):  # attention in the last layer alone, or in none
        layers = [shape.layers[0]] * 12 + [shape.layers[1]]
        bare = replace(shape.with_layers(layers), retypable=retypable)
        assert {("layers 0 to 11", ""), ("layer 12", "")} <= {*map(tuple, printed(bare))}
    assert ["legal KV groups", "none"] in printed(shape.with_layers([shape.layers[0]] * 3))


def test_a_share_of_nothing_is_a_dash_and_a_note_of_two_stages_is_shown_once():
    wrong = TaskResult("exact_match", 0.0, 0.0, True, ("a", "b"), ("r", "s"), (0.0, 0.0))
    nothing = result("model", own=wrong)
    _, rows = result_rows({"original": nothing, "pruned": nothing})
    cells = {row[0]: row[-1] for row in rows}
    assert cells["AVG-% above chance"] == "-"
    assert not any("nan" in cell for row in rows for cell in row)
    plain = DataResult("model", (OnSample("a", 3, 0.5), OnSample("b", 2, 0.25)))
    noted = replace(plain, notes=("x", "y"))
    results = {"original": plain, "pruned": noted, "recovered": noted}
    assert held_out_notes(results)[:-1] == ["pruned, recovered: x", "pruned, recovered: y"]
    assert "\n- pruned, recovered: x\n- pruned, recovered: y\n" in held_out_text(results)


def measured(model, right, **changes):
    pets = answered(questions("pets", len(right)), right)
    return result(model, pets=replace(pets, **changes), text=TEXT)


def test_tables_show_what_is_kept_of_each_kind_of_answers_and_its_floor():
    asked = questions("pets", 8)
    names = {"large": "1" * 8, "small": "1" * 6 + "00"}
    models = {
        name: result(
            name,
            there=replace(answered(asked, right), metric="yes_no", chance=50.0),
            pets=replace(answered(asked, right[4:] + right[:4]), majority=25.0),
        )
        for name, right in names.items()
    }
    cells = {row[0]: row[3:] for row in result_rows(models)[1]}
    for kind, floor in (("chosen", 50), ("free", 25)):
        whole, small = cells[f"AVG-% {kind}, floor {floor}.0 [95 % interval]"]
        assert whole == "100.0"
        assert re.fullmatch(r"75\.0 \[\d+\.\d, \d+\.\d\]", small)
    values = result_json(models)
    assert [task["kind"] for task in values["small"]["tasks"].values()] == ["chosen", "free"]
    assert values["large"]["by_kind"] == {kind: {"average": 100.0} for kind in ("chosen", "free")}
    assert values["small"]["by_kind"]["chosen"]["retention"]["floor"] == 50
    few = {n: replace(m, tasks={"pets": m.tasks["pets"]}) for n, m in models.items()}
    told = [row[0] for row in result_rows(few)[1] if "floor" in row[0]]
    assert told == [
        "AVG-% above floor [95 % interval]",
        "AVG-% free, floor 25.0 [95 % interval]",
    ]


def test_tables_show_the_floors_that_are_known_and_mark_what_differs():
    plain = {n: measured(n, right) for n, right in (("large", "1" * 8), ("small", "1" * 6 + "00"))}
    header, rows = result_rows(plain)
    assert header == ["task", "chance", "large", "small"]
    assert not any("above floor" in row[0] for row in rows)
    blind = (1.0, *[0.0] * 7)
    plain["large"] = measured("large", "1" * 8, majority=25.0, blind_scores=blind)
    header, rows = result_rows(plain)
    assert header == ["task", "chance", "majority", "blind", "large", "small"]
    assert all(len(row) == len(header) for row in rows)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["pets"][:3] == ["0", "25.0", "12.5"]
    assert cells["text (lower is better)"][:3] == ["", "", ""]
    above = cells["AVG-% above floor [95 % interval]"]
    assert above[:4] == ["", "", "", "100.0"]
    assert above[4].startswith("66.7 [")
    pets = result_json(plain)["large"]["tasks"]["pets"]
    assert (pets["chance"], pets["majority"], pets["blind"]) == (0.0, 25.0, 12.5)
    names = {"large": "1" * 40, "worse": "1" * 20 + "0" * 20, "same": "1" * 40}
    models = {name: measured(name, right) for name, right in names.items()}
    header, rows = result_rows(models)
    cells = {row[0]: row[2:] for row in rows}
    assert cells["pets"] == ["100.0", "50.0 *", "100.0"]
    assert cells["AVG"] == ["100.0", "50.0 *", "100.0"]
    assert cells["text (lower is better)"] == ["12.0"] * 3
    assert as_table(header, rows).caption == LEGEND
    assert as_markdown(header, rows).endswith("\n\n\\" + LEGEND + "\n")
    values = result_json(models)
    assert values["worse"]["tasks"]["pets"]["significant"] is True
    assert values["worse"]["tasks"]["pets"]["difference"]["points"] == -50
    assert values["worse"]["average_significant"] is True
    assert values["same"]["average_difference"]["points"] == 0
    assert "significant" not in values["large"]["tasks"]["pets"]
    header, rows = result_rows({name: models[name] for name in ("large", "same")})
    assert as_table(header, rows).caption is None
    assert LEGEND not in as_markdown(header, rows)


def test_the_work_of_a_question_with_an_image_is_shared_out_by_hand():
    """CLIP: 2 layers of 4 matrices 32 x 32 and 2 of 32 x 48; a projector 32 x 64 + 64 x 64."""
    shape = shape_of("llava-llama")
    tower = 2 * 17 * (2 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 17 * 32)
    projector = 2 * 16 * (32 * 64 + 64 + 64 * 64 + 64)
    head, layer = 2 * 64 * 128, 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 4 * 80 * 64
    backbone = head + 80 * 4 * layer  # 16 image tokens and 64 of text
    total = tower + projector + backbone
    rows = dict(anatomy_rows(shape, Picture(17, 17, 16, 16)))
    assert rows["question with an image"] == (
        f"{total / 1e9:,.1f} GFLOP: vision tower {tower / total:.1%}, "
        f"projector {projector / total:.1%}, backbone {backbone / total:.1%}"
    )
    unread = (
        "nobody reads the last layer (compress --tower-ratio removes it first, without a change)"
    )
    assert rows["unread in the vision tower"] == unread
    unknown = dict(anatomy_rows(shape_of("perception_lm"), Picture(16, 16, 16, 16)))
    assert "its layers" not in rows["question with an image"]
    assert "layers are not known" in unknown["question with an image"]
    assert not {"question with an image", "unread in the vision tower"} & {
        name for name, _ in anatomy_rows(shape_of("llama"), Picture())
    }
