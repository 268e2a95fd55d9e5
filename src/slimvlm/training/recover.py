"""Train a pruned model towards its teacher: one loop, the loss a weighted sum."""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer import TRAINER_STATE_NAME

from slimvlm.core import documents
from slimvlm.core.documents import Count, asked, built, digest, read_object
from slimvlm.core.errors import ConfigError, SlimError, is_out_of_memory, raised_as
from slimvlm.core.files import explained, write_text
from slimvlm.core.options import HIDDEN_LOSSES, RecoverConfig
from slimvlm.core.progress import is_first_rank, num_ranks, stage, to_log
from slimvlm.core.tables import read_table
from slimvlm.data.chat import tokenizer_of
from slimvlm.data.read import subset
from slimvlm.data.samples import Sample, identifying_bytes
from slimvlm.models import load as models
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.devices import computes_bfloat16, digest_of_weights, free_memory, release_memory
from slimvlm.models.hidden import is_sharded
from slimvlm.models.losses import layer_map
from slimvlm.models.parts import Parts, part_at
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.training import trainer as training
from slimvlm.training.teacher import plan_fits, teaching
from slimvlm.training.trainer import TRAINED_FILE, DistillationTrainer, merge, num_workers

RATE, RATE_OF_ALL = 2e-4, 4e-4
"""Peak learning rates: of LoRA and projector; of all weights, if the whole decoder was removed."""
UNKNOWN_SHARE, MEASURED_CHANNELS = 0.25, 576
_ARGUMENTS = read_table(__file__, "arguments.yaml")
REQUEST_FILE = "request.json"
ADAPTER_FOLDER = "adapter"
TRACKER_FOLDER = "runs"  # where the Trainer lets TensorBoard write


@dataclass(frozen=True)
class History:
    """Record of a training."""

    steps: tuple[Mapping[str, int | float], ...]  # log rows: step, loss, its parts, learning rate
    # samples that were trained on; fewer than ``sample_ids`` if the steps ended earlier
    num_samples: Count
    sample_ids: tuple[str, ...]  # names of all training samples, in order
    trained_params: Count
    teacher: str = "none"  # how it was held, and how much memory it shared

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read the ``history.json`` of a run or a study; raise ConfigError if it is none."""
        history = built(cls, read_object(path, "history"), where := f"history {str(path)!r}")
        numbers = [value for row in history.steps for value in row.values()]
        whole = history.steps and all("step" in row for row in history.steps)
        if not whole or not all(abs(number) < 1e30 for number in numbers):
            raise ConfigError(f"{where}: steps must be rows of finite numbers with a step")
        return history

    def save(self, path: Path) -> None:
        """Write the history as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    dataset: Sequence[Sample],
    config: RecoverConfig | None = None,
    processor: Any = None,
    work: str | Path | None = None,
    plan: Plan | None = None,
    *,
    share: bool = True,
) -> History:
    """Train a model in place; LoRA is merged into its weights at the end.

    ``teacher`` is the original, on any device; for the loss ``sft`` alone None. The ``processor``
    is by default that of the folder or hub id that the model was read from, without the tokens that
    ``plan`` removes. A folder ``work`` holds resumable checkpoints (training resumes from the last
    one with the same result), an adapter to keep and a tracker's files.

    ``plan`` is the one that pruned the model. It serves to compare inner layers, to find the
    teacher's token ids, and to let the teacher read the model's own weights wherever these are
    frozen and equal (`training.teacher.share_`). Such a teacher has no weights after training. With
    ``share`` False it keeps its own and does not change.

    Raises:
        ConfigError: If a teacher or processor is needed and missing, or the teacher does not fit.
        NumericalError: If the loss becomes NaN or infinite; the message names the step, its samples
            and the first layer that is not finite.
    """
    models.require_full_precision(model.config, "trained")
    models.require_undivided(model, "trained", on_one_device=True)
    models.require_undivided(teacher, "a teacher", on_one_device=True, field="teacher")
    config = config or RecoverConfig()
    if not dataset or not all(isinstance(each, Sample) for each in dataset):
        raise ConfigError("dataset: must hold samples, such as load_samples gives")
    processor = _own_processor(model, plan) if processor is None else processor
    teacher = teacher if config.needs_teacher else None
    tokens = _tokens_of_teacher(model, teacher, dataset, config, work, plan)
    learnt = subset(list(dataset), config.fraction, config.seed)
    if plan is not None and teacher is not None and not plan_fits(plan, model, teacher):
        plan = None
    dtype, about_teacher = model.dtype, "none"
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(work) if work is not None else Path(temporary)
        _require_same_run(folder, config, model, teacher, learnt, plan)
        torch.manual_seed(config.seed)
        is_resumable = work is not None and not is_sharded(model)
        arguments = _training_arguments(config, model, plan, folder, len(learnt), is_resumable)
        device = arguments.device
        if device.type not in ("cpu", "mps"):  # libraries look for the current card
            stack.enter_context(torch.get_device_module(device).device(device))
        stack.enter_context(training.training_precision(model, teacher, device, arguments.bf16))
        trained = training.prepare_training(model, config)
        trained_params = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        with training.projector_in_every_graph(model), ExitStack() as inner, stage("train"):
            if teacher is not None:
                shared = plan if share else None
                how = (shared, device, config.paper_exact)
                about_teacher = inner.enter_context(teaching(teacher, model, trained, *how))
            given = {
                "model": trained,
                "teacher": teacher,
                "config": config,
                "their_layers": _layers_of_teacher(config, plan),
                "tokens": tokens,
                "train_dataset": learnt,
                "data_collator": partial(training.collate, processor, config.positions),
            }
            trainer = _trained(given, arguments, folder)
        plain = training.without_autocast(trainer)
        if config.keep_adapter and is_first_rank():
            training.save_adapter(plain, folder / ADAPTER_FOLDER, dtype)
        merged = merge(plain, dtype)
        assert merged is model, "merging must give back the model that was handed in"
    model.eval()
    at_once = arguments.train_batch_size * arguments.gradient_accumulation_steps
    at_once *= arguments.world_size
    return History(
        steps=tuple(row for row in trainer.state.log_history if "loss" in row),
        num_samples=min(len(learnt), trainer.state.global_step * at_once),
        sample_ids=tuple(sample.id for sample in learnt),
        trained_params=trained_params,
        teacher=about_teacher,
    )


def _own_processor(model: PreTrainedModel, plan: Plan | None) -> Any:
    """Read the processor of the folder or hub id that a model was read from, trimmed by a plan."""
    name = str(model.config._name_or_path)
    rows = sum(len(each) for each in model.get_input_embeddings().parameters())
    with raised_as(ConfigError, SlimError, "processor: pass processor= or plan=:"):
        processor = trimmed_processor(models.load_processor(name, model.config), plan)
        if processor is None or len(tokenizer_of(processor)) > rows:
            raise ConfigError(f"{name!r} has none for the model's {rows} tokens")
    return processor


def _layers_of_teacher(config: RecoverConfig, plan: Plan | None) -> Sequence[int]:
    """Without answers to learn, compare hidden states after every kept layer, not at the end."""
    terms = config.loss_weights.keys()
    is_alone = "sft" not in terms and not config.paper_exact  # the paper compares the end
    if plan is None or not is_alone or not terms & set(HIDDEN_LOSSES):
        return ()
    return layer_map(plan.layers, plan.before.num_layers)


def _require_same_run(
    folder: Path,
    config: RecoverConfig,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    learnt: Sequence[Sample],
    plan: Plan | None,
) -> None:
    """Note the request in the training folder; refuse a folder that another request began."""
    both = (("model", model), ("teacher", teacher))  # no process holds a sharded model whole
    images = [each for sample in learnt for each in sample.images]
    request = {
        "config": asked(config),
        "processes": num_ranks(),
        **{n: None if m is None or is_sharded(m) else digest_of_weights(m) for n, m in both},
        "samples": [sample.id for sample in learnt],
        "conversations": digest([[sample.messages for sample in learnt]]),
        "pictures": digest(identifying_bytes(each, may_move=True) for each in images),
        "plan": None if plan is None else digest([plan.to_dict()]),
    }
    what = f"training folder {str(folder)!r} belongs to a run"
    cure = "Remove it, or give those options and data again"
    noted = documents.noted_request(folder / REQUEST_FILE)
    if noted is not None:
        documents.require_same(noted, documents.comparable(request), what, cure)
    if is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        documents.note_request(folder / REQUEST_FILE, request)


def _trained(
    given: Mapping[str, Any], arguments: TrainingArguments, folder: Path
) -> DistillationTrainer:
    """Train from the last checkpoint on; batches too large for memory are divided, accumulated."""
    is_alone = arguments.device.type != "cpu" and num_ranks() == 1
    before: dict[str, Tensor] | None = None  # needed where memory ends after the first step
    learning = dict(training.learning_parameters(given["model"]))
    held = sum(p.nbytes for p in learning.values())
    is_divisible = is_alone and arguments.per_device_train_batch_size > 1
    if is_divisible and held <= free_memory(torch.device("cpu")) / 4:
        before = {name: p.detach().cpu() for name, p in learning.items()}
    while True:
        trainer = DistillationTrainer(args=arguments, **given)
        try:
            with explained(folder), ExitStack() as shown:
                trainer.add_callback(training.ShownTraining(shown))
                checkpoint = _last_checkpoint(folder)
                if checkpoint is None or not trainer.restore_finished(checkpoint):
                    trainer.train(resume_from_checkpoint=checkpoint)
            return trainer
        except SlimError as error:  # a DataLoader worker puts its traceback before the message
            told = str(error).rpartition(f"{type(error).__name__}: ")[2]
            raise type(error)(told.strip()) from error
        except RuntimeError as error:
            size = arguments.per_device_train_batch_size
            is_begun = before is None and trainer.state.global_step > 0
            if not (is_alone and size > 1 and is_out_of_memory(error)) or is_begun:
                raise
        parts = next(count for count in range(2, size + 1) if size % count == 0)
        to_log(
            f"train: no memory on {arguments.device} for batches of {size}: {parts} batches of "
            f"{size // parts} are added instead"
        )
        training.without_autocast(trainer)
        trainer.model.zero_grad()  # type: ignore[union-attr]
        with torch.no_grad():
            for name, kept in (before or {}).items():
                learning[name].copy_(kept)
        arguments = copy(arguments)
        arguments.per_device_train_batch_size //= parts
        arguments.gradient_accumulation_steps *= parts
        del trainer
        release_memory()


def _last_checkpoint(folder: Path) -> str | None:
    """Find the newest complete checkpoint; None if there is none."""
    written = (path.parent for path in folder.glob(f"checkpoint-*/{TRAINED_FILE}"))
    by_step = {path.name.removeprefix("checkpoint-"): path for path in written}
    for step in sorted(filter(str.isdecimal, by_step), key=int, reverse=True):
        with suppress(ConfigError):
            read_object(by_step[step] / TRAINER_STATE_NAME, "training state")  # written last
            return str(by_step[step])
    return None


def _tokens_of_teacher(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    dataset: Sequence[Sample],
    config: RecoverConfig,
    work: str | Path | None,
    plan: Plan | None,
) -> Tensor | None:
    """Refuse conflicting requests; find the teacher's id of each token by the plan."""
    if teacher is None and config.needs_teacher:
        raise ConfigError(f"loss {config.loss!r} needs a teacher (--teacher)")
    if config.keep_adapter:
        for path in Parts(model).family.projector:
            if isinstance(part_at(model, path), nn.Parameter):
                raise ConfigError(f"keep_adapter: an adapter cannot hold the parameter {path!r}")
        if work is None:
            raise ConfigError("keep_adapter True needs a work folder to write to")
    if is_sharded(model):
        if teacher is not None and not is_sharded(teacher):
            raise ConfigError("teacher: load it with shard, as the model was")
        for name in ("keep_adapter", "paper_exact"):
            if getattr(config, name):
                raise ConfigError(f"{name} True is not possible with a sharded model")
        # processes of a divided model run its tower together: all see images in a step, or none
        blind = [sample for sample in dataset if not sample.images]
        if blind and len(blind) < len(dataset):
            told = f"data: sample {blind[0].id!r} has no image and others have"
            raise ConfigError(f"{told}. --shard needs images in all samples or in none")
    ours, theirs = (None if each is None else read_anatomy(each) for each in (model, teacher))
    tokens = None
    if plan is not None and plan.tokens is not None:
        counts = [(ours, len(plan.tokens)), (theirs, plan.before.vocab_size)]
        fits = all(whole is None or whole.vocab_size == count for whole, count in counts)
        tokens = torch.tensor(plan.tokens) if fits else None
    meets_ours = set(HIDDEN_LOSSES) & config.loss_weights.keys() or config.paper_exact
    for name in ["hidden_size"] * bool(meets_ours) + ["vocab_size"] * (tokens is None):
        also = "; their distributions can be compared, by kl, rkl or jsd" * (name == "hidden_size")
        found, expected = (getattr(each, name, None) for each in (theirs, ours))
        if theirs is not None and found != expected:
            raise ConfigError(f"teacher: {name} is {found}, the model's is {expected}{also}")
    return tokens


def peak_rate(config: RecoverConfig, model: PreTrainedModel, plan: Plan | None) -> float:
    """Return the learning rate: the one that is given, or one by rule."""
    if config.learning_rate is not None:
        return config.learning_rate
    if config.besides_tower != "full":
        return RATE
    # measured on a model with 576 channels (``docs/log.md``); a wider one takes less in proportion,
    # as the hidden matrices of μP do (arXiv:2203.03466, Table 3)
    width = read_anatomy(model).hidden_size
    removed = plan.decoder_ratio if plan is not None and plan.cuts_layers else UNKNOWN_SHARE
    return RATE_OF_ALL * removed * min(MEASURED_CHANNELS / width, 1.0)


def _training_arguments(
    config: RecoverConfig,
    model: PreTrainedModel,
    plan: Plan | None,
    folder: Path,
    num_samples: int,
    is_resumable: bool,
) -> TrainingArguments:
    """Make the Trainer's arguments; bfloat16 autocast by default where the device is fast at it."""
    device = model.device
    removed = UNKNOWN_SHARE if plan is None else plan.decoder_ratio
    is_pinned = device.type not in ("cpu", "mps")  # MPS shares the memory of its host
    wrong = raised_as(ConfigError, (ValueError, TypeError), f"trainer {dict(config.trainer)}:")
    with wrong, warnings.catch_warnings(action="ignore", category=FutureWarning):  # old names
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.epochs_over(num_samples, removed),
            max_steps=config.max_steps,
            learning_rate=peak_rate(config, model, plan),
            bf16=computes_bfloat16(device) if config.bf16 is None else config.bf16,
            use_cpu=device.type == "cpu",
            save_strategy="steps" if is_resumable else "no",
            dataloader_pin_memory=is_pinned,
            dataloader_num_workers=num_workers(device),
            accelerator_config={"non_blocking": is_pinned},
            seed=config.seed,
            data_seed=config.seed,
            gradient_checkpointing=config.gradient_checkpointing or None,
            **_ARGUMENTS["fixed"],
            **{**_ARGUMENTS["defaults"], **config.trainer},
        )
    known = integration_utils.get_available_reporting_integrations()
    for name in cast(list[str], arguments.report_to):
        if name not in known:
            allowed = ", ".join([*known, "none"])
            raise ConfigError(f"trainer: report_to {name!r} is not installed. Known: {allowed}")
    if device.type != "cpu" and num_ranks() == 1:  # else the Trainer takes the first card
        vars(arguments)["_setup_devices"] = device
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs are torchrun's, not DataParallel's
    return arguments
