"""Trains the demo model's tower, projector and low-rank delta from nothing but packaged data.

``python -m slimvlm_tools.demo_training.train --out DIR --seed 0`` takes about 80 minutes on one
core with bf16 matrix units. It can be killed and started again with the same arguments. Three
stages: the tower learns to label patches, the projector to land on name embeddings (:mod:`.tower`),
then tower, projector and LoRA on every linear layer of the language model learn to answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from slimvlm.core.files import new_file
from slimvlm.demo.build import IMAGE_TOKEN_ID, make_base
from slimvlm.demo.questions import TASKS, Conversation, make_task_scene
from slimvlm_tools.demo_training.batches import Batch, Encoder, collate, training_batches
from slimvlm_tools.demo_training.lora import add_lora_, load_lora_, lora_state
from slimvlm_tools.demo_training.tower import (
    align_projector,
    decayed,
    encode_patches,
    normalise_pixels,
    train_tower,
)

QUICK_QUESTIONS = 48


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the demo's training.

    Attributes:
        out: Folder for checkpoints and the exported delta.
        seed: Seed of data and initial weights.
        tower_steps: Batches of stage 1.
        align_steps: Batches of stage 2.
        steps: Batches of stage 3.
        batch_size: Conversations in a batch of stage 3.
        lora_lr: Peak learning rate of the low-rank tensors; the projector's too.
        tower_lr: Peak learning rate of the tower in stage 3.
        save_every: Steps between checkpoints.
        eval_every: Steps between quick evaluations.
    """

    out: Path
    seed: int = 0
    tower_steps: int = 2600
    align_steps: int = 300
    steps: int = 1080
    batch_size: int = 8
    lora_lr: float = 8e-4
    tower_lr: float = 2e-4
    save_every: int = 100
    eval_every: int = 300


def freeze_backbone_(model: Any) -> None:
    """Turns the language model into frozen bf16 with trainable low-rank additions."""
    text = model.model.language_model
    for parameter in text.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.bfloat16()
    add_lora_(text)
    model.set_attn_implementation("eager")


def embed_batch(model: Any, batch: Batch) -> torch.Tensor:
    """Returns token embeddings with projected patches in the image places, in bf16."""
    embeds: torch.Tensor = model.get_input_embeddings()(batch.ids)
    if batch.pixels is None:
        return embeds
    with torch.autocast("cpu", torch.bfloat16):
        features = encode_patches(model, normalise_pixels(batch.pixels))
        projected = model.model.multi_modal_projector(features)
    places = (batch.ids == IMAGE_TOKEN_ID)[..., None].expand_as(embeds)
    return embeds.masked_scatter(places, projected.to(embeds.dtype))


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Returns logits (target, vocabulary) at the places that have a target."""
    hidden = model.model.language_model(
        inputs_embeds=embed_batch(model, batch),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    chosen = hidden[batch.targets >= 0]
    return functional.linear(chosen, model.get_input_embeddings().weight).float()


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the weighted sum of the cross-entropy at answer places."""
    known = batch.targets >= 0
    losses = functional.cross_entropy(
        answer_logits(model, batch), batch.targets[known], reduction="none"
    )
    return (losses * batch.weights[known]).sum()


@torch.no_grad()
def quick_scores(model: Any, encoder: Encoder) -> dict[str, float]:
    """Returns, per benchmark, how often the whole reply is the greedy one, in percent."""
    scores: dict[str, float] = {}
    for name, task in TASKS.items():
        if task.metric == "perplexity":
            continue
        questions = task.load(QUICK_QUESTIONS)
        scenes = [make_task_scene(task, i) for i in range(len(questions))]
        items = [
            encoder.encode(Conversation(scene, ((asked.prompt, asked.answers[0]),)), chat=False)
            for scene, asked in zip(scenes, questions, strict=True)
        ]
        hits = 0
        for start in range(0, len(items), 32):
            batch = collate(items[start : start + 32])
            right = torch.ones_like(batch.targets, dtype=torch.bool)
            known = batch.targets >= 0
            right[known] = answer_logits(model, batch).argmax(-1) == batch.targets[known]
            hits += int(right.all(1).sum())
        scores[name] = 100 * hits / len(items)
    return scores


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns everything that was trained, under the names that `build` reads."""
    state = lora_state(model.model.language_model)
    for part in ("vision_tower", "multi_modal_projector"):
        tensors = getattr(model.model, part).state_dict()
        state |= {f"{part}.{k}": v for k, v in tensors.items() if v.is_floating_point()}
    return state


def load_trained_(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Puts tensors from `trained_state` into a model prepared by `freeze_backbone_`."""
    load_lora_(model.model.language_model, state)
    for part in ("vision_tower", "multi_modal_projector"):
        prefix = f"{part}."
        tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        getattr(model.model, part).load_state_dict(tensors, strict=False)


def export_delta(state: dict[str, torch.Tensor], path: Path) -> None:
    """Writes trained tensors in half precision."""
    save_file({k: v.half().contiguous() for k, v in state.items()}, path)


def _make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    low = [p for p in model.model.language_model.parameters() if p.requires_grad]
    groups = [
        {"params": low, "peak": config.lora_lr},
        {"params": list(model.model.multi_modal_projector.parameters()), "peak": config.lora_lr},
        {"params": list(model.model.vision_tower.parameters()), "peak": config.tower_lr},
    ]
    return torch.optim.AdamW(groups, lr=config.lora_lr, weight_decay=0.01, betas=(0.9, 0.98))


def save(path: Path, value: object) -> None:
    """Writes a checkpoint, under a temporary name first."""
    with new_file(path) as part:
        torch.save(value, part)


def prepare_tower(model: Any, tokenizer: Any, config: TrainConfig) -> None:
    """Runs stages 1 and 2, or loads what an earlier run of them left."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    if not _load_module(tower, config.out / "tower.pt"):
        right = train_tower(model, config.tower_steps, config.seed)
        print(f"tower: {right:.1f} % of patches right", flush=True)
        save(config.out / "tower.pt", tower.state_dict())
    if not _load_module(projector, config.out / "projector.pt"):
        right = align_projector(model, tokenizer, config.align_steps, config.seed)
        print(f"projector: {right:.1f} % of patches next to their name", flush=True)
        save(config.out / "projector.pt", projector.state_dict())


def _load_module(module: nn.Module, file: Path) -> bool:
    if not file.is_file():
        return False
    module.load_state_dict(torch.load(file))
    return True


def _resume(model: Any, optimizer: torch.optim.Optimizer, file: Path) -> int:
    """Loads a checkpoint if there is one and returns the number of steps done."""
    if not file.is_file():
        return 0
    saved = torch.load(file)
    load_trained_(model, saved["state"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _take_step(
    model: Any, parts: list[Batch], optimizer: torch.optim.Optimizer, progress: float
) -> float:
    """Updates the trained tensors once, from one batch, and returns the mean loss."""
    total = sum(float(part.weights[part.targets >= 0].sum()) for part in parts)
    value = 0.0
    optimizer.zero_grad()
    for part in parts:
        loss: Any = batch_loss(model, part) / total
        loss.backward()
        value += float(loss)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * decayed(progress)
    nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), 1.0)
    optimizer.step()
    return value


def train_joint(model: Any, tokenizer: Any, config: TrainConfig) -> None:
    """Stage 3: trains tower, projector and low-rank tensors, with checkpoints every few minutes."""
    console = Console(width=160)
    encoder = Encoder(tokenizer)
    optimizer = _make_optimizer(model, config)
    first = _resume(model, optimizer, config.out / "checkpoint.pt")
    batches = training_batches(encoder, config.seed, config.batch_size, first)
    average, start = 0.0, time.time()
    with Progress(console=console) as bars:
        bar = bars.add_task("joint", total=config.steps, completed=first)
        for done, parts in zip(range(first + 1, config.steps + 1), batches, strict=False):
            loss = _take_step(model, parts, optimizer, (done - 1) / config.steps)
            average = 0.95 * average + 0.05 * loss if average else loss
            bars.advance(bar)
            if done % 10 == 0:
                seconds = time.time() - start
                console.print(f"joint {done}/{config.steps} loss {average:.3f} {seconds:.0f}s")
            if done % config.save_every == 0 or done == config.steps:
                state = trained_state(model)
                saved = {"state": state, "optimizer": optimizer.state_dict(), "step": done}
                save(config.out / "checkpoint.pt", saved)
                export_delta(state, config.out / "delta.safetensors")
            if done % config.eval_every == 0:
                scores = quick_scores(model, encoder)
                console.print("quick " + " ".join(f"{k} {v:.0f}" for k, v in scores.items()))


def train_demo(config: TrainConfig) -> Path:
    """Trains the demo model."""
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model, tokenizer = make_base()
    prepare_tower(model, tokenizer, config)
    freeze_backbone_(model)
    train_joint(model, tokenizer, config)
    return config.out / "delta.safetensors"


if __name__ == "__main__":
    print(train_demo(tyro.cli(TrainConfig, prog=f"python -m {__spec__.name}", description=__doc__)))
