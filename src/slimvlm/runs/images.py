"""Measure a model at shares of its image tokens, and write it with one of them."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from slimvlm.core import files
from slimvlm.core.documents import read_object
from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.options import TrainingData
from slimvlm.core.progress import Say
from slimvlm.data.chat import answered_sample
from slimvlm.evaluation import on_data
from slimvlm.evaluation.bench import paired_times
from slimvlm.evaluation.on_data import evaluate_data, result_of
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models import load as models
from slimvlm.models import pictures
from slimvlm.models.cost import kv_cache_bytes
from slimvlm.models.pictures import PictureBudget
from slimvlm.pruning.layout import write_processor
from slimvlm.pruning.save import CARD_FILE, CardFacts, plan_of, write_card
from slimvlm.runs.prune import HELD_OUT_FILE
from slimvlm.runs.recipe import samples_for
from slimvlm.runs.tables import AtBudget


def image_tokens(
    model: str,
    source: TrainingData,
    shares: Sequence[float],
    tasks: str | None,
    limit: int | None,
    keep: float | None,
    out: Path | None,
    force: bool,
    say: Say,
) -> list[AtBudget]:
    """Measure a model at shares of its image tokens, and write it with one of them."""
    if (keep is None) != (out is None):
        raise ConfigError("--keep and --out must be given together")
    named = [] if tasks is None else find_tasks(tasks)
    models.check_models(source, model)
    config = models.load_config(model, source.trust_remote_code)
    pictures.knobs_of(config)
    groups = {"data": samples_for(model, source, None, say)}
    processor = models.load_processor(models.resolve(model), config, source.trust_remote_code)
    choose = pictures.budgets_for(config, processor, groups["data"])
    if keep is not None and out is not None:
        write_with(choose(keep), model, source, processor, out, force, say)
    chosen = {1.0: choose(1.0)} if shares else {}
    for share in sorted({*shares} - {1.0}, reverse=True):
        try:
            chosen[share] = choose(share)
        except ConfigError as error:
            say(f"not measured: {error}")
    if not chosen:
        return []

    loaded, processor = models.load_as(source, model)
    for task in named:
        groups[task.name] = [answered_sample(q, q.answers[0]) for q in task.load(limit)]
    full = {name: on_data.predictions_of(loaded, processor, its) for name, its in groups.items()}
    dtype, found = str(loaded.dtype).removeprefix("torch."), []
    for budget in chosen.values():
        times, cache = None, kv_cache_bytes(models.anatomy(config), round(budget.tokens), dtype)
        held_out = {n: result_of(full[n], groups[n], loaded.device) for n in groups}
        if budget.settings:
            small = models.sharing_copy(loaded)
            changed = budget.apply_(small, processor)
            times = paired_times(small, changed, loaded, processor, budget.size)
            held_out = {n: evaluate_data(small, changed, groups[n], full[n]) for n in groups}
        given = {**vars(budget), "kv_cache_bytes": round(cache), "times": times}
        found.append(AtBudget(**given, held_out=held_out))
    return found


def write_with(
    budget: PictureBudget,
    model: str,
    source: TrainingData,
    processor: Any,
    out: Path,
    force: bool,
    say: Say,
) -> None:
    """Write a model whose processor makes fewer image tokens; its weights are copied."""
    config = models.load_config(model, source.trust_remote_code)
    small, trusted = models.empty_model(config), source.trust_remote_code
    changed = budget.apply_(small, processor)
    words = ["slimvlm", "image-tokens", model, "--data", source.data, "--no-measure", "--keep"]
    command = shlex.join([*words, str(budget.share), "--out", out.name])
    facts = CardFacts(
        base=models.resolve(model), name=out.name, command=command, pictures=budget, copied=True
    )
    with files.new_folder(out, force) as folder:
        others = shutil.ignore_patterns(CARD_FILE, HELD_OUT_FILE)  # measured with all tokens
        shutil.copytree(models.folder_of(model), folder, ignore=others, dirs_exist_ok=True)
        write_processor(changed, folder)
        if (folder / IMAGE_PROCESSOR_NAME).is_file():  # which older readers read
            changed.image_processor.save_pretrained(folder)
        values = read_object(folder / CONFIG_NAME, "model")
        values |= {n: v for n, v in budget.settings.items() if n in vars(config)}
        files.write_text(folder / CONFIG_NAME, json.dumps(values, indent=2) + "\n")
        again = models.load_processor(str(folder), models.load_config(folder, trusted), trusted)
        if again.image_processor.to_dict() != changed.image_processor.to_dict():
            raise ReloadError(f"{str(out)!r}: the processor reads back with other settings")
        write_card(folder, small, plan_of(folder), facts, changed)
        files.mark_checkpoint(folder)
    say(f"{out}: images take {budget}")
    if option := pictures.llama_cpp_option(changed, config):
        say(f"llama.cpp resizes images by itself: give it {option}")
