"""Compare fewer layers with narrower layers at two ratios: a study of four cells.

    python examples/study_two_axes.py --model MODEL --data mix.json --images coco/

Each cell is pruned, recovered, evaluated on tasks and written into one table. A study that was
stopped goes on when it is started again; a longer list of ratios runs only what is new. For an
estimate of the time, add --dry-run to the command `slimvlm study` that is printed.
"""

import argparse
import shlex
import subprocess
from pathlib import Path

import pandas as pd

STUDY = """\
data: {data}
images: {images}
training_samples: 192
prune: {{samples: 64}}
recover: {{batch_size: 2}}
recoveries:
  distil: {{train: full, loss: sft+hidden}}
tasks: {tasks}
limit: 20
grids:
  - model: {model}
    axis: [depth, width]
    ratio: [0.15, 0.30]
    recovery: distil
"""
SHORT = """\
data: {data}
prune: {{samples: 4}}
tasks: name
limit: 2
floors: false
grids:
  - {{model: {model}, axis: depth, ratio: [0.15, 0.30], repair: none}}
  - {{model: {model}, axis: width, ratio: [0.15, 0.30], repair: none, criterion: flap}}
"""


def run(command: str) -> None:
    """Print a command and run it; stop if it fails."""
    print(f"$ {command}", flush=True)
    subprocess.run(shlex.split(command), check=True)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="folder, hub id or demo")
parser.add_argument("--data", default="demo", help="conversations to prune and train with")
parser.add_argument("--images", default="null", help="folder of their pictures")
parser.add_argument("--tasks", default="demo", help="tasks by name, or YAML files")
parser.add_argument("--out", type=Path, default=Path("runs/two-axes"), help="for all results")
parser.add_argument("--short", action="store_true", help="no training, two questions")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

file = options.out / "study.yaml"
file.write_text((SHORT if options.short else STUDY).format(**vars(options)))
run(f"slimvlm study {file} --out {options.out}")
run(f"slimvlm report {options.out} --out {options.out}/report.html")

table = pd.read_parquet(options.out / "results.parquet")
print(table[["axis", "ratio", "avg", "avg_percent", "backbone_params"]].to_string(index=False))
