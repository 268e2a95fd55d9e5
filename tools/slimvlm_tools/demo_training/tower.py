"""Stages 1 and 2 of the demo's training: teach the tower to see, then the projector to name.

Stage 1 stands in for CLIP pretraining: every patch is labelled with what is pasted there. Stage 2
moves projected patches next to the token embeddings of their class name and of their position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from slimvlm.demo.scenes import CELLS, GRID, SCENE_KINDS, make_scene, render
from slimvlm_tools.demo_training.patches import patch_classes, patch_labels

KIND_SHARES = (0.2, 0.4, 0.08, 0.24, 0.08)
BATCH_SIZE = 64
WARMUP = 0.03


def patch_batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields endless batches: pictures (64, 64, 64, 3) in uint8 and patch labels (64, 16)."""
    rng = np.random.default_rng([seed, 1])
    while True:
        pictures, labels = [], []
        for kind_index in rng.choice(len(SCENE_KINDS), size=BATCH_SIZE, p=KIND_SHARES):
            scene = make_scene(SCENE_KINDS[int(kind_index)], rng)
            gain = rng.uniform(0.85, 1.1, size=3)
            pictures.append((np.asarray(render(scene)) * gain).clip(0, 255).astype(np.uint8))
            labels.append(patch_labels(scene))
        yield torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(labels))


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Turns uint8 pictures (batch, 64, 64, 3) into what the tower expects (batch, 3, 64, 64)."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_patches(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the tower's patch features (batch, 16, width), as LLaVA selects them."""
    hidden: torch.Tensor = model.model.vision_tower(pixels).last_hidden_state
    return hidden[:, 1:]


def decayed(progress: float) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero. `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def train_tower(model: Any, steps: int, seed: int) -> float:
    """Stage 1: trains the tower in place on dense patch labels."""
    tower: Any = model.model.vision_tower
    head = nn.Linear(192, len(patch_classes()))
    params = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    recent: list[float] = []
    start = time.time()
    for step, (pictures, labels) in zip(range(steps), patch_batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * decayed(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(encode_patches(model, normalise_pixels(pictures)))
        logits = logits.float().flatten(0, 1)
        target = labels.flatten()
        loss: Any = functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        shown = target > 0
        recent.append(float((logits.argmax(1) == target)[shown].float().mean()) * 100)
        if step % 50 == 49:
            accuracy = float(np.mean(recent[-50:]))
            print(
                f"tower {step + 1}/{steps} loss {float(loss):.3f} patch accuracy {accuracy:.1f} "
                f"{time.time() - start:.0f}s",
                flush=True,
            )
    return float(np.mean(recent[-20:]))


def name_targets(model: Any, tokenizer: Any) -> torch.Tensor:
    """Returns per class and patch the wanted projected vector (class, 16, hidden).

    It is the mean token embedding of the class name plus half the mean of its position's words.
    """
    table = model.get_input_embeddings().weight.detach().float()

    def embed(text: str) -> torch.Tensor:
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        mean: torch.Tensor = table[torch.tensor(ids)].mean(0)
        return mean

    names = torch.stack([embed(name) for name in patch_classes()])
    cells = torch.stack([embed(cell) for cell in CELLS])
    where = [2 * (p // GRID // 2) + p % GRID // 2 for p in range(GRID * GRID)]
    return names[:, None] + 0.5 * cells[torch.tensor(where)][None]


def align_projector(model: Any, tokenizer: Any, steps: int, seed: int) -> float:
    """Stage 2: trains the projector in place so that patches land on their names' embeddings."""
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    targets = name_targets(model, tokenizer)
    variance = float(targets.var())
    recent: list[float] = []
    for step, (pictures, labels) in zip(range(steps), patch_batches(seed + 1), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * decayed(step / steps)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = encode_patches(model, normalise_pixels(pictures))
        projected = projector(features.float())
        known = labels >= 0
        wanted = targets[labels.clamp(min=0), torch.arange(GRID * GRID)]
        regression = ((projected - wanted) ** 2)[known].mean() / variance
        scores = torch.einsum(
            "bpd,cpd->bpc",
            functional.normalize(projected, dim=-1),
            functional.normalize(targets, dim=-1),
        )
        contrast = functional.cross_entropy(scores[known] * 20, labels[known])
        loss = regression + 0.3 * contrast
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown = labels > 0
        recent.append(float((scores.argmax(-1) == labels)[shown].float().mean()) * 100)
        if step % 20 == 19:
            print(
                f"projector {step + 1}/{steps} regression {float(regression):.3f} "
                f"nearest name {np.mean(recent[-20:]):.1f}",
                flush=True,
            )
    return float(np.mean(recent[-20:]))
