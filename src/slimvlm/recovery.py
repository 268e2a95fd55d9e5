"""Train a pruned model back towards its teacher: one loop, the loss a weighted sum."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from slimvlm import losses
from slimvlm.chat import encode_samples
from slimvlm.checkpoint import load_processor
from slimvlm.config import RecoverConfig
from slimvlm.data import subset
from slimvlm.errors import ConfigError, NumericalError
from slimvlm.geometry import family_of, final_norm, read_anatomy, text_config_of
from slimvlm.outputs import write_text
from slimvlm.roles import role_masks
from slimvlm.samples import Sample
from slimvlm.trainable import (
    keep_learning_in_float32_,
    merge,
    plain_model,
    prepare_training,
)

TRAINED_FILE = "trained.safetensors"
REQUEST_FILE = "request.json"


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        steps: Log rows: step, loss, its components, learning rate.
        num_samples: Samples in the fraction that was used.
        sample_ids: Their names, in order.
        trained_params: Parameters that learned.
    """

    steps: tuple[dict[str, float], ...]
    num_samples: int
    sample_ids: tuple[str, ...]
    trained_params: int


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    dataset: Sequence[Sample],
    config: RecoverConfig,
    processor: Any = None,
    work: str | Path | None = None,
) -> History:
    """Train a model in place; LoRA is merged into its weights at the end.

    Args:
        model: The pruned model.
        teacher: The original model; only needed if the loss has ``hidden``, ``kl`` or ``rkl``.
        dataset: Conversations to learn from.
        config: What learns, from which loss, on which share of the data.
        processor: The model's processor or tokenizer; by default the one in its folder.
        work: Folder for resumable checkpoints. If it holds some, training goes on from the last
            one, and the result equals an uninterrupted run's.

    Raises:
        ConfigError: If the loss needs a teacher and there is none.
        NumericalError: If the loss becomes NaN or infinite; the message names the step.
    """
    processor = processor or load_processor(model.config._name_or_path, model.config)
    if processor is None:
        raise ConfigError("recover needs the model's processor or tokenizer")
    weights = config.loss_weights
    if teacher is None and set(weights) != {"sft"}:
        raise ConfigError(f"loss {config.loss!r} needs a teacher (--teacher)")
    if teacher is not None:
        _require_same_width(model, teacher)
    samples = subset(list(dataset), config.fraction, config.seed)
    with ExitStack() as stack:
        temporary = stack.enter_context(TemporaryDirectory())
        folder = Path(work) if work is not None else Path(temporary)
        _require_same_request(folder, config, samples)
        stack.enter_context(_kept_use_cache(model))
        return _train(
            model, teacher, samples, config, processor, folder, resumable=work is not None
        )


def _train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    samples: list[Sample],
    config: RecoverConfig,
    processor: Any,
    folder: Path,
    resumable: bool,
) -> History:
    """Run the Trainer and hand the plain model back."""
    torch.manual_seed(config.seed)
    bf16 = computes_bfloat16(model.device) if config.bf16 is None else config.bf16
    dtype = model.dtype
    trained = prepare_training(model, config)
    if bf16:
        keep_learning_in_float32_(trained)
    num_trained = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    trainer = DistillationTrainer(
        model=trained,
        teacher=teacher if set(config.loss_weights) != {"sft"} else None,
        config=config,
        args=_training_arguments(config, folder, resumable, model.device, bf16),
        train_dataset=samples,
        data_collator=lambda batch: encode_samples(processor, batch),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    with _fast_attention(model, teacher, bf16):
        trainer.train(resume_from_checkpoint=_last_complete_checkpoint(folder))
    merged = merge(_without_autocast(trainer), dtype)
    assert merged is model, "merging must give back the model that was handed in"
    model.eval()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return History(
        steps=tuple(rows),
        num_samples=len(samples),
        sample_ids=tuple(sample.id for sample in samples),
        trained_params=num_trained,
    )


class DistillationTrainer(Trainer):
    """The Hugging Face Trainer with our loss.

    The final hidden state is caught at the last norm, and the head runs only over positions that
    a loss looks at: logits of a whole batch never exist.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, config: RecoverConfig, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already
        self._recovery = config
        self._teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()
            teacher.to(self.args.device)  # type: ignore[arg-type]
        self._sums: dict[str, float] = {}
        self._count = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *unused: Any, **kwargs: Any
    ) -> Tensor:
        """Weighted sum of the configured losses; each is kept for the log."""
        labels = inputs.pop("labels")
        student = plain_model(self.model)
        with self.accelerator.autocast():
            hidden = _final_hidden(model, student, inputs)
            parts = self._parts(student, hidden, inputs, labels)
        weights = self._recovery.loss_weights
        for name, value in parts.items():
            if not torch.isfinite(value):
                step = self.state.global_step + 1
                raise NumericalError(f"loss {name!r} is {value.item()} at step {step}")
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1
        return torch.stack([weights[name] * value for name, value in parts.items()]).sum()

    def _parts(
        self, student: PreTrainedModel, hidden: Tensor, inputs: dict[str, Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        weights = self._recovery.loss_weights
        parts: dict[str, Tensor] = {}
        if "sft" in weights:
            parts["sft"] = _sft(student, hidden, labels)
        if self._teacher is None:
            return parts
        with torch.no_grad():
            target = _final_hidden(self._teacher, self._teacher, inputs)
        mask = _kd_mask(student, inputs, labels, self._recovery.kd_on)
        reduction: losses.Reduction = "paper" if self._recovery.paper_exact else "token_mean"
        if "hidden" in weights:
            parts["hidden"] = losses.hidden_l2(hidden, target, mask, reduction)
        for name, divergence in (("kl", losses.kl), ("rkl", losses.reverse_kl)):
            if name in weights:
                whole = self._recovery.paper_exact
                parts[name] = divergence(
                    _head(student, hidden if whole else hidden[mask][None]),
                    _head(self._teacher, target if whole else target[mask][None]),
                    temperature=self._recovery.temperature,
                    reduction=reduction,
                )
        return parts

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Checkpoints hold what learns; everything else is in the pruned model already."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        learning = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in learning_parameters(self.model)
        }
        save_file(learning, folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in learning_parameters(self.model):
                parameter.copy_(saved[name])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss since the last log line."""
        if "loss" in logs and self._count:
            logs.update({f"loss_{k}": v / self._count for k, v in self._sums.items()})
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)


class _Bar(ProgressCallback):
    """A progress bar on stderr with the current loss; the original prints logs on stdout."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


def _require_same_width(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    ours, theirs = read_anatomy(model), read_anatomy(teacher)
    for name in ("hidden_size", "vocab_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"teacher: {name} is {getattr(theirs, name)}, the model's is {getattr(ours, name)}"
            )


def _require_same_request(folder: Path, config: RecoverConfig, samples: list[Sample]) -> None:
    """A folder with checkpoints belongs to one request; another one must not go on there."""
    request = {"config": asdict(config), "samples": [sample.id for sample in samples]}
    written = json.dumps(request, indent=1)
    path = folder / REQUEST_FILE
    if path.exists() and path.read_text() != written:
        raise ConfigError(
            f"training folder {str(folder)!r} belongs to a run with other options or data. Remove "
            "it, or give those options again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, written)


def _last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose writing was not cut short."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if (path / TRAINER_STATE_NAME).is_file() and (path / TRAINED_FILE).is_file()
    ]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest is not None else None


@contextmanager
def _kept_use_cache(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer turns the cache off in the configuration; generation wants it back."""
    configs = (model.config, text_config_of(model.config))
    before = [vars(config).get("use_cache") for config in configs]
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            vars(config).pop("use_cache", None)
            if value is not None:
                config.use_cache = value


def learning_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What learns, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _without_autocast(trainer: Trainer) -> Any:
    """The trained model with its own forward again, which Accelerate had wrapped in autocast."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    return model


@contextmanager
def _fast_attention(
    model: PreTrainedModel, teacher: PreTrainedModel | None, bf16: bool
) -> Iterator[None]:
    """Plain attention on a CPU in bfloat16, where it took two thirds of SDPA's time."""
    if model.device.type != "cpu" or not bf16:
        yield
        return
    models = [m for m in (model, teacher) if m is not None]
    before = [m.config._attn_implementation for m in models]
    try:
        for m in models:
            m.set_attn_implementation("eager")
        yield
    finally:
        for m, implementation in zip(models, before, strict=True):
            m.set_attn_implementation(implementation)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _training_arguments(
    config: RecoverConfig, folder: Path, resumable: bool, device: torch.device, bf16: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        save_strategy="steps" if resumable else "no",
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=False,
        gradient_checkpointing=config.gradient_checkpointing or None,
    )


def _final_hidden(runner: nn.Module, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden state after the last norm, caught while ``runner`` (which may wrap) runs."""
    with _caught(final_norm(model)) as caught:
        if isinstance(runner, DistributedDataParallel):
            runner(**inputs, use_cache=False, logits_to_keep=1)
        else:  # the head would only be in the way
            model.base_model(**inputs, use_cache=False)
    return caught[0]


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        yield outputs
    finally:
        handle.remove()


def _sft(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the head run over labelled positions only."""
    counted = labels[:, 1:] != losses.IGNORE
    logits = _head(model, hidden[:, :-1][counted]).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:][counted])


def _head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_submodule(family_of(model.config.model_type).head)(hidden)
    cap = getattr(text_config_of(model.config), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _kd_mask(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, kd_on: str
) -> Tensor:
    """Positions that distillation compares; an answer token is compared where it is predicted."""
    if kd_on == "answer":
        predicts = torch.zeros_like(labels, dtype=torch.bool)
        predicts[:, :-1] = labels[:, 1:] != losses.IGNORE
        return predicts
    roles = role_masks(model.config, inputs)
    text = roles["prompt"] | roles["answer"]
    return text if kd_on == "text" else text | roles["image"]
