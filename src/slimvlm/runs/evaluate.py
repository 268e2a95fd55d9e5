"""Evaluate models in folders on tasks or on data, and compare two of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free
from slimvlm.core.options import DataConfig, LoadConfig, Questions
from slimvlm.core.progress import Say
from slimvlm.evaluation.ask import evaluate as ask
from slimvlm.evaluation.compare import Comparison, compare
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.evaluation.on_data import DataResult, evaluate_data, single_result
from slimvlm.evaluation.predictions import predictions_of
from slimvlm.evaluation.results import Result, read_baseline
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.models.hidden import head_weights_of
from slimvlm.models.load import check_models, load_as
from slimvlm.runs.request import check_questions
from slimvlm.runs.stages import samples_for


def evaluate(
    model: str,
    questions: Questions,
    loading: LoadConfig,
    *,
    baseline: str | None = None,
    blind: bool = False,
    log_folder: Path | None = None,
    out: Path | None = None,
    force: bool = False,
) -> dict[str, Result]:
    """Evaluate a model, and a baseline if given, as the verb ``evaluate`` does.

    Returns results by ``baseline`` and ``model``; options are checked before weights are read.
    """

    def asked(name: str, floors: bool) -> Result:
        loaded = load_as(loading, name)
        how = vars(replace(questions, floors=floors))
        title = f"{name} (blind)" if blind else name
        return evaluate_all(*loaded, **how, name=title, log_folder=log_folder, blind=blind)

    check_questions(questions, blind, log_folder is not None)
    if out is not None:
        require_free(out, force)
    check_models(loading, model)
    results: dict[str, Result] = {}
    if baseline is not None and Path(baseline).is_file():
        results["baseline"] = read_baseline(baseline, blind, questions.floors)
    elif baseline is not None:
        check_models(loading, baseline)
        results["baseline"] = asked(baseline, questions.floors)
    results["model"] = asked(model, questions.floors and baseline is None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    return results


def evaluate_on_data(
    model: str,
    source: DataConfig,
    *,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    force: bool = False,
    say: Say = print,
) -> dict[str, DataResult]:
    """Evaluate a model on data without a task, and compare it with a baseline if given.

    One model is in memory at a time; the baseline's predictions are kept. Returns results by
    ``baseline`` and ``model``.
    """
    if out is not None:
        require_free(out, force)
    if baseline is not None and Path(baseline).is_file():
        raise ConfigError(f"baseline {baseline!r}: with --data it must be a model, not a file")
    check_models(source, model, *([baseline] if baseline is not None else []))
    samples = samples_for(model, source, limit, say)
    results: dict[str, DataResult] = {}
    kept = None
    if baseline is not None:
        original, processor = load_as(source, baseline)
        head = head_weights_of(original)
        kept = predictions_of(original, processor, samples, batch_size, baseline, head)
        results["baseline"] = single_result(kept, samples, original.device)
        del original
    found = evaluate_data(*load_as(source, model), samples, kept, batch_size=batch_size, name=model)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.save(out)
    return {**results, "model": found}


def side_by_side(a: str, b: str, tasks: str, limit: int | None, loading: LoadConfig) -> Comparison:
    """Compare two models or result files, answer by answer, as the verb ``compare`` does."""
    chosen = find_tasks(tasks)
    results = {name: Result.load(name) for name in (a, b) if name.endswith(".json")}
    models = [name for name in dict.fromkeys((a, b)) if name not in results]
    check_models(loading, *models)
    for name in models:
        results[name] = ask(*load_as(loading, name), chosen, limit, name=name)
    known = {**builtin_tasks(), **{task.name: task for task in chosen}}
    return compare(results[a], results[b], known)
