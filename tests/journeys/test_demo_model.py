"""The demo model: built from the package index, loaded without slimvlm; the README's code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimvlm.data.samples import Question
from slimvlm.demo.build import build_demo
from slimvlm.demo.questions import TASKS
from slimvlm.evaluation.ask import answer
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import save
from slimvlm.scoring.score_model import score

pytestmark = pytest.mark.slow
README = Path(__file__).parents[2] / "README.md"

PLAIN = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
)
inputs = processor(text=[text], images=[Image.open(picture)], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
reply = processor.tokenizer.decode(
    output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True
)
assert "slimvlm" not in sys.modules
print(json.dumps(reply.strip()))
"""


def test_second_build_is_the_same_folder():
    assert build_demo() == build_demo()


def test_plain_transformers_says_the_same(tmp_path):
    model, processor = load("demo", "float32")
    anatomy = read_anatomy(model)
    plan = make_plan(anatomy, score(model, [], "random"), 0.1, "both")
    prune_(model, plan)
    save(model, processor, tmp_path / "small", plan)
    picture = tmp_path / "picture.png"
    TASKS["name"].load(1)[0].images[0].save(picture)
    asked = Question("q", "What is this?", ("",), (picture,))
    ours = answer(model, processor, [asked], 8)[0]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "small"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ours


def test_readme_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {})
    assert (tmp_path / "small" / "config.json").is_file()
    assert (tmp_path / "small" / "model.safetensors").is_file()
