"""Every verb that runs a model gives the same on the card as on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from slimvlm import cli
from slimvlm.core.options import DIVERGENCES
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE
from slimvlm.runs import cost
from slimvlm.runs.compress import read_times
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.training import recover as recovery
from tests import tiny, tiny_words
from tests import tiny_folder as folders
from tests.gpu.alike import ROUNDING, assert_close
from tests.runs.study.study_files import RECOVER, RECOVERIES, stable

pytestmark = pytest.mark.usefixtures("unhurried")

TRAINING = (
    *("--max-steps", "3", "--batch-size", "2", "--learning-rate", "1e-3", "--lora-rank", "4"),
    *("--config", str(Path(__file__).with_name("training.yaml"))),
)
FAST = ("obs", "taylor", "block_influence")
"""Criteria of the default tier: one of each way to collect."""
Twice = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def llava() -> str:
    return str(folders.folder("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.write_llava_data(tmp_path_factory.mktemp("data"), count=12))


@pytest.fixture(scope="module")
def smaller(llava: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pruned checkpoint, written on the CPU."""
    out = str(tmp_path_factory.mktemp("models") / "smaller")
    given = ("--axis", "both", "--ratio", "0.3", "--criterion", "block_influence", "magnitude")
    given = (*given, "--data", data, "--samples", "2", "--device", "cpu")
    cli.main(["prune", llava, "--out", out, *given])
    return out


@pytest.fixture
def twice(card: torch.device, tmp_path: Path) -> Twice:
    """Run a verb on the CPU and on the card."""

    def runs(*arguments: str, out: str = "out") -> tuple[Path, Path]:
        places = [tmp_path / device / out for device in ("cpu", card.type)]
        for place, device in zip(places, ("cpu", card.type), strict=True):
            place.parent.mkdir(exist_ok=True)
            on_card(card, device, [*arguments, "--out", str(place)])
        return places[0], places[1]

    return runs


def on_card(card: torch.device, device: str, arguments: Sequence[str]) -> None:
    """Run a verb on a device; what is asked to run on the card must have used its memory."""
    before = 0
    if card.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
    cli.main([*arguments, "--device", device])
    if card.type == "cuda":
        assert (torch.cuda.max_memory_allocated() > before) == (device == card.type)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """The same units stay, in weights that differ by rounding at most."""
    if (expected / PLAN_FILE).exists():
        assert Plan.load(found / PLAN_FILE) == Plan.load(expected / PLAN_FILE)
    assert_close(weights_in(found), weights_in(expected))


def assert_same_on_data(found: Path, expected: Path) -> None:
    ours, theirs = DataResult.load(found).samples, DataResult.load(expected).samples
    assert [sample.id for sample in ours] == [sample.id for sample in theirs]
    for name in ("loss", "baseline_loss", "same", "divergence"):
        one, other = ([getattr(sample, name) or 0 for sample in each] for each in (ours, theirs))
        assert one == pytest.approx(other, rel=ROUNDING, abs=1e-6)


def assert_same_run(found: Path, expected: Path) -> None:
    """Two run folders of compress: plan, checkpoint, losses of every step and of the end."""
    assert Plan.load(found / "plan.json") == Plan.load(expected / "plan.json")
    assert_same_checkpoint(found / "checkpoint", expected / "checkpoint")
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
        assert_same_on_data(found / "results" / name, expected / "results" / name)


COMPRESSED = {
    "width": ("--axis", "width", "--train", "projector", "--loss", "sft", "--local-steps", "2"),
    "depth": ("--axis", "depth", "--train", "lora", "--loss", "0.5*sft+0.5*kl"),
    "both": ("--axis", "both", "--train", "full", "--loss", "hidden"),
    "auto": ("--train", "lora", "--loss", "sft+hidden"),
    "no training": ("--axis", "width", "--train", "none", "--tasks", "presence", "--limit", "2"),
}


@pytest.mark.parametrize(
    "how", ["width", *(pytest.param(n, marks=pytest.mark.slow) for n in [*COMPRESSED][1:])]
)
def test_compress(how: str, llava: str, data: str, twice: Twice) -> None:
    given = ("--data", data, "--samples", "4", "--ratio", "0.3")
    training = () if how == "no training" else TRAINING
    here, there = twice("compress", llava, *given, *COMPRESSED[how], *training)
    assert_same_run(there, here)


@pytest.fixture(scope="module")
def stones(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations without pictures, each with other words."""
    path = tmp_path_factory.mktemp("stones") / "data.jsonl"
    asked = [(f"How wide are {n} stones?", f"They are {n * n} wide.") for n in range(30)]
    rows = [
        [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        for said, reply in asked
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["compress", "prune"])
def test_fewer_tokens(verb: str, stones: str, tmp_path: Path, twice: Twice) -> None:
    text = tmp_path / "some.txt"
    text.write_text("\n".join(tiny_words.CORPUS))
    given = ("--vocab-size", "500", "--vocab-text", str(text), "--data", stones)
    given = (*given, "--ratio", "0.3", "--axis", "width", "--samples", "4")
    model = str(tiny_words.folder("text"))
    if verb == "prune":
        here, there = twice("prune", model, *given)
        assert_same_checkpoint(there, here)
    else:
        learning = ("--train", "lora", "--loss", "0.5*sft+0.5*kl", *TRAINING)
        here, there = twice("compress", model, *given, *learning)
        assert_same_run(there, here)


@pytest.mark.slow
def test_fewer_experts(stones: str, tmp_path: Path, twice: Twice) -> None:
    config = tiny.CONFIGS["qwen3_moe"]()
    config.vocab_size = folders.VOCAB
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    folders.processor("text").save_pretrained(tmp_path / "model")
    given = ("--experts", "0.5", "--ratio", "0.3", "--data", stones, "--samples", "4")
    learning = ("--train", "lora", "--loss", "0.5*sft+0.5*kl", *TRAINING)
    here, there = twice("compress", str(tmp_path / "model"), *given, *learning)
    assert_same_run(there, here)


@pytest.mark.parametrize(
    "memory", [(), ("--low-memory",), pytest.param(("--axis", "depth"), marks=pytest.mark.slow)]
)
def test_prune(memory: tuple[str, ...], llava: str, data: str, twice: Twice) -> None:
    given = ("--ratio", "0.3", "--data", data, "--samples", "4", "--local-steps", "2")
    here, there = twice("prune", llava, *given, *memory)
    assert_same_checkpoint(there, here)
    assert_same_on_data(there / "slimvlm_held_out.json", here / "slimvlm_held_out.json")


@pytest.mark.slow
def test_prune_from_a_plan(llava: str, smaller: str, twice: Twice) -> None:
    here, there = twice("prune", llava, "--plan", str(Path(smaller) / PLAN_FILE))
    assert_same_checkpoint(there, here)


OF_WIDTHS = [name for name in CRITERIA if name not in ("frequency", "reap")]
"""Criteria that score a model without experts."""
SCORED = [
    *((name, ()) for name in OF_WIDTHS),
    *(
        (name, ("--low-memory",))
        for name in OF_WIDTHS
        if CRITERIA[name].needs_data and not CRITERIA[name].capture.backward
    ),
]


@pytest.mark.parametrize(
    ("criterion", "memory"),
    [
        pytest.param(
            *case,
            id=" ".join([case[0], *case[1]]),
            marks=()
            if case[0] in FAST and bool(case[1]) == (case[0] == "block_influence")
            else slow,
        )
        for slow in [pytest.mark.slow]
        for case in SCORED
    ],
)
def test_score(
    criterion: str, memory: tuple[str, ...], llava: str, tmp_path: Path, twice: Twice
) -> None:
    data = folders.write_llava_data(tmp_path / "data", count=4)
    given = ("--data", str(data), "--samples", "4", "--criterion", criterion)
    here, there = twice("score", llava, *given, *memory)
    theirs, ours = (load_file(out.with_suffix(".safetensors")) for out in (here, there))
    assert_close(ours, theirs)


RECOVERED = [
    ("projector", "sft", ()),
    ("lora", "0.5*sft+0.5*kl", ()),
    ("lora", "jsd", ()),
    ("lora", "sft+hidden", ("--paper-exact", "--keep-adapter")),
    ("full", "hidden+cosine", ()),
    ("full", "0.5*sft+0.5*rkl", ("--fraction", "0.75")),
    ("lora", "sft+kl", ("--gradient-checkpointing",)),
]
"""Each way to learn, each loss, a teacher that shares and one that does not."""


@pytest.mark.parametrize(
    ("train", "loss", "more"),
    [
        pytest.param(*case, marks=() if case[1] in ("0.5*sft+0.5*kl",) else (pytest.mark.slow,))
        for case in RECOVERED
    ],
)
def test_recover(
    train: str, loss: str, more: tuple[str, ...], llava: str, smaller: str, data: str, twice: Twice
) -> None:
    teacher = () if loss == "sft" else ("--teacher", llava)
    given = ("--data", data, *teacher, "--train", train, "--loss", loss, *more)
    here, there = twice("recover", smaller, *given, *TRAINING)
    assert_same_checkpoint(there, here)


def test_all_losses_are_tried() -> None:
    tried = {part.partition("*")[2] or part for _, loss, _ in RECOVERED for part in loss.split("+")}
    assert tried == {"sft", "hidden", "cosine", *DIVERGENCES}


@pytest.mark.slow
def test_recover_after_a_stop(
    card: torch.device,
    llava: str,
    smaller: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that goes on ends where one that nobody stopped does."""
    given = ("--data", data, "--teacher", llava, "--train", "lora", "--loss", "0.5*sft+0.5*kl")
    given = ("recover", smaller, *given, *TRAINING)
    expected, found = tmp_path / "whole", tmp_path / "stopped"
    on_card(card, card.type, [*given, "--out", str(expected)])
    honest = recovery.DistillationTrainer.training_step

    def stops(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return honest(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(recovery.DistillationTrainer, "training_step", stops)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            on_card(card, card.type, [*given, "--out", str(found)])
    assert not found.exists()
    on_card(card, card.type, [*given, "--out", str(found)])
    assert_same_checkpoint(found, expected)


@pytest.mark.parametrize("more", [(), pytest.param(("--floors",), marks=pytest.mark.slow)])
def test_evaluate(more: tuple[str, ...], llava: str, twice: Twice) -> None:
    tasks = "presence,text_odd,text_ppl"
    here, there = twice("evaluate", llava, "--tasks", tasks, "--limit", "2", *more, out="r.json")
    ours, theirs = Result.load(there).tasks, Result.load(here).tasks
    assert [ours[name].replies for name in theirs] == [theirs[name].replies for name in theirs]
    for name, task in theirs.items():
        assert ours[name].scores == pytest.approx(task.scores, rel=ROUNDING)


@pytest.mark.parametrize("beside", [False, True])
def test_evaluate_on_data(beside: bool, llava: str, smaller: str, data: str, twice: Twice) -> None:
    more = ("--baseline", llava) if beside else ()
    assert_same_on_data(*twice("evaluate", smaller, "--data", data, *more, out="r.json"))


def test_chat_and_compare(
    card: torch.device, llava: str, smaller: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.picture().save(tmp_path / "picture.png")
    shown = ("--image", str(tmp_path / "picture.png"), "--max-new-tokens", "4", "--json")
    told = []
    for device in ("cpu", card.type):
        on_card(card, device, ["chat", llava, "Which colour?", "--other", smaller, *shown])
        on_card(card, device, ["compare", llava, smaller, "--tasks", "presence", "--limit", "2"])
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


@pytest.mark.slow
def test_bench(
    card: torch.device, llava: str, smaller: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times differ; what is counted does not."""
    given = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--json")
    told = []
    for device in ("cpu", card.type):
        on_card(card, device, ["bench", smaller, "--baseline", llava, *given])
        told.append(json.loads(capsys.readouterr().out))
    assert told[0].keys() == told[1].keys()


@pytest.mark.slow
def test_study(tmp_path: Path, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "device_flops", lambda *_: 1e9)  # a minute on a pretended card
    words = folders.write_llava_data(tmp_path / "words", pictures=False)
    cells = {"model": str(folders.folder("text")), "ratio": 0.4, "axis": ["depth", "width"]}
    values = {
        "grids": [{**cells, "recovery": "sft+hidden"}],
        "recoveries": {"sft+hidden": RECOVERIES["sft+hidden"]},
        "recover": {**RECOVER, "lora": {"lora_dropout": 0.0}},
        **{"data": str(words), "prune": {"samples": 4}},
        **{"tasks": "text_odd,text_ppl", "limit": 2, "floors": False},
    }
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(values))
    tables = [stable(pd.read_parquet(out / "results.parquet")) for out in twice("study", str(file))]
    assert set(tables[0]["status"]) == {"done"}
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=ROUNDING)


@pytest.mark.slow
def test_quantize(smaller: str, twice: Twice) -> None:
    pytest.importorskip("torchao")
    assert_close(*map(weights_in, twice("quantize", smaller, "--backend", "torchao")))


def test_export_is_the_same_where_there_is_a_card(
    card: torch.device, smaller: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs no model on a device, and must not need one."""
    before = torch.get_device_module(card).memory_allocated()
    cli.main(["export", smaller, "--check", "vllm", "gguf", "--json"])
    assert {row["target"] for row in json.loads(capsys.readouterr().out)} == {"vllm", "gguf"}
    assert torch.get_device_module(card).memory_allocated() == before


@pytest.mark.slow
def test_a_quantiser_of_its_own_takes_the_device_that_is_named(
    card: torch.device, llava: str, data: str, tmp_path: Path
) -> None:
    """bitsandbytes takes the current card unless it is told of another device."""
    pytest.importorskip("bitsandbytes")
    out = str(tmp_path / "small")
    on_card(card, "cpu", ["quantize", llava, "--backend", "bitsandbytes", "--out", out])
    on_card(card, "cpu", ["evaluate", out, "--data", data, "--out", str(tmp_path / "r.json")])
