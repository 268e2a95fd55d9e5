"""Trainable weights, precision, and a Trainer with our loss. B sample, T token, V vocabulary."""

import math
import multiprocessing
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slimvlm.core.errors import ConfigError, NumericalError, raised_as
from slimvlm.core.options import DIVERGENCES, HIDDEN_LOSSES, Positions, RecoverConfig
from slimvlm.core.progress import num_ranks, steps
from slimvlm.data.chat import encode_samples
from slimvlm.data.roles import predicts_label, valid_tokens
from slimvlm.data.samples import Sample
from slimvlm.models import losses
from slimvlm.models.hidden import head_of, hidden_states, hold_in_, is_sharded, reshard
from slimvlm.models.parts import Parts, parameters_below, part_at, text_config_of
from slimvlm.scoring.batches import first_spoilt_layer

LORA: dict[str, Any] = {"lora_alpha": 128, "lora_dropout": 0.05}
"""Defaults that `RecoverConfig.lora` overrides; target modules: all matrices of the backbone."""


def prepare_training(model: PreTrainedModel, config: RecoverConfig) -> Any:
    """Freeze all but the trainable weights, hold those in float32, and add LoRA by PEFT."""
    family = Parts(model).family
    model.requires_grad_(False)
    if config.besides_tower == "projector" and not family.projector:
        raise ConfigError(f"train 'projector': {model.config.model_type!r} has no projector")
    trained: Any = model
    if config.train == "lora":
        import peft

        parts = Parts(model)
        names = "|".join(re.escape(p.path) for p in (*parts.row.attention, *parts.row.mlp))
        where = rf"{re.escape(family.backbone)}\.layers\.\d+\.({names})"
        options = {**LORA, "target_modules": where, **config.lora}
        has_experts = any(matrix.is_of_experts for _, matrix in parts.matrices())
        if has_experts and not config.lora.keys() & {"target_modules", "lora_dropout"}:
            options["lora_dropout"] = 0.0  # PEFT has no dropout before weights of experts
        wrong = raised_as(ConfigError, (ValueError, TypeError), f"lora {dict(config.lora)}:")
        with wrong, warnings.catch_warnings(action="ignore", category=FutureWarning):  # old names
            settings = peft.LoraConfig(r=config.lora_rank, **options)
            trained = peft.get_peft_model(model, settings)
    if config.besides_tower == "full":
        head: Any = model.get_submodule(family.head)
        head.requires_grad_(bool(config.loss_weights.keys() - set(HIDDEN_LOSSES)))
        model.get_submodule(family.backbone).requires_grad_(True)  # a tied head with it
        for tower in _towers(model):  # some lie inside the backbone
            tower.requires_grad_(False)
    for path in family.projector:
        for parameter in parameters_below(model, path):
            parameter.requires_grad_(True)
    if config.train != config.besides_tower:
        if family.vision is None:
            raise ConfigError(f"train {config.train!r}: {model.config.model_type!r} has no tower")
        for parameter in parameters_below(model, family.vision):
            parameter.requires_grad_(True)
    hold_in_(model, torch.float32, learning_only=True)
    return trained


def learns(module: nn.Module) -> bool:
    """Whether any parameter of a module learns."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _towers(model: PreTrainedModel) -> list[nn.Module]:
    parts = (part_at(model, path) for path in Parts(model).family.towers)
    return [part for part in parts if isinstance(part, nn.Module)]


@contextmanager
def training_precision(
    model: PreTrainedModel, teacher: PreTrainedModel | None, device: torch.device, autocast: bool
) -> Iterator[None]:
    """Hold trainable weights in float32, the rest too unless autocast is on; restore all after."""
    models = [model, *([] if teacher is None else [teacher])]
    dtypes = [each.dtype for each in models]
    if not is_sharded(model):
        model.to(device)  # type: ignore[arg-type]
    # the Trainer turns the cache off in the configuration; generation wants it back
    caches = [(c, vars(c).get("use_cache")) for c in (model.config, text_config_of(model.config))]
    # on a CPU in bfloat16, attention in separate steps took two thirds of SDPA's time
    is_eager = autocast and model.device.type == "cpu"
    attention = [(each, each.config._attn_implementation) for each in models if is_eager]
    try:
        for each, _ in attention:
            each.set_attn_implementation("eager")
        for each in [] if autocast else models:
            hold_in_(each, torch.float32)
        yield
    finally:
        for each, name in attention:
            each.set_attn_implementation(name)
        for config, value in caches:
            vars(config).pop("use_cache", None)
            if value is not None:
                config.use_cache = value
    for each, dtype in [] if autocast else zip(models, dtypes, strict=True):
        hold_in_(each, dtype)


def without_autocast(trainer: Trainer) -> Any:
    """Return the trained model with its own forward, which Accelerate had wrapped in autocast."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    return model


def projector_in_every_graph(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Add zero times the projector, so that batches of text alone give it a gradient (for DDP)."""
    paths = Parts(model).family.projector
    parameters = [each for path in paths for each in parameters_below(model, path)]
    if is_sharded(model) or not parameters:  # a sharded one sees images always, or never
        return nullcontext()
    return model.get_input_embeddings().register_forward_hook(
        lambda module, args, embeddings: (
            embeddings + sum((0.0 * each.sum()).to(embeddings.dtype) for each in parameters)
        )
    )


def plain_model(trained: Any) -> PreTrainedModel:
    """Return the transformers model inside a trained one; LoRA's matrices stay beside its own."""
    import peft

    is_peft = isinstance(trained, peft.PeftModel)
    model: PreTrainedModel = trained.get_base_model() if is_peft else trained
    return model


@torch.no_grad()
def merge(trained: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Merge LoRA; return the plain model in ``dtype``, with nothing frozen."""
    plain = plain_model(trained)
    if plain is not trained:
        sharing: AbstractContextManager[None] = nullcontext()
        if is_sharded(plain):
            from torch.distributed.tensor.experimental import implicit_replication

            reshard(trained)
            sharing = implicit_replication()  # each process adds to its own shards
        with sharing:
            plain = trained.merge_and_unload()
    hold_in_(plain, dtype, learning_only=True)
    # torch 2.13 copies a frozen head for each sample when it runs over a slice of states
    model: PreTrainedModel = plain.requires_grad_(True)
    return model


def save_adapter(trained: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the trained weights as a PEFT adapter, with the whole projector in it."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    model, whole, projector = plain_model(trained), list[str](), dict[str, Tensor]()
    for path in Parts(model).family.projector:
        part = part_at(model, path)
        if not isinstance(part, nn.Module):
            continue
        is_list = isinstance(part, nn.ModuleList)
        whole += [f"{path}.{name}" for name, _ in part.named_children()] if is_list else [path]
        for name, value in part.state_dict().items():
            projector[f"base_model.model.{path}.{name}"] = value.to(dtype).contiguous()
    trained.peft_config[trained.active_adapter].modules_to_save = whole or None
    trained.save_pretrained(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    save_file({**load_file(file), **projector}, file)


TRAINED_FILE = "trained.safetensors"
DISTANCES = {"hidden": losses.hidden_l2, "cosine": losses.hidden_cosine}  # of hidden states
SUPERVISION = "supervision"  # key of the supervision in a batch
REST = "rest"  # key of the samples without an image, where others of the batch have one
LEAST_SHARED = 2**30  # bytes of free shared memory that batches from other processes need


class Supervision(TypedDict):
    """Targets of a batch's losses."""

    ids: tuple[str, ...]  # of the samples
    labels: Int[Tensor, "B T"]
    compared: Bool[Tensor, "B T"]  # positions where the student is compared with its teacher


def counts_of(*supervisions: Supervision) -> Float[Tensor, "2"]:
    """Count the positions that sft reads, and those that the other losses read."""
    labels = torch.stack([losses.label_counts(each["labels"]).sum() for each in supervisions])
    compared = torch.stack([each["compared"].sum() for each in supervisions])
    return torch.stack([labels.sum(), compared.sum()]).float()


def collate(processor: Any, positions: Positions, samples: list[Sample]) -> dict[str, Any]:
    """Encode samples with their `Supervision`; those without images come apart, under `REST`."""
    kinds: list[dict[str, Any]] = []
    for has_images in (True, False):
        if not (group := [each for each in samples if bool(each.images) == has_images]):
            continue
        inputs: dict[str, Any] = {**encode_samples(processor, group)}
        labels = inputs.pop("labels")
        compared = valid_tokens(inputs).bool() if positions == "all" else predicts_label(labels)
        ids = tuple(sample.id for sample in group)
        inputs[SUPERVISION] = Supervision(ids=ids, labels=labels, compared=compared)
        kinds.append(inputs)
    return {**kinds[0], REST: kinds[1:]}


def num_workers(device: torch.device) -> int:
    """Count the processes that collate batches while a device trains; 0 for none."""
    shared = Path("/dev/shm")
    if device.type == "cpu" or multiprocessing.get_start_method() != "fork" or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < LEAST_SHARED * num_ranks():
        return 0
    return max(min(4, len(os.sched_getaffinity(0)) // num_ranks() - 1), 0)


class DistillationTrainer(Trainer):
    """The Trainer with a weighted sum of losses, and without its progress bar and log lines.

    The head runs only over positions that a loss reads. A mean over tokens is one over all ranks
    and all accumulated batches. Besides the last hidden states, those after the student's layers
    are compared with ``their_layers`` of the teacher, if given, one for each. ``tokens`` are the
    teacher's ids of the student's tokens, if it has fewer.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel | None,
        config: RecoverConfig,
        their_layers: Sequence[int] = (),
        tokens: Int[Tensor, " V"] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already
        self._recovery = config
        self._reduction: losses.Reduction = "paper" if config.paper_exact else "token_mean"
        self._teacher = teacher
        self._our_layers, self._their_layers = range(len(their_layers)), their_layers
        self._tokens = None if tokens is None else tokens.to(self.args.device)
        self._sums: dict[str, Tensor] = {}
        self._num_sums = 0
        self._step_counts: Tensor | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **kwargs: Any
    ) -> Tensor:
        """Compute the weighted sum of the losses; each is kept for the log."""
        frozen = [tower for tower in _towers(plain_model(self.model)) if not learns(tower)]
        for tower in frozen:  # and so are their statistics
            for module in tower.modules():  # in evaluation mode layers keep all for the gradient
                module.training = isinstance(module, GradientCheckpointingLayer)
        batches, values = [inputs, *inputs.pop(REST)], dict[str, Tensor]()
        supervisions = [batch.pop(SUPERVISION) for batch in batches]
        total, means = counts_of(*supervisions), 1
        if self._step_counts is not None:  # so that the mean over batches is one over tokens
            means = self.accelerator.num_processes * self.current_gradient_accumulation_steps
            total = self._step_counts
        rows = sum(len(wanted["ids"]) for wanted in supervisions)
        for place, (batch, wanted) in enumerate(zip(batches, supervisions, strict=True)):
            scale = counts_of(wanted) / total.clamp_min(1) * means
            of_teacher = len(wanted["ids"]) / rows if self._recovery.paper_exact else scale[1]
            # DDP counts passes: the first alone is its own
            found = self._losses(batch, wanted, None if place else model)
            for name, value in found.items():
                part = value * (scale[0] if name == "sft" else of_teacher)
                values[name] = values[name] + part if place else part
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._num_sums += 1
        weights = self._recovery.loss_weights
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()

    def _losses(
        self, inputs: dict[str, Any], wanted: Supervision, runner: nn.Module | None
    ) -> dict[str, Tensor]:
        """Compute each loss of samples of one kind."""
        student, weights = plain_model(self.model), self._recovery.loss_weights
        tokens, theirs = self._tokens, inputs
        if tokens is not None:
            theirs = {**inputs, "input_ids": tokens[inputs["input_ids"]]}
        with self.accelerator.autocast():
            hidden = hidden_states(student, inputs, self._our_layers, runner=runner)
            parts = {}
            if "sft" in weights:
                parts["sft"] = losses.cross_entropy(hidden[0], head_of(student), wanted["labels"])
            if self._teacher is not None:
                with torch.no_grad():
                    targets = hidden_states(self._teacher, theirs, self._their_layers)
                if not self._recovery.paper_exact:  # the paper's trainer compares all positions
                    hidden = [states[wanted["compared"]][None] for states in hidden]
                    targets = [states[wanted["compared"]][None] for states in targets]
                for name, distance in DISTANCES.items():
                    if name in weights:
                        of = partial(distance, mask=None, reduction=self._reduction)
                        pairs = zip(hidden, targets, strict=True)  # no float32 copy stays
                        each = [checkpoint(of, *pair, use_reentrant=False) for pair in pairs]
                        parts[name] = torch.stack(each).mean()
                whole = head_of(self._teacher)
                head = whole if tokens is None else lambda states: whole(states)[..., tokens]
                ends = (hidden[0], targets[0].to(hidden[0].dtype), head_of(student), head)
                how = (self._recovery.temperature, self._reduction)
                for kind in DIVERGENCES:
                    if kind in weights:
                        parts[kind] = losses.divergence(*ends, None, kind, *how)
        values = torch.stack([value.detach().float() for value in parts.values()])
        for name, number in zip(parts, values.tolist(), strict=True):  # read once
            if math.isfinite(number):
                continue
            where = f"step {self.state.global_step + 1} (samples {', '.join(wanted['ids'])})"
            both = (("", student, inputs), (" of the teacher", self._teacher, theirs))
            for whose, model, read in both:  # a pass of one process of several would wait for them
                if model is not None and not is_sharded(model):
                    with self.accelerator.autocast():
                        layer = first_spoilt_layer(model, read)
                    if layer is not None:
                        where += f", from layer {layer}{whose} on"
                        break
            raise NumericalError(f"loss {name!r} is {number} at {where}")
        return parts

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Take the batches of one optimizer step, and count their positions over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_counts = None
        if batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            kinds = [kind for batch in batches for kind in (batch, *batch[REST])]
            counts = counts_of(*(kind[SUPERVISION] for kind in kinds))
            self._step_counts = self.accelerator.reduce(counts.to(self.args.device), "sum")
        return batches, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss since the last log line."""
        if "loss" in logs and self._num_sums:
            for name, total in self._sums.items():
                mean = self.accelerator.reduce(total / self._num_sums, "mean")
                logs[f"loss_{name}"] = float(mean)
            self._sums, self._num_sums = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint of the trainable weights; the pruned model has all others."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        learning = learning_parameters(self.model)
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in learning}
        save_file(weights, folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in learning_parameters(self.model):
                parameter.copy_(saved[name])

    def restore_finished(self, checkpoint: str) -> bool:
        """Restore weights and history if a checkpoint is that of a training's last step."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint)
        return True


class ShownTraining(TrainerCallback):
    """Show progress with the loss until ``shown`` closes; request a log row after the last step."""

    def __init__(self, shown: ExitStack) -> None:
        self._shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the first step, or after those of a stopped run."""
        shown = steps("train", state.max_steps, state.global_step)
        self._reached = self._shown.enter_context(shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far the training is."""
        control.should_log |= state.global_step >= state.max_steps
        known = [row["loss"] for row in state.log_history if "loss" in row]
        self._reached(state.global_step, f", loss {known[-1]:.4f}" if known else "")


def learning_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the trainable parameters, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
