"""Quantise a pruned model to 4 bits with GPTQ, calibrated on the samples that its run pruned on.

    pip install . llmcompressor    # in an environment of its own: it pins transformers
    python examples/gptq_llmcompressor.py --run runs/small --out runs/small-gptq

The matrices of the decoder layers get 4 bits a weight, symmetric, in groups of 64, as `slimvlm
quantize --to int4 --backend compressed-tensors` gives them; GPTQ chooses the values by what the
layers see. vLLM reads the folder; transformers does where compressed-tensors is installed.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader

import slimvlm as sv
from slimvlm.models.parts import Parts

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--run", type=Path, default=Path("runs/small"), help="folder of compress")
parser.add_argument("--out", type=Path, default=Path("runs/small-gptq"))
parser.add_argument("--samples", type=int, help="by default as many as the run calibrated on")
parser.add_argument("--short", action="store_true", help="few samples")
options = parser.parse_args()
if options.out.exists():
    sys.exit(f"--out {options.out}: it exists; name another folder")

# The conversations that the run calibrated on: the first ones of its data, with seed 0.
asked = yaml.safe_load((options.run / "run.yaml").read_text())
count = 4 if options.short else options.samples or asked.get("samples", 192)
samples = sv.load_samples(asked["data"], asked.get("images"), limit=count)
model, processor = sv.load(options.run / "checkpoint", dtype="float32", device="cpu")
batches = [
    {name: value for name, value in batch.items() if name != "labels"}
    for batch in sv.calibration_batches(processor, samples)
]

# Tower, projector and head stay as they are. Readers differ in the path to a part, not in its name.
family = Parts(model).family
whole = [path for path in (family.vision, *family.projector, family.head) if path is not None]
kept = [f"re:.*{path.rpartition('.')[2]}.*" for path in whole]
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
recipe = GPTQModifier(
    config_groups={"decoder": {"targets": ["Linear"], "weights": weights}}, ignore=kept
)
oneshot(model=model, dataset=DataLoader(batches, batch_size=None), recipe=recipe)

model.save_pretrained(options.out, save_compressed=True)
# It writes the full names of one layout of LLaVA, which other readers do not have.
config = json.loads((options.out / "config.json").read_text())
config["quantization_config"]["ignore"] = kept
(options.out / "config.json").write_text(json.dumps(config, indent=2))
processor.save_pretrained(options.out)
shutil.copy(options.run / "checkpoint" / "slimvlm_plan.json", options.out)
size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
print(f"{options.out}: {size / 2**20:.0f} MiB; vllm serve {options.out}")
