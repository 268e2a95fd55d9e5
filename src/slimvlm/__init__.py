"""Structural pruning and recovery for multimodal LLMs.

    import slimvlm as sv

    model, processor = sv.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    scores = sv.score(model, batches, criterion="taylor")
    plan = sv.make_plan(sv.anatomy(model), scores, ratio=0.3, axis="width")
    sv.prune_(model, plan)
    sv.save(model, processor, "out", plan)

Names are loaded when first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Anatomy": "geometry",
    "CRITERIA": "scores",
    "CompressConfig": "config",
    "History": "recovery",
    "Plan": "plan",
    "PruneConfig": "config",
    "Question": "samples",
    "RecoverConfig": "config",
    "Result": "results",
    "Sample": "samples",
    "Scores": "values",
    "SlimError": "errors",
    "Statistics": "values",
    "Task": "samples",
    "Workload": "config",
    "advise": "advice",
    "anatomy": "checkpoint",
    "bench": "speed",
    "best_channels": "narrowing",
    "block_influence": "scores.layers",
    "calibration_batches": "calibrate",
    "collect": "calibrate",
    "compress": "compression",
    "convert": "conversion",
    "evaluate": "evaluation",
    "find_tasks": "tasks",
    "load": "checkpoint",
    "load_samples": "data",
    "losses": "losses",
    "make_plan": "planning",
    "make_plan_for_params": "planning",
    "mask_": "surgery",
    "narrow_": "narrowing",
    "narrowed_config": "narrowing",
    "prune_": "surgery",
    "prune_and_repair_": "repair",
    "prune_checkpoint": "streaming",
    "push": "hub",
    "quantize": "quantization",
    "ratio_for_params": "planning",
    "recover": "recovery",
    "read_study": "study",
    "repair_": "repair",
    "run_study": "study",
    "save": "checkpoint",
    "score": "calibrate",
    "score_channels": "narrowing",
    "score_checkpoint": "streaming",
    "search_plan": "search",
    "verify": "manifest",
}

__all__ = sorted([*_HOME, "inspect"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "inspect":
        return import_module("slimvlm.checkpoint").anatomy
    if name not in _HOME:
        raise AttributeError(f"module 'slimvlm' has no attribute {name!r}")
    module = import_module(f"slimvlm.{_HOME[name]}")
    return module if name == _HOME[name] == "losses" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
