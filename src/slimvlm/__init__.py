"""Structural pruning and recovery for multimodal LLMs.

    import slimvlm as sv

    model, processor, run = sv.compress("demo", ratio=0.3, data="demo", out="run")

Names are loaded when first used, so that the command line starts quickly.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Anatomy": "models.anatomy",
    "CRITERIA": "scoring.criteria",
    "CompressConfig": "core.options",
    "DataResult": "evaluation.on_data",
    "History": "training.recover",
    "Plan": "planning.plan",
    "PruneConfig": "core.options",
    "Question": "data.samples",
    "RecoverConfig": "core.options",
    "Result": "evaluation.results",
    "Sample": "data.samples",
    "Scores": "scoring.unit_scores",
    "SlimError": "core.errors",
    "Statistics": "scoring.unit_scores",
    "Task": "data.samples",
    "Workload": "core.options",
    "advise": "runs.advise",
    "anatomy": "models.load",
    "bench": "evaluation.bench",
    "block_influence": "scoring.forward",
    "choose_tokens": "data.vocabulary",
    "calibration_batches": "scoring.score_model",
    "collect": "scoring.score_model",
    "compress": "runs.compress",
    "convert": "slimvlm_tools.convert",
    "evaluate": "evaluation.ask",
    "evaluate_data": "evaluation.on_data",
    "find_tasks": "evaluation.tasks",
    "load": "models.load",
    "load_samples": "data.read",
    "losses": "models.losses:*",
    "inspect": "models.load:anatomy",
    "make_plan": "planning.make",
    "make_plan_for_params": "planning.make",
    "mask_": "pruning.cut",
    "prune_": "pruning.cut",
    "walk_": "pruning.walk.walk",
    "walk_checkpoint": "pruning.walk.walk",
    "prune_checkpoint": "pruning.save",
    "quantize": "export.quantize",
    "ratio_for_params": "planning.make",
    "recover": "training.recover",
    "read_study": "runs.study.config",
    "repair_": "pruning.repair",
    "run_study": "runs.study",
    "save": "pruning.save",
    "score": "scoring.score_model",
    "score_checkpoint": "scoring.score_model",
    "trim_tokenizer_": "pruning.tokens",
}

__all__ = sorted(_HOME)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        if instead := import_module("slimvlm.core.removed").NAMES.get(name):
            raise AttributeError(f"slimvlm.{name} was removed: {instead}")
        raise AttributeError(f"module 'slimvlm' has no attribute {name!r}")
    home, _, attribute = _HOME[name].partition(":")
    module = import_module(home if home.startswith("slimvlm") else f"slimvlm.{home}")
    return module if attribute == "*" else getattr(module, attribute or name)


def __dir__() -> list[str]:
    return __all__
