"""The Hugging Face Trainer with our loss: a weighted sum, some of it against a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from slimvlm.core.errors import NumericalError
from slimvlm.core.options import DIVERGENCES, Divergence, RecoverConfig
from slimvlm.core.progress import LoggedStage
from slimvlm.models import losses
from slimvlm.models.hidden import head_of, hidden_states, is_sharded
from slimvlm.scoring.batches import first_spoilt_layer
from slimvlm.training.supervision import SUPERVISION, Supervision, as_teacher_reads
from slimvlm.training.trainable import plain_model

TRAINED_FILE = "trained.safetensors"


class DistillationTrainer(Trainer):
    """The Trainer with a weighted sum of losses.

    Hidden states are caught on their way, and the head runs only over positions that a loss looks
    at: logits of a whole batch never exist. A mean over tokens is one over all ranks and all
    accumulated batches, so that these change the memory needed and nothing else.

    Args:
        teacher: The teacher in memory, if there is one.
        config: Losses, their weights and options.
        layer_pairs: Decoder layers to compare, as (student's, teacher's), besides the end.
        lengths: A length for each training sample, to group by; None for random batches.
        tokens: The teacher's number of each of the student's tokens, if that has fewer. A text of
            the student's is one of the teacher's, too, in longer pieces perhaps; logits are
            compared over the tokens that both have.
        arguments: The Trainer's own.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel | None,
        config: RecoverConfig,
        layer_pairs: Sequence[tuple[int, int]] = (),
        lengths: Sequence[int] | None = None,
        tokens: Int[Tensor, " V"] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already
        self._recovery = config
        self._teacher = teacher
        self._our_layers = [ours for ours, _ in layer_pairs]
        self._their_layers = [theirs for _, theirs in layer_pairs]
        self._lengths = lengths
        self._tokens = None if tokens is None else tokens.to(self.args.device)
        self._sums: dict[str, Tensor] = {}
        self._weight = 0
        self._step_counts: Tensor | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **kwargs: Any
    ) -> Tensor:
        """Weighted sum of the configured losses; each is kept for the log."""
        wanted: Supervision = inputs.pop(SUPERVISION)
        student = plain_model(self.model)
        with self.accelerator.autocast():
            hidden = hidden_states(student, inputs, self._our_layers, runner=model)
            parts = self._parts(student, hidden, inputs, wanted)
        self._require_finite(parts, student, inputs, wanted)
        parts = self._as_shares(parts, wanted)
        # the Trainer takes the mean of held-out losses over samples
        weight = 1 if student.training else len(wanted.ids)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * value.detach().float()
        self._weight += weight
        weights = self._recovery.loss_weights
        return torch.stack([weights[name] * value for name, value in parts.items()]).sum()

    def _require_finite(
        self,
        parts: dict[str, Tensor],
        student: PreTrainedModel,
        inputs: dict[str, Tensor],
        wanted: Supervision,
    ) -> None:
        """Stop at a loss that is not, and say at which step, in which samples and from where."""
        values = torch.stack([value.detach().float() for value in parts.values()])
        for name, value in zip(parts, values.tolist(), strict=True):  # read once
            if not math.isfinite(value):
                where = f"step {self.state.global_step + 1} (samples {', '.join(wanted.ids)})"
                origin = self._origin_of_nan(student, inputs)
                raise NumericalError(f"loss {name!r} is {value} at {where}{origin}")

    def _origin_of_nan(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> str:
        """The first decoder layer that spoils a batch, as the end of a message."""
        for whose, model in (("", student), (" of the teacher", self._teacher)):
            if model is None or is_sharded(model):  # a pass of one process would wait for others
                continue
            read = inputs if model is student else as_teacher_reads(inputs, self._tokens)
            with self.accelerator.autocast():
                layer = first_spoilt_layer(model, read)
            if layer is not None:
                return f", from layer {layer}{whose} on"
        return ""

    def _parts(
        self,
        student: PreTrainedModel,
        hidden: list[Tensor],
        inputs: dict[str, Tensor],
        wanted: Supervision,
    ) -> dict[str, Tensor]:
        """Each loss by name."""
        config, parts = self._recovery, {}
        if "sft" in config.loss_weights:
            parts["sft"] = losses.cross_entropy(hidden[0], head_of(student), wanted.labels)
        if self._teacher is None and wanted.offline is None:
            return parts
        ours, theirs = self._compared(hidden, wanted), self._of_teacher(inputs, wanted)
        for name, distance in (("hidden", losses.hidden_l2), ("cosine", losses.hidden_cosine)):
            if name in config.loss_weights:
                parts[name] = losses.mean_over_layers(
                    distance, ours, theirs, reduction=self._reduction
                )
        for kind in DIVERGENCES:
            if kind in config.loss_weights:
                parts[kind] = self._divergence(kind, student, ours[0], theirs)
        return parts

    def _compared(self, hidden: list[Tensor], wanted: Supervision) -> list[Tensor]:
        """The positions that count, as one long sequence; the study's trainer counts all."""
        if self._recovery.paper_exact:
            return hidden
        return [states[wanted.compared][None] for states in hidden]

    def _of_teacher(self, inputs: dict[str, Tensor], wanted: Supervision) -> list[Tensor]:
        """The teacher's hidden states to compare with."""
        if self._teacher is not None:
            read = as_teacher_reads(inputs, self._tokens)
            with torch.no_grad():
                hidden = hidden_states(self._teacher, read, self._their_layers)
            return self._compared(hidden, wanted)
        assert wanted.offline is not None
        return [wanted.offline[None]]

    def _divergence(
        self,
        kind: Divergence,
        student: PreTrainedModel,
        ours: Tensor,
        theirs: list[Tensor],
    ) -> Tensor:
        """A divergence from a teacher in memory, or from stored hidden states."""
        config, head = self._recovery, head_of(student)
        theirs_too = head if self._teacher is None else head_of(self._teacher)
        if self._teacher is not None and self._tokens is not None:
            theirs_too = partial(_some_logits, theirs_too, self._tokens)
        return losses.divergence(
            ours,
            theirs[0].to(ours.dtype),
            head,
            theirs_too,
            kind=kind,
            temperature=config.temperature,
            beta=config.jsd_beta,
            reduction=self._reduction,
        )

    @property
    def _reduction(self) -> losses.Reduction:
        return "paper" if self._recovery.paper_exact else "token_mean"

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Take the batches of one optimizer step, and count their positions over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_counts = None
        if batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            counts = torch.stack([batch[SUPERVISION].counts for batch in batches]).sum(0)
            self._step_counts = self.accelerator.reduce(counts.to(self.args.device), "sum")
        return batches, num_items

    def _as_shares(self, parts: dict[str, Tensor], wanted: Supervision) -> dict[str, Tensor]:
        """Each mean over a batch, scaled so that the mean over batches is one over tokens."""
        if self._step_counts is None or not plain_model(self.model).training:
            return parts
        num_means = self.accelerator.num_processes * self.current_gradient_accumulation_steps
        scale = wanted.counts / self._step_counts.clamp_min(1) * num_means
        of_teacher = torch.ones_like(scale[1]) if self._recovery.paper_exact else scale[1]
        return {
            name: value * (scale[0] if name == "sft" else of_teacher)
            for name, value in parts.items()
        }

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a held-out batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss; training's own running means wait."""
        waiting = self._sums, self._weight
        self._sums, self._weight = {}, 0
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        self._sums, self._weight = waiting
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss since the last log line, or over the held-out samples."""
        prefix = next((p for p in ("loss", "eval_loss") if p in logs), None)
        if prefix is not None and self._weight:
            for name, total in self._sums.items():
                mean = self.accelerator.reduce(total / self._weight, "mean")
                logs[f"{prefix}_{name}"] = float(mean)
            self._sums, self._weight = {}, 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self._lengths is None:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(self._lengths, size * self.args.world_size, self._recovery.seed)

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

    def restore(self, checkpoint: str) -> None:
        """What a finished training ends with, from the checkpoint of its last step."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _some_logits(head: losses.Head, tokens: Int[Tensor, " V"], hidden: Tensor) -> Tensor:
    """What a head says to some tokens; a softmax over them is the one that they share."""
    return head(hidden)[..., tokens]


class Bar(ProgressCallback):
    """A progress bar in a terminal with the current loss; the original prints logs on stdout."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss at the bar's end."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class LoggedTraining(TrainerCallback):
    """The same for a log: a line at the beginning, now and then, and at the end."""

    def __init__(self) -> None:
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step, or the first one after those of an earlier run."""
        self._stage = LoggedStage("train", state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self._loss = f", loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far the training is, if that is due."""
        self._stage.reached(state.global_step, self._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All steps are done."""
        self._stage.end()


class LastLog(TrainerCallback):
    """The steps after the last log line are logged, too."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line after the last step."""
        control.should_log |= state.global_step >= state.max_steps


def learning_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What learns, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


class _ByLength(Sampler[int]):
    """Random order in which neighbours have similar lengths; the same for a seed and an epoch."""

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed = list(lengths), group, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: list[int] = get_length_grouped_indices(
            self._lengths, self._group, generator=generator
        )
        return iter(order)
