"""Compress a model from Python, step by step.

    python examples/python_api.py --model MODEL --data mix.json --images coco/

Each step can be looked at, changed or left out. One call does all of them:

    model, processor, run = sv.compress("demo", ratio=0.2, data="demo", out="runs/one-call")
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import slimvlm as sv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="folder, hub id or demo")
parser.add_argument("--data", default="demo", help="conversations")
parser.add_argument("--images", help="folder of their pictures")
parser.add_argument("--tasks", default="name,presence", help="tasks by name, or YAML files")
parser.add_argument("--out", type=Path, default=Path("runs/python"), help="the new checkpoint")
parser.add_argument("--short", action="store_true", help="few samples, one training step")
options = parser.parse_args()
few = 5 if options.short else 64

# Load the model, and look at its layers.
model, processor = sv.load(options.model)
anatomy = sv.anatomy(model)
print(anatomy.num_layers, "layers,", f"{anatomy.backbone_params:,} parameters in the backbone")

# Read conversations: the first ones for calibration, the last ones to evaluate on.
samples = sv.load_samples(options.data, options.images, limit=3 * few if options.short else None)
calibration, training, unseen = samples[:few], samples[few:-few], samples[-few:]
batches = list(sv.calibration_batches(processor, calibration))

# Score the layers, and plan which ones to keep. Nothing is changed yet.
scores = sv.score(model, batches, "block_influence")
plan = sv.make_plan(anatomy, scores, ratio=0.2, axis="depth")
print(plan.summary())

# Prune, and repair what remains. The original stays as the teacher.
teacher, _ = sv.load(options.model)
walked = sv.walk_(model, batches, plan=plan)
print(walked.summary())

# Train the smaller model towards its teacher: LoRA, one pass; a configuration says otherwise.
config = sv.RecoverConfig(batch_size=2, max_steps=1) if options.short else None
history = sv.recover(model, teacher, training, config, plan=walked.plan)
print(history.steps[-1])

# Evaluate: agreement with the original on unseen samples, and the score on tasks.
# The training used the first teacher up.
original, _ = sv.load(options.model)
figures = sv.evaluate_data(model, processor, unseen, original).figures
print(f"same next token as the original: {figures.agreement.value:.1f} %")
result = sv.evaluate(model, processor, options.tasks, limit=4 if options.short else None)
print("average of the tasks:", result.average)

# Save. Plain transformers loads the folder.
sv.save(model, processor, options.out, walked.plan)
model = AutoModelForImageTextToText.from_pretrained(options.out)
processor = AutoProcessor.from_pretrained(options.out)
print("loaded again:", type(model).__name__, f"{model.num_parameters():,} parameters")
