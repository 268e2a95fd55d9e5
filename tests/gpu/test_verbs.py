"""Every verb that runs a model gives the same on a card as on the CPU, as docs/gpu.md says."""

import json
import re
import shlex
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from slimvlm import cli
from slimvlm.core.options import DIVERGENCES
from slimvlm.models.devices import release_memory
from tests import pretended_gpu, tiny, tiny_pictures, tiny_words
from tests import tiny_folder as folders
from tests.gpu.alike import ROUNDING, assert_close
from tests.handmade import refused
from tests.runs.study.study_files import RECOVER, RECOVERIES, stable
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
CPU = torch.device("cpu")
ROOM = 30_000
"""Bytes of a card without room."""
EXACT = {
    **{"bf16": False, "lora": {"lora_alpha": 8, "lora_dropout": 0.0}},
    "trainer": {"save_steps": 1},
}
"""float32 without dropout, so that devices agree; a checkpoint after every step."""
TRAINING = "--max-steps 3 --batch-size 2 --learning-rate 1e-3 --lora-rank 4 --config {settings}"

RECOVERED = TABLES["recovered"]
"""Each way to learn, each loss, a teacher that shares and one that does not."""
CASES = {
    **TABLES["commands"],
    **{
        f"recover {train} {loss}": f"recover {{smaller}} --data {{data}} --train {train} "
        f"--loss {loss} {'' if loss == 'sft' else '--teacher {llava}'} {more} {TRAINING}"
        for train, loss, more in RECOVERED
    },
}
FAST = (
    *("width", "prune --low-memory", "fewer tokens, pruned"),
    "recover lora 0.5*sft+0.5*kl",
    *("score obs", "score taylor", "score block_influence --low-memory"),
    *("evaluate --tasks", "evaluate --data --baseline", "compare", "chat"),
)
"""In the default tier; criteria of each way to collect."""
TABLE = {
    **{name: name for name in ("compress", "prune", "prune --low-memory")},
    **{"score": "score taylor", "recover": "recover lora sft+hidden"},
    **{name: name for name in ("evaluate --tasks", "evaluate --data --baseline")},
    **{name: name for name in ("compare", "chat", "bench", "image-tokens", "quantize", "study")},
}
"""Rows of the table in docs/gpu.md."""
PRINTS = ("compare", "chat", "bench", "image-tokens")
"""Verbs whose outcome is what they print."""


MEASURED = re.compile(r"_ms$|seconds|per_sec|time|bytes$|^device|^runs$|speed|ideal")
"""Figures that differ from run to run, or between devices."""


def same_values(found, expected, at=""):
    """Values of JSON files, but for what is measured; numbers differ by rounding at most."""
    if isinstance(expected, dict):
        ours, theirs = ({k: v for k, v in each.items() if not MEASURED.search(k)}
                        for each in (found, expected))  # fmt: skip
        assert ours.keys() == theirs.keys(), at
        for key, value in theirs.items():
            same_values(ours[key], value, f"{at}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for index, pair in enumerate(zip(found, expected, strict=True)):
            same_values(*pair, f"{at}/{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=1e-5, nan_ok=True), at
    else:
        assert found == expected, at


def same_file(found, expected):
    """The same tensors, rows or values, or the same text where that tells no figures."""
    if expected.suffix == ".safetensors":
        return assert_close(load_file(found), load_file(expected))
    if expected.suffix == ".parquet":
        ours, theirs = (stable(pd.read_parquet(each)) for each in (found, expected))
        assert set(theirs["status"]) == {"done"}
        return pd.testing.assert_frame_equal(ours, theirs, rtol=ROUNDING)
    try:
        values = json.loads(expected.read_text())
    except ValueError:
        if expected.suffix == "":
            assert found.read_text() == expected.read_text()
        return None
    return same_values(json.loads(found.read_text()), values, expected.name)


def same(found, expected):
    """What a verb wrote: the same files, and the same in them."""
    ours, theirs = (
        {
            str(p.relative_to(place.parent)): p
            for p in [place, *place.parent.rglob("*")]
            if p.is_file()
        }
        for place in (found, expected)
    )
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, file in theirs.items():
        same_file(ours[name], file)


def stones(path):
    """Conversations without pictures, each with other words."""
    asked = [(f"How wide are {n} stones?", f"They are {n * n} wide.") for n in range(30)]
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked
    ]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in turns))


def experts(path):
    config = tiny.CONFIGS["qwen3_moe"]()
    config.vocab_size = folders.VOCAB
    tiny.made(config).save_pretrained(path)
    folders.processor("text").save_pretrained(path)


def smaller(path):
    given = ["--data", str(folders.write_llava_data(path.with_name("few"), 4)), "--samples", "2"]
    given += ["--axis", "both", "--ratio", "0.3", "--device", "cpu"]
    given += ["--criterion", "block_influence", "magnitude", "--out", str(path)]
    cli.main(["prune", str(folders.folder("llava")), *given])


def study(path):
    data = folders.write_llava_data(path.with_name("conversations"), pictures=False)
    cells = {"model": str(folders.folder("text")), "ratio": 0.4, "axis": ["depth", "width"]}
    values = {
        "grids": [{**cells, "recovery": "sft+hidden"}],
        "recoveries": {"sft+hidden": RECOVERIES["sft+hidden"]},
        "recover": {**RECOVER, "lora": {"lora_dropout": 0.0}},
        **{"data": str(data), "prune": {"samples": 4}},
        **{"tasks": "text_odd,text_ppl", "limit": 2, "floors": False},
    }
    path.write_text(json.dumps(values))


MAKES = {
    **{"smaller": smaller, "stones.jsonl": stones, "experts": experts, "study": study},
    "corpus": lambda path: path.write_text("\n".join(tiny_words.CORPUS)),
    "settings": lambda path: path.write_text(json.dumps({"model": "x", "recover": EXACT})),
    "picture": lambda path: folders.picture().save(path, "png"),
    "data": lambda path: folders.write_llava_data(path, count=12),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Fills in the names in a command; what they name is made when it is first needed."""
    root, words = tmp_path_factory.mktemp("verbs"), tiny_words.folder("text")
    places = {"llava": folders.folder("llava"), "words": words}
    places["pixels"] = tiny_pictures.folder("qwen2_5_vl")

    def place_of(found):
        name = {"stones": "stones.jsonl"}.get(found[1], found[1])
        if name not in places:
            places[name] = root / name
            MAKES[name](places[name])
        return str(places[name] / "data.json" if name == "data" else places[name])

    return lambda command: shlex.split(re.sub(r"{(\w+)}", place_of, command))


def run(words, out, device):
    """Run a verb on a device and no other one; ``out`` holds what it writes or prints."""
    cards = range(torch.cuda.device_count())
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    held = [torch.cuda.max_memory_allocated(card) for card in cards]
    out.parent.mkdir(parents=True, exist_ok=True)
    printed = words[0] in PRINTS
    with redirect_stdout(StringIO()) as box:
        given = ["--device", str(device), *([] if printed else ["--out", str(out)])]
        cli.main([*words, *given])
    if printed:
        out.write_text(box.getvalue())
    used = [card for card in cards if torch.cuda.max_memory_allocated(card) > held[card]]
    assert used == ([device.index] if device.type == "cuda" else [])


def full_card(words, out, device):
    """What a verb says where it has no room."""
    release_memory()
    given = () if words[0] in PRINTS else ("--out", out)
    with pretended_gpu.limit(ROOM, 0):
        if words[0] != "study":
            return refused(*words, *given, "--device", device)
        with suppress(SystemExit):
            cli.main([*map(str, (*words, *given)), "--device", str(device)])
    table = pd.read_parquet(out / "results.parquet")
    assert set(table["status"]) == {"failed"}
    return min(table["failed"], key=lambda told: "out of memory" in told)


ON_CARDS = [(name, 1) for name in CASES if name in FAST or name not in TABLE.values()]
ON_CARDS += [(name, 2) for name in TABLE.values()]


@pytest.mark.parametrize(
    ("name", "count"), tiered(ON_CARDS, lambda name, count: name in FAST and count == 1)
)
def test_a_verb_does_the_same(name, count, filled, card, tmp_path):
    """On one card; those of the table in the documents also on another one, and on a full one."""
    if name == "quantize":
        pytest.importorskip("torchao")
    words, cards = filled(CASES[name]), range(min(count, torch.accelerator.device_count()))
    devices = [CPU, *(torch.device(card.type, index) for index in cards)]
    for number, device in enumerate(devices):
        run(words, tmp_path / str(number) / "out", device)
    for number in range(1, len(devices)):
        same(tmp_path / str(number) / "out", tmp_path / "0" / "out")
    if count == 2 and pretended_gpu.REASON is None:
        told = full_card(words, tmp_path / "full", card)
        expected = {"quantize": "do not fit into", "study": "out of memory"}
        assert expected.get(name, "out of memory on cuda:0 during") in told


def test_all_losses_are_tried_and_the_table_in_the_docs_has_these_rows():
    tried = {part.partition("*")[2] or part for _, loss, _ in RECOVERED for part in loss.split("+")}
    assert tried == {"sft", "hidden", "cosine", *DIVERGENCES}
    ends = dict.fromkeys(TABLE, "refused in one line") | {
        "study": "each cell says so, the others go on"
    }
    rows = [f"| `{name}` | runs | same | same | {end} |" for name, end in ends.items()]
    assert [line for line in PAGE.read_text().splitlines() if " | runs | " in line] == rows


def test_export_is_the_same_where_there_is_a_card(card, filled, tmp_path, capsys):
    """It runs no model on a device, and must not need one."""
    words = filled("export {smaller} --check vllm gguf --json")
    before = torch.get_device_module(card).memory_allocated()
    cli.main(words)
    assert {row["target"] for row in json.loads(capsys.readouterr().out)} == {"vllm", "gguf"}
    cli.main([*filled("export {smaller} --text-only --out"), str(tmp_path / "text")])
    assert (tmp_path / "text" / "model.safetensors").is_file()
    assert torch.get_device_module(card).memory_allocated() == before


@pytest.mark.slow
def test_a_quantiser_of_its_own_takes_the_device_that_is_named(filled, tmp_path):
    """bitsandbytes takes the current card unless it is told of another device."""
    pytest.importorskip("bitsandbytes")
    run(filled("quantize {llava} --backend bitsandbytes"), tmp_path / "small", CPU)
    run(filled(f"evaluate {tmp_path / 'small'} --data {{data}}"), tmp_path / "r.json", CPU)
