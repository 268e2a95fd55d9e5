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
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result
from slimvlm.models.devices import release_memory
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE
from slimvlm.runs.compress import read_times
from slimvlm.scoring.criteria import CRITERIA
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
HELD_OUT = "slimvlm_held_out.json"
ROOM = 30_000
"""Bytes of a card without room."""
EXACT = {
    **{"bf16": False, "lora": {"lora_alpha": 8, "lora_dropout": 0.0}},
    "trainer": {"save_steps": 1},
}
"""float32 without dropout, so that devices agree; a checkpoint after every step."""
TRAINING = "--max-steps 3 --batch-size 2 --learning-rate 1e-3 --lora-rank 4 --config {settings}"

OF_WIDTHS = [name for name in CRITERIA if name not in ("frequency", "reap")]
"""Criteria that score a model without experts."""
RECOVERED = TABLES["recovered"]
"""Each way to learn, each loss, a teacher that shares and one that does not."""
CASES = {
    **TABLES["commands"],
    **{
        f"score {name}{more}": "score {llava} --data {data} --samples 4 "
        f"--criterion {name}{more}"
        for name in OF_WIDTHS
        for more in ("", " --low-memory")
        if not more or (CRITERIA[name].needs_data and CRITERIA[name].capture.sees == "layer")
    },
    **{
        f"recover {train} {loss}": f"recover {{smaller}} --data {{data}} --train {train} "
        f"--loss {loss} {'' if loss == 'sft' else '--teacher {llava}'} {more} {TRAINING}"
        for train, loss, more in RECOVERED
    },
}
FAST = (
    *("width", "prune", "prune --low-memory", "fewer tokens, pruned"),
    "recover lora 0.5*sft+0.5*kl",
    *("score obs", "score taylor", "score block_influence --low-memory"),
    *("evaluate --tasks", "evaluate --data", "evaluate --data --baseline", "compare", "chat"),
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


def same_checkpoint(found, expected):
    """The same units stay, in weights that differ by rounding at most."""
    for name in (PLAN_FILE, HELD_OUT):
        assert (found / name).exists() == (expected / name).exists()
    if (expected / PLAN_FILE).exists():
        assert Plan.load(found / PLAN_FILE) == Plan.load(expected / PLAN_FILE)
    if (expected / HELD_OUT).exists():
        same_on_data(found / HELD_OUT, expected / HELD_OUT)
    ours, theirs = (
        [load_file(f) for f in sorted(d.glob("*.safetensors"))] for d in (found, expected)
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def same_scores(found, expected):
    assert_close(*(load_file(out.with_suffix(".safetensors")) for out in (found, expected)))


def same_on_data(found, expected):
    ours, theirs = DataResult.load(found).samples, DataResult.load(expected).samples
    assert [sample.id for sample in ours] == [sample.id for sample in theirs]
    for name in ("loss", "baseline_loss", "same", "divergence"):
        one, other = ([getattr(sample, name) or 0 for sample in each] for each in (ours, theirs))
        assert one == pytest.approx(other, rel=ROUNDING, abs=1e-6)


def same_answers(found, expected):
    if "tasks" not in json.loads(expected.read_text()):
        return same_on_data(found, expected)
    ours, theirs = Result.load(found).tasks, Result.load(expected).tasks
    assert [ours[name].replies for name in theirs] == [theirs[name].replies for name in theirs]
    for name, task in theirs.items():
        assert ours[name].scores == pytest.approx(task.scores, rel=ROUNDING)
    return None


def same_run(found, expected):
    """Two run folders of compress: plan, checkpoint, losses of every step and of the end."""
    assert Plan.load(found / "plan.json") == Plan.load(expected / "plan.json")
    same_checkpoint(found / "checkpoint", expected / "checkpoint")
    losses = [
        [row["loss"] for row in json.loads((folder / "history.json").read_text())["steps"]]
        for folder in (found, expected)
        if (folder / "history.json").exists()
    ]
    if losses:
        assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)
    assert read_times(found) is not None
    measured = sorted(path.name for path in (expected / "results").glob("data-*.json"))
    assert measured
    for name in measured:
        same_on_data(found / "results" / name, expected / "results" / name)


def same_text(found, expected):
    assert found.read_text() == expected.read_text()


def same_counts(found, expected):
    """Times differ; what is counted does not."""
    ours, theirs = (json.loads(out.read_text()) for out in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in ("total_params", "weight_bytes", "decode_flops"):
        assert ours["model"][name] == theirs["model"][name]


def same_budgets(found, expected):
    """Times differ; settings, tokens and figures of answers do not."""
    ours, theirs = (json.loads(out.read_text())["budgets"] for out in (found, expected))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for name in ("settings", "tokens", "kv_cache_bytes"):
            assert one[name] == other[name]
        for name, value in (other["held_out"]["data"] or {}).items():
            if isinstance(value, dict):
                said = one["held_out"]["data"][name]["value"]
                assert said == pytest.approx(value["value"], rel=ROUNDING, abs=1e-6)


def same_study(found, expected):
    ours, theirs = (stable(pd.read_parquet(out / "results.parquet")) for out in (found, expected))
    assert set(theirs["status"]) == {"done"}
    pd.testing.assert_frame_equal(ours, theirs, rtol=ROUNDING)


SAME = {
    **{"compress": same_run, "score": same_scores, "evaluate": same_answers, "study": same_study},
    **dict.fromkeys(("prune", "recover", "quantize"), same_checkpoint),
    **{"compare": same_text, "chat": same_text, "bench": same_counts, "image-tokens": same_budgets},
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Fills in the names in a command; what they name is made when it is first needed."""
    root = tmp_path_factory.mktemp("verbs")

    def smaller():
        given = filled("--data {data} --samples 2 --criterion block_influence magnitude")
        given += ["--axis", "both", "--ratio", "0.3", "--device", "cpu"]
        cli.main(["prune", filled("{llava}")[0], "--out", str(root / "smaller"), *given])

    def stones():
        """Conversations without pictures, each with other words."""
        asked = [(f"How wide are {n} stones?", f"They are {n * n} wide.") for n in range(30)]
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in asked
        ]
        places["stones"].write_text("\n".join(map(json.dumps, rows)))

    def experts():
        config = tiny.CONFIGS["qwen3_moe"]()
        config.vocab_size = folders.VOCAB
        tiny.made(config).save_pretrained(root / "experts")
        folders.processor("text").save_pretrained(root / "experts")

    def study():
        words = folders.write_llava_data(root / "conversations", pictures=False)
        cells = {"model": str(folders.folder("text")), "ratio": 0.4, "axis": ["depth", "width"]}
        values = {
            "grids": [{**cells, "recovery": "sft+hidden"}],
            "recoveries": {"sft+hidden": RECOVERIES["sft+hidden"]},
            "recover": {**RECOVER, "lora": {"lora_dropout": 0.0}},
            **{"data": str(words), "prune": {"samples": 4}},
            **{"tasks": "text_odd,text_ppl", "limit": 2, "floors": False},
        }
        (root / "study").write_text(json.dumps(values))

    settings = {"model": "of the command line", "recover": EXACT}
    makes = {
        **{"smaller": smaller, "stones": stones, "experts": experts, "study": study},
        "corpus": lambda: (root / "corpus").write_text("\n".join(tiny_words.CORPUS)),
        "settings": lambda: (root / "settings").write_text(json.dumps(settings)),
        "picture": lambda: folders.picture().save(root / "picture", "png"),
    }
    places = {
        **{"llava": folders.folder("llava"), "words": tiny_words.folder("text")},
        "pixels": tiny_pictures.folder("qwen2_5_vl"),
        "data": folders.write_llava_data(root / "data", count=12),
        **{name: root / name for name in makes},
        "stones": root / "stones.jsonl",
    }

    def filled(command):
        for name in re.findall(r"{(\w+)}", command):
            if name in makes and not places[name].exists():
                makes[name]()
        return shlex.split(command.format_map(places))

    return filled


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


@pytest.mark.parametrize("name", tiered(CASES, lambda name: name in FAST))
def test_a_verb_does_the_same(name, filled, card, tmp_path):
    if name == "quantize":
        pytest.importorskip("torchao")
    words = filled(CASES[name])
    for device in (CPU, card):
        run(words, tmp_path / device.type / "out", device)
    SAME[words[0]](tmp_path / card.type / "out", tmp_path / "cpu" / "out")


def test_all_losses_are_tried_and_the_table_in_the_docs_has_these_rows():
    tried = {part.partition("*")[2] or part for _, loss, _ in RECOVERED for part in loss.split("+")}
    assert tried == {"sft", "hidden", "cosine", *DIVERGENCES}
    assert re.findall(r"^\| `(.+?)` \| runs \|", PAGE.read_text(), re.MULTILINE) == [*TABLE]


@pytest.mark.slow
@pytest.mark.skipif(
    pretended_gpu.REASON is not None or torch.cuda.device_count() < 2,
    reason="needs two pretended cards (PRETENDED_GPUS=2)",
)
@pytest.mark.parametrize("name", TABLE)
def test_the_table_in_the_docs_is_what_verbs_do(name, filled, tmp_path):
    if name == "quantize":
        pytest.importorskip("torchao")
    words = filled(CASES[TABLE[name]])
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for place, device in (("cpu", CPU), ("first", first), ("second", second)):
        run(words, tmp_path / place, device)
    for place in ("first", "second"):
        SAME[words[0]](tmp_path / place, tmp_path / "cpu")
    end = "refused in one line"
    if name == "study":
        release_memory()
        with pretended_gpu.limit(ROOM, 0), suppress(SystemExit):
            cli.main([*words, "--out", str(tmp_path / "full"), "--device", str(first)])
        table = pd.read_parquet(tmp_path / "full" / "results.parquet")
        assert set(table["status"]) == {"failed"}
        assert table["failed"].str.contains("out of memory").all()
        end = "each cell says so, the others go on"
    else:
        release_memory()
        with pretended_gpu.limit(ROOM, 0):
            given = () if words[0] in PRINTS else ("--out", tmp_path / "full")
            assert "out of memory on cuda:0" in refused(*words, *given, "--device", first)
    assert f"| `{name}` | runs | same | same | {end} |" in PAGE.read_text().splitlines()


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
