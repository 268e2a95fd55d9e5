"""Compress a text model with conversations of your own, then ask both models.

    python examples/text_jsonl.py --model Qwen/Qwen3-0.6B --data mine.jsonl --out runs/text

Each line of the data holds a conversation, a list of messages with role and content:
{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}

Without --data the example writes conversations about Python's standard library. Without --model it
takes the language model of the demo, SmolLM2-135M. --short shows every step in little time.
"""

import argparse
import importlib
import inspect
import json
import shlex
import subprocess
from pathlib import Path

MODULES = ("argparse", "asyncio", "csv", "functools", "logging", "os", "random", "statistics")


def run(command: str) -> None:
    """Print a command and run it; stop if it fails."""
    print(f"$ {command}", flush=True)
    subprocess.run(shlex.split(command), check=True)


def write_conversations(path: Path) -> None:
    """Write a conversation about every function and class of some modules."""
    with path.open("w") as file:
        for module in map(importlib.import_module, MODULES):
            for name in module.__all__:
                value = getattr(module, name)
                if callable(value) and (text := inspect.getdoc(value)):
                    question = f"What does Python say about {module.__name__}.{name}?"
                    answer = text.split("\n\n")[0]
                    messages = [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                    file.write(json.dumps({"messages": messages}) + "\n")


def write_language_model(folder: Path) -> None:
    """Write the language model of the demo as a text model of its own."""
    from transformers import AutoModelForCausalLM

    import slimvlm as sv

    demo, processor = sv.load("demo", device="cpu")
    model = AutoModelForCausalLM.from_config(demo.config.text_config)
    model.model.load_state_dict(demo.model.language_model.state_dict())
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder or hub id of a text model")
parser.add_argument("--data", help="conversations as JSONL")
parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder for all results")
parser.add_argument("--short", action="store_true", help="few samples, no training")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

data = options.data or options.out / "conversations.jsonl"
if options.data is None:
    write_conversations(data)
model = options.model or options.out / "model"
if options.model is None:
    write_language_model(model)

small, reply = options.out / "small", "--max-new-tokens 64"
command = f"slimvlm compress {model} --ratio 0.2 --data {data} --out {small}"
if options.short:
    command += " --axis depth --samples 8 --test-samples 4 --repair none --train none"
    reply = "--max-new-tokens 8"
run(command)
run(f"slimvlm chat {small} 'What does Python say about random.shuffle?' --other {model} {reply}")
