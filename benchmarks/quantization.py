"""What quantising the demo model costs in accuracy, and saves in memory.

Command:  .venv/bin/python benchmarks/quantization.py [--model demo] [--limit 50] [--tasks name,...]
Expect:   slow answers on a CPU, where int8 weights are widened at every use; slimvlm[quant].
Goal:     int8 keeps at least 98 % of AVG (the study, Tab. 7: weights -43 %, AVG -2 %).

Each form is written, read back by `slimvlm.load` and asked the same questions. AVG-% has a paired
bootstrap interval over questions. The study's LLaVA has 92 % of its weights in the decoder layers,
the demo model 78 %: a fifth is its embedding, which stays as it is.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from slimvlm.evaluation.ask import evaluate
from slimvlm.export.quantize import quantize
from slimvlm.models.load import load
from slimvlm.runs.tables import as_markdown, result_rows

FORMS = {"int8": ("int8", "torchao"), "LLM.int8": ("int8", "bitsandbytes"),
         "int4 (nf4)": ("int4", "bitsandbytes")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="the demo model, or a pruned one")
    parser.add_argument("--tasks", default="demo")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    about = {
        **{name: getattr(options, name) for name in ("model", "tasks", "limit")},
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about))
    results = {"original": evaluate(*load(options.model), options.tasks, options.limit)}
    with tempfile.TemporaryDirectory() as folder:
        for form in options.forms:
            out = Path(folder) / form.replace(" ", "-")
            done = quantize(options.model, out, *FORMS[form])
            print(json.dumps({"form": form, **asdict(done), "saved": done.saved}), flush=True)
            results[form] = evaluate(*load(out), options.tasks, options.limit, name=form)
            kept = results[form].retention(results["original"])
            print(json.dumps({"form": form, **vars(kept)}), flush=True)
    print(as_markdown(*result_rows(results)))


if __name__ == "__main__":
    main()
