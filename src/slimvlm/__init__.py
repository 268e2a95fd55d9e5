"""Structural pruning and recovery for multimodal LLMs.

    import slimvlm as sv

    model, processor, run = sv.compress("demo", ratio=0.3, data="demo", out="run")

Names are loaded when first used, so that the command line starts quickly.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "core.errors": ("SlimError",),
    "core.options": ("CompressConfig", "PruneConfig", "RecoverConfig", "Workload"),
    "data.read": ("load_samples",),
    "data.samples": ("Question", "Sample", "Task"),
    "data.vocabulary": ("choose_tokens",),
    "models.anatomy": ("Anatomy",),
    "models.load": ("anatomy", "load"),
    "scoring.criteria": ("CRITERIA",),
    "scoring.forward": ("block_influence",),
    "scoring.score_model": ("calibration_batches", "collect", "score", "score_checkpoint"),
    "scoring.unit_scores": ("Scores", "Statistics"),
    "planning.make": ("make_plan", "make_plan_for_params", "ratio_for_params"),
    "planning.plan": ("Plan",),
    "pruning.cut": ("mask_", "prune_"),
    "pruning.repair": ("repair_",),
    "pruning.save": ("prune_checkpoint", "save"),
    "pruning.tokens": ("trim_tokenizer_",),
    "pruning.walk.walk": ("walk_", "walk_checkpoint"),
    "training.recover": ("History", "recover"),
    "evaluation.ask": ("evaluate",),
    "evaluation.bench": ("bench",),
    "evaluation.on_data": ("DataResult", "evaluate_data"),
    "evaluation.results": ("Result",),
    "evaluation.tasks": ("find_tasks",),
    "export.quantize": ("quantize",),
    "runs.advise": ("advise",),
    "runs.compress": ("compress",),
    "runs.study": ("run_study",),
    "runs.study.config": ("read_study",),
    "slimvlm_tools.convert": ("convert",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_HOME |= {"losses": "models.losses:*"}  # a module
__all__ = sorted(_HOME)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimvlm' has no attribute {name!r}")
    home, _, attribute = _HOME[name].partition(":")
    module = import_module(home if home.startswith("slimvlm") else f"slimvlm.{home}")
    return module if attribute == "*" else getattr(module, attribute or name)


def __dir__() -> list[str]:
    return __all__
