"""What older transformers find in the files of a checkpoint."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import auto_class
from slimvlm.models.parts import text_config_of
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.layout import LAYOUTS, layout_of, write_processor
from slimvlm.pruning.save import save
from tests import tiny, tiny_folder, tiny_words
from tests.handmade import in_python, logits, random_scores

TABLE = yaml.safe_load(Path(__file__).with_name("layouts.yaml").read_text())
FAMILIES = [name for row in TABLE["families"] for name in row]
ONLY_5, VERSIONS = TABLE["only_5"], TABLE["versions"]
READ = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
assert transformers.__version__ == sys.argv[1], transformers.__version__
def read(work):
    inputs = load_file(work + "/inputs.safetensors")
    sees = any(name.startswith("pixel") for name in inputs)
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(work + "/out", output_loading_info=True)
    problems = {kind: found for kind, found in report.items() if found}
    assert not problems, problems
    with torch.no_grad():
        found = model.eval()(**inputs, use_cache=False).logits
    save_file({"logits": found}, work + f"/{sys.argv[1]}.safetensors")

for work in sys.argv[2:]:
    try:
        read(work)
    except Exception as error:
        print(work, str(error)[-300:])
"""

SAY = """
import json, sys, warnings, transformers
from PIL import Image
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
TEXTS = ["What is <image> shown here?", " žluťoučký 你好 <|im_end|>\\n\\tx  ", "<s>a</s> <pad>"]
def said(folder):
    words = transformers.AutoTokenizer.from_pretrained(folder)
    found = {"ids": [sorted(words(text).items()) for text in TEXTS]}
    found["vocabulary"] = words.get_vocab()
    found["special"] = sorted(words.all_special_tokens)
    found["named"] = {name: getattr(words, name, None) for name in (
        "bos_token", "eos_token", "pad_token", "image_token", "video_token", "context_image_token")}
    processor = transformers.AutoProcessor.from_pretrained(folder)
    if hasattr(processor, "image_processor"):
        parts = [{"type": "image"}, {"type": "text", "text": "What is shown here?"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
        found["picture"] = inputs["input_ids"].tolist()
    return found

if __name__ == "__main__":
    print("SAID" + json.dumps([transformers.__version__, [said(f) for f in sys.argv[1:]]]))
"""


def with_other_rotary(name):
    """A tiny model whose rotary base is not what versions take where a field is missing."""
    model = tiny.build(name)
    config = copy.deepcopy(model.config)
    rope = getattr(text_config_of(config), "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    for number, part in enumerate(part for part in parts if "rope_theta" in part):
        part["rope_theta"] = 500.0 + number
    again = auto_class(config).from_config(config, dtype=torch.float32).eval()
    again.load_state_dict(model.state_dict())
    return again


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """Every family, pruned and written, with its inputs and logits."""
    written = {}
    for name in (*FAMILIES, *ONLY_5):
        model, work = with_other_rotary(name), tmp_path_factory.mktemp(name)
        shape = read_anatomy(model)
        prune_(model, make_plan(shape, random_scores(shape), 0.3, "both"))
        batch = tiny.batch(model)
        batch.pop("token_type_ids", None)  # PaliGemma: each version reads it in its own way
        # older Qwen classes look for pictures after this token
        if hasattr(model.config, "vision_start_token_id"):
            batch["input_ids"][:, 1] = model.config.vision_start_token_id
        written[name] = work, logits(model, batch)
        older = {"labels", "mm_token_type_ids"}  # of no use there, or not known
        batch = {key: value for key, value in batch.items() if key not in older}
        save(model, None, work / "out")
        save_file(batch, work / "inputs.safetensors")
    return written


def packages(version, pytestconfig):
    """A folder with an older transformers, to stand before the newest; kept between runs."""
    folder = pytestconfig.cache.mkdir(f"transformers-{version}")
    done = folder / "done"
    with FileLock(str(folder) + ".lock"):  # tests share it, in several processes
        if not done.exists():
            wanted = (f"transformers=={version}", *VERSIONS[version])
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
            pip += ["--target", str(folder), *wanted]
            run = subprocess.run(pip, capture_output=True, text=True, check=False)
            if run.returncode:
                pytest.skip(f"transformers {version} cannot be installed: {run.stderr[-200:]}")
            done.touch()
    return folder


def differences(version, works, pytestconfig):
    """How far a version's logits are off; infinitely where it does not load a folder cleanly."""
    folders = [str(work) for work, _ in works.values()]
    older = {**os.environ, "PYTHONPATH": str(packages(version, pytestconfig))}
    print(in_python(READ, version, *folders, env=older))
    found = {}
    for name, (work, expected) in works.items():
        written = work / f"{version}.safetensors"
        logits_there = load_file(written)["logits"] if written.exists() else torch.tensor(torch.inf)
        found[name] = float((logits_there - expected).abs().max())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_older_transformers_reads_the_same_model(version, works, pytestconfig):
    works = {n: work for n, work in works.items() if n in FAMILIES or version[0] == "5"}
    found = differences(version, works, pytestconfig)
    assert {name: value for name, value in found.items() if value > 1e-4} == {}


@pytest.mark.slow
def test_what_4_57_is_not_named_for_it_does_not_read(works, pytestconfig):
    found = differences("4.57.6", {name: works[name] for name in ONLY_5}, pytestconfig)
    assert {name: value for name, value in found.items() if not value > 1e-3} == {}


def said_by(folders, path=None):
    """A version of transformers, and what tokenizers and processors give there."""
    there = in_python(SAY, *folders, env={**os.environ, "PYTHONPATH": str(path or "")})
    return json.loads(there.partition("SAID")[2])


@pytest.mark.slow
def test_older_transformers_reads_the_same_tokens(tmp_path, pytestconfig):
    made = {kind: tiny_folder.processor(kind) for kind in tiny_folder.KINDS}
    made |= {f"words-{n}": tiny_words.tokenizer(kind) for n, kind in enumerate(tiny_words.KINDS)}
    for name, processor in made.items():
        model = tiny_folder.KINDS.get(name, tiny_folder.KINDS["text"]).make()[0]
        model.save_pretrained(tmp_path / name)
        write_processor(processor, tmp_path / name)
    folders = [str(tmp_path / name) for name in made]
    _, expected = said_by(folders)
    for version in VERSIONS:
        found = said_by(folders, packages(version, pytestconfig))
        assert found == [version, expected]


@pytest.mark.parametrize("kind", tiny_folder.KINDS)
def test_the_newest_reads_tokenizers_as_if_it_had_written_them(kind, tmp_path):
    processor = tiny_folder.processor(kind)
    for name in ("ours", "theirs"):
        tiny_folder.KINDS[kind].make()[0].save_pretrained(tmp_path / name)
    write_processor(processor, tmp_path / "ours")
    processor.save_pretrained(tmp_path / "theirs")
    read = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    assert type(read[0]) is type(read[1])
    assert read[0].backend_tokenizer.to_str() == read[1].backend_tokenizer.to_str()
    where = ("_tokenizer", "init_kwargs", "name_or_path")
    ours, theirs = ({k: v for k, v in vars(words).items() if k not in where} for words in read)
    assert ours == theirs


def test_every_row_is_tested():
    tested = {tiny.CONFIGS[name]().model_type: "4.57" for name in FAMILIES}
    tested |= {tiny.CONFIGS[name]().model_type: "5.0" for name in ONLY_5}
    assert tested == {kind: row.since for kind, row in LAYOUTS.items()}


def test_the_newest_reads_the_layout_too(tmp_path):
    model = tiny.build("llava-llama")
    save(model, None, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in names)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, None)


@pytest.mark.parametrize("name", ["llava-pixtral", "llava-gemma2", "gemma4"])
def test_what_no_older_version_reads_is_written_as_transformers_does(name, tmp_path):
    model = tiny.build(name)
    assert layout_of(model.config) is None
    save(model, None, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert "is not known" in (tmp_path / "ours" / "README.md").read_text()
