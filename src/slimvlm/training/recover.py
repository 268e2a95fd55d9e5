"""Train a pruned model back towards its teacher: one loop, the loss a weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainingArguments

from slimvlm.core.documents import Count, built, read_object
from slimvlm.core.errors import ConfigError, SlimError, is_out_of_memory
from slimvlm.core.files import explained
from slimvlm.core.options import HIDDEN_LOSSES, RecoverConfig
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.core.progress import is_watched, stage, to_log
from slimvlm.data.read import estimated_length, hold_out, subset
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import require_full_precision, require_undivided
from slimvlm.models.cost import release_memory
from slimvlm.models.hidden import is_sharded
from slimvlm.models.load import load_processor
from slimvlm.models.losses import layer_map
from slimvlm.planning.plan import Plan
from slimvlm.training.offline import OfflineTeacher
from slimvlm.training.precision import Precision, without_autocast
from slimvlm.training.resume import claim_training, is_finished, last_complete_checkpoint
from slimvlm.training.shared_vision import seeing_once
from slimvlm.training.supervision import Collator, num_workers
from slimvlm.training.teacher import share_, why_not_shared
from slimvlm.training.trainable import (
    by_old_names,
    merge,
    prepare_training,
    projector_in_every_graph,
    require_adapter_holds_all,
    save_adapter,
)
from slimvlm.training.trainer import (
    Bar,
    DistillationTrainer,
    LastLog,
    LoggedTraining,
    learning_parameters,
)

RATE, RATE_OF_ALL = 2e-4, 4e-4
"""Peak learning rates: of LoRA and the projector; of all weights, if all of the decoder went."""
UNKNOWN_SHARE, MEASURED_CHANNELS = 0.25, 576
ADAPTER_FOLDER = "adapter"
TRACKER_FOLDER = "runs"
"""Where the Trainer lets TensorBoard write."""


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        steps: Log rows: step, loss, its components, learning rate.
        num_samples: Samples that were learnt from.
        sample_ids: Their names, in order.
        trained_params: Parameters that learned.
        evaluations: Rows of the held-out loss and its components, if samples were held out.
        held_out_ids: Names of the held-out samples.
        teacher: Where the teacher's answers came from, and how much memory it shared.
    """

    steps: tuple[Mapping[str, int | float], ...]
    num_samples: Count
    sample_ids: tuple[str, ...]
    trained_params: Count
    evaluations: tuple[Mapping[str, int | float], ...] = ()
    held_out_ids: tuple[str, ...] = ()
    teacher: str = "none"

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what a run or a study wrote as ``history.json``.

        Raises:
            ConfigError: If it cannot be read or is no history.
        """
        return built(cls, read_object(path, "history"), f"history {str(path)!r}")


@dataclass(frozen=True)
class _Job:
    """One training, with everything checked."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    offline: OfflineTeacher | None
    plan: Plan | None
    learnt: list[Sample]
    held_out: list[Sample]
    config: RecoverConfig
    processor: Any
    folder: Path
    resumable: bool
    tokens: Tensor | None


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | OfflineTeacher | None,
    dataset: Sequence[Sample],
    config: RecoverConfig,
    processor: Any = None,
    work: str | Path | None = None,
    plan: Plan | None = None,
) -> History:
    """Train a model in place; LoRA is merged into its weights at the end.

    With the plan that pruned the model, the teacher costs only what was pruned: it reads the
    model's own weights wherever these are frozen and equal (`training.teacher.share_`). Such a
    teacher is used up: its weights are gone when training ends.

    Args:
        model: The pruned model.
        teacher: The original model, or what it said about the data; not needed if the loss is
            ``sft`` alone. It may lie on the CPU while the model is on a GPU.
        dataset: Conversations to learn from.
        config: What learns, from which loss, on which share of the data.
        processor: The model's processor or tokenizer; by default the one in its folder.
        work: Folder for resumable checkpoints. If it holds some, training goes on from the last
            one, and the result equals an uninterrupted run's. With ``keep_adapter`` its folder
            ``adapter`` holds the adapter afterwards, and ``runs`` what TensorBoard wrote.
        plan: The plan that pruned the model, for sharing weights with the teacher, for comparing
            inner layers, and for telling a teacher the numbers of tokens where the model has fewer.

    Raises:
        ConfigError: If the loss needs a teacher and there is none, or the teacher does not fit.
        NumericalError: If the loss becomes NaN or infinite; the message names the step, its samples
            and the first layer that is not finite.
    """
    require_full_precision(model.config, "trained")
    require_undivided(model, "trained", on_one_device=True)
    require_undivided(teacher, "a teacher", on_one_device=True, field="teacher")
    processor = processor or load_processor(model.config._name_or_path, model.config)
    if processor is None:
        raise ConfigError("recover needs the model's processor or tokenizer")
    if not config.needs_teacher:
        teacher = None
    _check(model, teacher, dataset, config, work)
    rest, held_out = hold_out(list(dataset), config.eval_fraction, config.seed)
    learnt = subset(rest, config.fraction, config.seed)
    offline = teacher if isinstance(teacher, OfflineTeacher) else None
    live = teacher if isinstance(teacher, PreTrainedModel) else None
    tokens = _kept_tokens(model, live, plan)
    if offline is not None:
        offline.require_fit(model, [*learnt, *held_out], config)
    if live is not None:
        _require_same_width(model, live, config, tokens is not None)
        plan = _usable_plan(model, live, plan, config)
    with TemporaryDirectory() as temporary:
        folder = Path(work) if work is not None else Path(temporary)
        claim_training(folder, model, teacher, config, learnt)
        resumable = work is not None and not is_sharded(model)
        who, what = (model, live, offline, plan), (learnt, held_out, config, processor)
        return _train(_Job(*who, *what, folder, resumable, tokens))


def _train(job: _Job) -> History:
    """Run the Trainer and hand the plain model back."""
    model, config = job.model, job.config
    torch.manual_seed(config.seed)
    precision = Precision.of(model, config.bf16)
    arguments = _training_arguments(job, precision.autocast)
    device = arguments.device
    with _as_current(device), precision.held(model, job.teacher, device):
        trained = prepare_training(model, config)
        precision.hold_learning_(model)
        trained_params = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        ready = _ready(job, trained)
        with projector_in_every_graph(model), ready as about_teacher, stage("train"):
            trainer = _trained(job, trained, arguments)
        plain = without_autocast(trainer)
        if config.keep_adapter and is_first_rank():
            save_adapter(plain, job.folder / ADAPTER_FOLDER, precision.dtype)
        merged = merge(plain, precision.dtype)
        assert merged is model, "merging must give back the model that was handed in"
    model.eval()
    rows = trainer.state.log_history
    return History(
        steps=tuple(row for row in rows if "loss" in row),
        num_samples=len(job.learnt),
        sample_ids=tuple(sample.id for sample in job.learnt),
        trained_params=trained_params,
        evaluations=tuple(row for row in rows if "eval_loss" in row),
        held_out_ids=tuple(sample.id for sample in job.held_out),
        teacher=about_teacher,
    )


@contextmanager
def _as_current(device: torch.device) -> Iterator[None]:
    """Make a card the current one inside, where libraries look for it."""
    if device.type in ("cpu", "mps"):
        yield
    else:
        with torch.get_device_module(device).device(device):
            yield


def _trained(job: _Job, trained: Any, arguments: TrainingArguments) -> DistillationTrainer:
    """Train with batches that fit.

    Where an accelerator has no memory left, batches become smaller and more of them are added
    before the optimizer moves. Losses are means over all of them, so that only rounding changes.

    Returns:
        The Trainer at the end.
    """
    is_alone = arguments.device.type != "cpu" and num_ranks() == 1
    before = {}
    if is_alone:
        before = {name: p.detach().cpu() for name, p in learning_parameters(trained)}
    while True:
        trainer = _trainer(job, trained, arguments)
        try:
            _run_or_go_on(trainer, job.folder)
            return trainer
        except RuntimeError as error:
            size = arguments.per_device_train_batch_size
            if not (is_alone and size > 1 and is_out_of_memory(error)):
                raise
        parts = next(count for count in range(2, size + 1) if size % count == 0)
        to_log(
            f"train: no memory on {arguments.device} for batches of {size}: {parts} batches of "
            f"{size // parts} are added instead"
        )
        without_autocast(trainer)
        trainer.model.zero_grad()  # type: ignore[union-attr]
        with torch.no_grad():
            for name, parameter in learning_parameters(trained):
                parameter.copy_(before[name])
        arguments = copy(arguments)
        arguments.per_device_train_batch_size //= parts
        arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size
        arguments.gradient_accumulation_steps *= parts
        del trainer
        release_memory()


def _trainer(job: _Job, trained: Any, arguments: TrainingArguments) -> DistillationTrainer:
    """The Trainer of a job, with our progress bar or lines in place of its own."""
    config = job.config
    positions = config.positions(job.offline.index.kd_on if job.offline else None)
    trainer = DistillationTrainer(
        model=trained,
        teacher=job.teacher,
        config=config,
        layer_pairs=_layer_pairs(job),
        lengths=list(map(estimated_length, job.learnt)) if config.group_by_length else None,
        tokens=job.tokens,
        args=arguments,
        train_dataset=job.learnt,
        eval_dataset=job.held_out or None,
        data_collator=Collator(job.processor, job.model.config, positions, job.offline, job.tokens),
    )
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    for ours in (Bar if is_watched() else LoggedTraining, LastLog):
        trainer.add_callback(ours)
    return trainer


def _run_or_go_on(trainer: DistillationTrainer, folder: Path) -> None:
    """Train, from the last checkpoint in the folder on; a finished training is only read."""
    with explained(folder):
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is not None and is_finished(checkpoint):
            trainer.restore(checkpoint)
            return
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except SlimError as error:  # a DataLoader worker puts its traceback before the message
            said = str(error).rpartition(f"{type(error).__name__}: ")[2]
            raise type(error)(said.strip()) from error


@contextmanager
def _ready(job: _Job, trained: Any) -> Iterator[str]:
    """Inside, the teacher is frozen, in its place, and shares what it can; yields a line on it."""
    teacher, config = job.teacher, job.config
    if teacher is None:
        yield "none" if job.offline is None else f"offline ({job.offline.folder})"
        return
    teacher.requires_grad_(False)
    teacher.eval()
    with ExitStack() as stack:
        if is_sharded(job.model):
            yield "separate, sharded"
            return
        if job.plan is None or config.teacher_weights == "separate":
            line = "separate"
        else:
            sharing = share_(teacher, trained, job.plan)
            line = sharing.line()
            stack.callback(nn.Module.to, teacher, "meta")
            if config.teacher_weights == "shared" and sharing.differing:
                raise ConfigError(f"teacher_weights 'shared' is not possible: {line}")
        teacher.to(job.model.device)  # type: ignore[arg-type]
        stack.enter_context(seeing_once(job.model, teacher, config.student_projector_in_teacher))
        yield line


def _kept_tokens(
    model: PreTrainedModel, teacher: PreTrainedModel | None, plan: Plan | None
) -> Tensor | None:
    """The teacher's number of each token, where a plan says which of them the model has."""
    if plan is None or plan.tokens is None:
        return None
    counts = [(model, len(plan.tokens))]
    counts += [] if teacher is None else [(teacher, plan.before.vocab_size)]
    fits = all(read_anatomy(whole).vocab_size == count for whole, count in counts)
    return torch.tensor(plan.tokens) if fits else None


def _require_same_width(
    model: PreTrainedModel, teacher: PreTrainedModel, config: RecoverConfig, has_tokens: bool
) -> None:
    """Vocabularies must agree, or a plan say how they are related.

    Hidden states must where the loss or the teacher reads ours.
    """
    ours, theirs = read_anatomy(model), read_anatomy(teacher)
    compares = set(HIDDEN_LOSSES) & config.loss_weights.keys()
    meets_ours = compares or config.student_projector_in_teacher
    checked = ["hidden_size"] * bool(meets_ours) + ["vocab_size"] * (not has_tokens)
    for name in checked:
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"teacher: {name} is {getattr(theirs, name)}, the model's is {getattr(ours, name)}"
                + "; their distributions can be compared, by kl, rkl or jsd"
                * (name == "hidden_size")
            )


def _usable_plan(
    model: PreTrainedModel, teacher: PreTrainedModel, plan: Plan | None, config: RecoverConfig
) -> Plan | None:
    """The plan if it says how the model came from the teacher; it must where options need it."""
    why = "there is no plan" if plan is None else why_not_shared(model, teacher, plan)
    if why is None:
        return plan
    for name, asked in (("teacher_weights", "shared"), ("hidden_layers", "mapped")):
        if getattr(config, name) == asked:
            raise ConfigError(f"{name} {asked!r} needs the plan that made the model: {why}")
    return None


def _check(
    model: PreTrainedModel,
    teacher: PreTrainedModel | OfflineTeacher | None,
    dataset: Sequence[Sample],
    config: RecoverConfig,
    work: str | Path | None,
) -> None:
    """Refuse options that do not work with this model, teacher, data or folder."""
    if teacher is None and config.needs_teacher:
        raise ConfigError(f"loss {config.loss!r} needs a teacher (--teacher)")
    if config.keep_adapter:
        require_adapter_holds_all(model)
    needs_folder = {
        "keep_adapter": config.keep_adapter,
        "load_best": config.load_best and num_ranks() > 1,  # all of them read it there
    }
    for name, needed in needs_folder.items():
        if needed and work is None:
            raise ConfigError(f"{name} True needs a work folder to write to")
    _require_trackers(config.report_to)
    if is_sharded(model):
        _require_shardable(teacher, config)
        _require_alike(dataset)


def _require_trackers(names: str) -> None:
    from transformers.integrations import integration_utils

    known = [*integration_utils.get_available_reporting_integrations(), "none"]
    for name in names.split(","):
        if name not in known:
            raise ConfigError(f"report_to {name!r} is not installed. It can be: {', '.join(known)}")


def _require_shardable(
    teacher: PreTrainedModel | OfflineTeacher | None, config: RecoverConfig
) -> None:
    """Refuse what a model divided among processes cannot do."""
    if isinstance(teacher, PreTrainedModel) and not is_sharded(teacher):
        raise ConfigError("teacher: load it with shard, as the model was")
    for name, value in (
        *(("keep_adapter", True), ("load_best", True), ("student_projector_in_teacher", True)),
        ("teacher_weights", "shared"),
    ):
        if getattr(config, name) == value:
            raise ConfigError(f"{name} {value!r} is not possible with a sharded model")


def _require_alike(samples: Sequence[Sample]) -> None:
    """Processes of a divided model run its tower together: all see pictures in a step, or none."""
    blind = [sample for sample in samples if not sample.images]
    if blind and len(blind) < len(samples):
        raise ConfigError(
            f"data: sample {blind[0].id!r} has no picture and others have. A model that --shard "
            "divides needs pictures in all samples or in none"
        )


def _layer_pairs(job: _Job) -> list[tuple[int, int]]:
    if job.plan is None or job.teacher is None or not job.config.maps_layers:
        return []
    theirs = layer_map(job.plan.layers, job.plan.before.num_layers)
    return list(enumerate(theirs))


def peak_rate(config: RecoverConfig, model: PreTrainedModel, plan: Plan | None) -> float:
    """The learning rate: the one that is given, or one by rule.

    LoRA and the projector take 2e-4. Where all weights learn, it is 4e-4 times the share of the
    decoder that went, a quarter where no plan says: measured on a model with 576 channels
    (``docs/log.md``). A model with more of them takes less in proportion, as the hidden
    matrices of μP do (arXiv:2203.03466, Table 3).

    Args:
        config: The options.
        model: What learns.
        plan: What was kept of the original.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    if config.train != "full":
        return RATE
    width = read_anatomy(model).hidden_size
    return RATE_OF_ALL * _gone(plan) * min(MEASURED_CHANNELS / width, 1.0)


def _gone(plan: Plan | None) -> float:
    """Share of the decoder that went."""
    return UNKNOWN_SHARE if plan is None else plan.decoder_ratio


def _training_arguments(job: _Job, bf16: bool) -> TrainingArguments:
    config, device = job.config, job.model.device
    measured = config.eval_steps or config.save_steps
    is_pinned = device.type not in ("cpu", "mps")  # MPS shares the memory of its host
    with by_old_names():
        arguments = TrainingArguments(
            output_dir=str(job.folder),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.passes(len(job.learnt), _gone(job.plan)),
            max_steps=config.max_steps,
            learning_rate=peak_rate(config, job.model, job.plan),
            lr_scheduler_type=config.scheduler,
            warmup_steps=config.warmup_ratio,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=bf16,
            use_cpu=device.type == "cpu",
            eval_strategy="steps" if job.held_out else "no",
            eval_steps=measured,
            save_strategy="steps" if job.resumable or config.load_best else "no",
            save_steps=measured if config.load_best else config.save_steps,
            save_total_limit=1,
            load_best_model_at_end=config.load_best,
            metric_for_best_model="eval_loss" if config.load_best else None,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            report_to=config.report_to.split(","),
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=is_pinned,
            dataloader_num_workers=num_workers(device),
            accelerator_config={"non_blocking": is_pinned},
            seed=config.seed,
            data_seed=config.seed,
            disable_tqdm=False,
            gradient_checkpointing=config.gradient_checkpointing or None,
        )
    if device.type != "cpu" and num_ranks() == 1:  # else the Trainer takes the first card
        vars(arguments)["_setup_devices"] = device
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs are torchrun's, not DataParallel's
    return arguments
