"""Compress a vision-language model, and measure it on a task of your own before and after.

    python examples/own_task.py --model llava-hf/llava-1.5-7b-hf --out runs/own-task

The task is to name the colour of a shape. The example draws the pictures: some for conversations
to learn from, others for questions that the model is asked. Replace `draw` by pictures of yours.
"""

import argparse
import json
import random
import shlex
import subprocess
from pathlib import Path

from PIL import Image, ImageDraw

TASK = """\
name: shape_colour
data: questions.jsonl
prompt: "what color is the {shape}?"
answer: colour
chance: 20
metric: exact_match
"""
COLOURS = ("red", "green", "blue", "yellow", "black")


def draw(path: Path, shape: str, colour: str) -> None:
    """Draw a shape somewhere on a light background, 64 x 64 pixels."""
    picture = Image.new("RGB", (64, 64), "#ececec")
    left, top = random.choice((2, 34)), random.choice((2, 34))
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((left, top, left + 27, top + 27), fill=colour)
    else:
        pen.rectangle((left, top, left + 27, top + 27), fill=colour)
    picture.save(path)


def write_data(folder: Path, conversations: int, questions: int) -> None:
    """Write pictures, conversations.jsonl to learn from, questions.jsonl and the task."""
    random.seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(conversations + questions):
        shape, colour = random.choice(("circle", "square")), random.choice(COLOURS)
        draw(folder / f"{number}.png", shape, colour)
        rows.append({"image": f"{number}.png", "shape": shape, "colour": colour})
    with (folder / "conversations.jsonl").open("w") as file:
        for row in rows[:conversations]:
            asked = [
                {"type": "image", "image": row["image"]},
                {"type": "text", "text": f"what color is the {row['shape']}?"},
            ]
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": row["colour"]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    lines = [json.dumps(row) + "\n" for row in rows[conversations:]]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "task.yaml").write_text(TASK)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="folder, hub id or demo")
parser.add_argument("--out", type=Path, default=Path("runs/own-task"), help="for all results")
parser.add_argument("--short", action="store_true", help="few samples and questions, no training")
options = parser.parse_args()

data, small = options.out / "data", options.out / "small"
write_data(data, *((12, 8) if options.short else (400, 100)))
command = f"slimvlm compress {options.model} --ratio 0.2 --data {data}/conversations.jsonl"
command += f" --tasks {data}/task.yaml --out {small}"
if options.short:
    command += " --axis depth --samples 8 --test-samples 4 --repair none --train none"
print(f"$ {command}", flush=True)
subprocess.run(shlex.split(command), check=True)
print((small / "summary.md").read_text())
