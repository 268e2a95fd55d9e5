"""Thousands of spoiled files: each is read as it is or refused in one line, and does nothing else.

What is spoiled: checkpoints, configurations, indices, tokenizers, templates, plans, studies, tasks,
results, scores and logs; most are given to the library, some to the command line.
Everything runs in this process.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from slimvlm import cli
from slimvlm.core.errors import SlimError
from slimvlm.data.chat import encode_samples
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import AnswerLog, answer
from slimvlm.evaluation.compare import compare, comparison_rows
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.evaluation.tasks import read_task
from slimvlm.models.load import anatomy, load, load_config, load_processor
from slimvlm.planning.plan import Plan
from slimvlm.runs.study.config import expand, read_study
from slimvlm.runs.tables import as_table, result_rows
from slimvlm.scoring.layerwise import open_checkpoint
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History
from tests import tiny_folder as folders
from tests.trust.spoiled import INDEX, WEIGHTS, divide, spoil, write_pickle

pytestmark = pytest.mark.slow

MAX_SECONDS, MAX_BYTES = 60, 2 * 2**30
MODEL = str(folders.folder("text"))
"""A good one."""


def peak_memory(forget=False):
    """The most bytes that this process had, which also ran other tests; Linux can forget that."""
    status = Path("/proc/self/status")
    if forget and status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_model(folder):
    load(folder)
    open_checkpoint(folder)


def use_words(folder):
    model, words = load(folder)
    answer(model, words, [Question("q", "Which colour?", ("red",))], 2)


def make_model(folder):
    shutil.copytree(folders.folder("text"), folder, dirs_exist_ok=True)
    write_pickle(folder / "marked.bin", folder.parent / "marked")


def make_divided(folder):
    make_model(folder)
    divide(folder, "a.safetensors", "b.safetensors")


def make_seeing(folder):
    shutil.copytree(folders.folder("llava"), folder, dirs_exist_ok=True)


def use_pictures(folder):
    anatomy(folder)
    words = load_processor(str(folder), load_config(folder))
    encode_samples(words, folders.short_samples(1))


def make_template(folder):
    make_model(folder)
    template = folder / "chat_template.jinja"
    if not template.exists():
        template.write_text(folders.TEXT_CHAT)


def make_plan(folder):
    Plan.everything(anatomy(folders.folder("text"))).save(folder / "plan.json")


def use_plan(folder):
    plan = Plan.load(folder / "plan.json")
    _ = plan.summary(), plan.after, plan.ratio, plan.file_format, plan.after.total_params


def make_study(folder):
    folders.write_llava_data(folder, count=16, pictures=False)
    grid = {"model": MODEL, "ratio": [0.2, 0.4], "axis": "depth", "prune": {"samples": 8}}
    values = {
        **{"grids": [grid | {"seed": [0, 1]}], "data": str(folder / "data.json")},
        "recoveries": {"short": {"train": "lora", "loss": "sft", "max_steps": 3}},
        **{"tasks": "demo", "limit": 4, "resources": {"cpus": 1, "gpus": 0.5}},
        "reference": {"source": "a paper", "rows": [{"retention": 90.0, "ratio": 0.2}]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(values))


def make_result(folder):
    RESULT.save(folder / "result.json")
    groups, neurons = ([torch.rand(2), torch.rand(3)] for _ in range(2))
    Scores("magnitude", torch.rand(2), groups, neurons).save(folder / "scores")
    (folder / "rows.jsonl").write_text('{"id": "a", "q": "Why?", "a": "so", "c": ["so", "no"]}\n')
    values = {"name": "own", "data": "rows.jsonl", "prompt": "{q} {{x}}", "answer": "a"}
    more = {"choices": "c", "by_likelihood": True, "chance": 50, "metric": "exact_match"}
    (folder / "task.yaml").write_text(yaml.safe_dump(values | more))


def use_task(folder):
    task = read_task(folder / "task.yaml")
    questions = task.load(None)
    AnswerLog(folder / "logs", task.name, "key").add(questions, ["reply"] * len(questions))


ANSWERED = TaskResult(
    "exact_match", 50.0, 25.0, True, ("a", "b"), ("r", "s"), (1.0, 0.0), {"f1": 1.0}, 50.0
)
ASKED = [Question(str(i), "Why?", ("so",)) for i in range(3)]
RESULT = Result("model", 1000, 800, {"one": ANSWERED, "two": ANSWERED}, 1.0, 2.0)


def use_result(folder):
    result = Result.load(folder / "result.json")
    results = {"baseline": RESULT, "model": result}
    as_table(*result_rows(results), title=result.model)
    result.retention(RESULT)
    comparison_rows(compare(RESULT, result, {}))


def make_log(folder):
    AnswerLog(folder, "own", "key").add(ASKED, ["reply"] * 3)
    rows = ({"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0})
    history = History(steps=rows, num_samples=4, sample_ids=("a", "b"), trained_params=10)
    (folder / "history.json").write_text(json.dumps(asdict(history)))


class Target(NamedTuple):
    """A folder with a file to spoil, and what reads it."""

    make: Callable[[Path], None]
    file: str
    use: Callable[[Path], Any]
    count: int


TARGETS = {
    "config": Target(make_model, "config.json", use_model, 350),
    "index": Target(make_divided, INDEX, use_model, 150),
    "weights": Target(make_model, WEIGHTS, use_model, 150),
    "generation": Target(make_model, "generation_config.json", use_words, 100),
    "tokenizer": Target(make_model, "tokenizer.json", use_words, 60),
    "tokenizer settings": Target(make_model, "tokenizer_config.json", use_words, 100),
    "seeing": Target(make_seeing, "config.json", use_pictures, 120),
    "pictures": Target(make_seeing, "processor_config.json", use_pictures, 100),
    "template": Target(make_template, "chat_template.jinja", use_words, 80),
    "plan": Target(make_plan, "plan.json", use_plan, 300),
    "study": Target(make_study, "study.yaml", lambda f: expand(read_study(f / "study.yaml")), 300),
    "task": Target(make_result, "task.yaml", use_task, 300),
    "result": Target(make_result, "result.json", use_result, 250),
    "scores": Target(make_result, "scores.json", lambda f: Scores.load(f / "scores"), 100),
    "history": Target(make_log, "history.json", lambda f: History.load(f / "history.json"), 60),
    "log": Target(make_log, "own-key.jsonl", lambda f: AnswerLog(f, "own", "key"), 60),
}


def test_there_are_two_thousand():
    assert sum(target.count for target in TARGETS.values()) >= 2000


@contextmanager
def limited():
    """Inside, nothing takes longer than a minute."""

    def stop(*_):
        raise TimeoutError(f"more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(use, folder):
    """What is wrong with how it ended; nothing if it worked or was refused in one line."""
    try:
        with limited():
            use(folder)
    except SlimError as error:
        told = str(error)
        return "" if "\n" not in told and len(told) < 2000 else f"not one line: {told[:300]}"
    except Exception as error:  # any other is what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def spoil_and_try(target, seeds, home, ended):
    """Spoil a file once for each seed, and see that nothing but its use happens.

    ``ended`` says what is wrong with how a use of the folder ended; nothing if it ended well.
    """
    good, place, working = home / "good", home / "work" / "model", home / "working"
    for folder in (good, place, working):
        folder.mkdir(parents=True)
    target.make(good)
    shutil.copytree(good, place, dirs_exist_ok=True)
    os.chdir(working)
    assert ended(place) == ""
    content, wrong, slowest = (good / target.file).read_bytes(), [], 0.0
    before = peak_memory(forget=True)
    for seed in seeds:
        (place / target.file).write_bytes(content)
        spoil(place / target.file, random.Random(seed))
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = ended(place)
        slowest = max(slowest, time.monotonic() - start)
        wrong += [f"{seed}: {said}"] if said else []
        assert not list(home.rglob("marked")), f"{seed} ran code"
        assert {p.name for p in home.iterdir()} == {"good", "work", "working"}, seed
        assert {p.name for p in place.parent.iterdir()} == {"model"}, seed
        assert not list(working.iterdir()), seed
    assert not wrong, f"{len(wrong)} of {len(seeds)}: " + "\n".join(wrong[:20])
    assert slowest < MAX_SECONDS
    assert peak_memory() - before < MAX_BYTES


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder; whoever leaves the working folder comes back at the end."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TARGETS)
def test_a_spoiled_file_is_read_or_refused(name, home):
    target = TARGETS[name]
    seeds = [f"{name} {seed}" for seed in range(target.count)]
    spoil_and_try(target, seeds, home, lambda folder: outcome(target.use, folder))


CHAT = "chat {folder} Colour? --max-new-tokens 2"
COMMANDS = {
    **dict.fromkeys(("config", "index", "weights", "generation", "tokenizer"), CHAT),
    **{"tokenizer settings": CHAT, "template": CHAT, "seeing": "inspect {folder}"},
    "plan": "prune {model} --plan {folder}/plan.json --out {folder}/out --force",
    "study": "study {folder}/study.yaml --out {folder}/out --dry-run",
    "task": "evaluate {model} --tasks {folder}/task.yaml --log {folder}/logs",
    "result": "evaluate {model} --tasks {folder}/task.yaml --baseline {folder}/result.json",
    "scores": "plan {model} --scores {folder}/scores --ratio 0.3 --out {folder}/plan.json --force",
}
"""A command for each kind of file that has one."""
OF_A_COMMAND = 15


def ended_in(command, folder, capfd):
    code = 0
    try:
        with limited():
            cli.main(command.format(model=MODEL, folder=folder).split())
    except SystemExit as end:
        code = end.code
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    said = capfd.readouterr().err
    *_, last = said.splitlines() or [""]
    errors = 0 if code == 0 else 1
    if code in (0, 2) and said.count("slimvlm: ") == last.startswith("slimvlm: ") == errors:
        return ""
    return f"code {code}: {said[-300:]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_well_or_in_one_line(name, home, capfd):
    seeds = [f"command {name} {seed}" for seed in range(OF_A_COMMAND)]
    spoil_and_try(TARGETS[name], seeds, home, lambda at: ended_in(COMMANDS[name], at, capfd))
