"""Export a compressed model as GGUF for Ollama, and ask it with llama.cpp.

    pip install 'slimvlm[gguf]' xllamacpp
    python examples/gguf_ollama.py --model runs/small/checkpoint --out runs/gguf
    ollama run slim

A model that sees gets a second file, mmproj-model.gguf, where llama.cpp can convert its tower.
"""

import argparse
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader

# How ChatML (Qwen, SmolLM, InternVL ...) is written for Ollama. Without a TEMPLATE Ollama looks for
# one of its own that fits the chat template in the GGUF file.
CHATML = '''\
TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
PARAMETER stop <|im_end|>
'''

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="folder of a checkpoint, or demo")
parser.add_argument("--original", help="the original, if the model lost tokens")
parser.add_argument("--out", type=Path, default=Path("runs/gguf"), help="folder for all files")
parser.add_argument("--name", default="slim", help="name of the model in Ollama")
parser.add_argument("--short", action="store_true", help="a short reply")
options = parser.parse_args()


def run(command: str, folder: Path | None = None) -> None:
    """Print a command and run it; stop if it fails."""
    print(f"$ {command}", flush=True)
    subprocess.run(shlex.split(command), check=True, cwd=folder)


# 1. The GGUF file, in 8 bits a weight.
options.out.mkdir(parents=True, exist_ok=True)
file, pictures = options.out / "model.gguf", options.out / "mmproj-model.gguf"
pictures.unlink(missing_ok=True)  # of a model before
of = f" --original {options.original}" if options.original else ""
run(f"slimvlm export {options.model} --out {file} --outtype q8_0 --force{of}")

# 2. The Modelfile; its paths start from its own folder.
template = GGUFReader(file).get_field("tokenizer.chat_template")
lines = f"FROM ./{file.name}\n"
lines += f"FROM ./{pictures.name}\n" if pictures.exists() else ""
lines += CHATML if template and "<|im_end|>" in template.contents() else ""
lines += "PARAMETER temperature 0\nPARAMETER num_ctx 2048\n"
(options.out / "Modelfile").write_text(lines)
print(lines)

# 3. The model in Ollama.
if shutil.which("ollama"):
    run(f"ollama create {options.name} -f Modelfile", options.out)
else:
    print(f"ollama is not installed; with it: ollama create {options.name} -f Modelfile")

# 4. llama.cpp, on which Ollama builds, answers from the same file.
if find_spec("xllamacpp"):
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.mmproj.path = str(pictures) if pictures.exists() else ""
    settings.n_ctx = 2048
    messages = [{"role": "user", "content": "What is a llama?"}]
    asked = {"messages": messages, "max_tokens": 8 if options.short else 64, "temperature": 0}
    reply = xllamacpp.Server(settings).handle_chat_completions(asked)
    print("llama.cpp:", reply["choices"][0]["message"]["content"])
else:
    print("xllamacpp is not installed: the file is not tried")
