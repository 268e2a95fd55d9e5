"""Trains the second demo model's tower, connector and low-rank delta from packaged data alone.

``python -m slimvlm_tools.tiled_demo.train --out DIR`` takes about two hours on two cores. It can be
killed and started again with the same arguments. As for the first demo, the tower learns to label
what is pasted where (on crops of tiles first, which are cheap), the connector is fitted to land on
the embeddings of names, then both and LoRA on the language model learn to answer, mostly on whole
pictures as one tile, at the end on five tiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from slimvlm.demo.questions import TASKS, Conversation, make_task_scene
from slimvlm.demo.scenes import (
    CELLS,
    SCENE_KINDS,
    Scene,
    make_scene,
    render,
)
from slimvlm_tools.demo_training.batches import Batch, Encoded, Encoder, collate, training_batches
from slimvlm_tools.demo_training.lora import add_lora_, load_lora_, lora_state
from slimvlm_tools.demo_training.patches import patch_classes, patch_labels
from slimvlm_tools.demo_training.tower import KIND_SHARES, decayed
from slimvlm_tools.demo_training.train import save
from slimvlm_tools.tiled_demo.build import (
    SHUFFLE,
    TILE,
    make_base,
    make_processor,
    save_weights,
)
from slimvlm_tools.tiled_demo.build import SIDE as PATCHES

RANK = 16
GROUPS = PATCHES // SHUFFLE  # groups of patches along a tile
CROP = 2  # groups along a crop
QUICK_QUESTIONS = 48
TILES = 5  # of a whole picture, the last one of which is all of it


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training.

    Attributes:
        out: Folder for checkpoints and the trained weights.
        seed: Seed of data and initial weights.
        crop_steps: Batches of crops for the tower.
        tile_steps: Batches of whole tiles for the tower.
        align_steps: Batches for the connector.
        steps: Batches of conversations.
        batch_size: Conversations in a batch.
        tiled_from: Share of the steps after which three of four batches have tiled pictures.
        lora_lr: Peak learning rate of the low-rank tensors and the connector.
        tower_lr: Peak learning rate of the tower beside them.
        save_every: Steps between checkpoints.
        eval_every: Steps between quick evaluations.
    """

    out: Path
    seed: int = 0
    crop_steps: int = 800
    tile_steps: int = 160
    align_steps: int = 300
    steps: int = 720
    batch_size: int = 8
    tiled_from: float = 0.75
    lora_lr: float = 8e-4
    tower_lr: float = 2e-4
    save_every: int = 40
    eval_every: int = 240


# The tower.


class Tiles(NamedTuple):
    """Tiles of scenes with what they show."""

    pixels: torch.Tensor  # (tile, 3, 128, 128)
    patches: torch.Tensor  # class of each patch (tile, 16, 16), or -100
    groups: torch.Tensor  # class of each group of patches (tile, 4, 4), or -100
    cells: torch.Tensor  # quadrant of each group, or -1 on a tile of one quadrant


def labels_of(scene: Scene, side: int) -> NDArray[np.int64]:
    """Labels the patches of a grid over a scene (side, side)."""
    return patch_labels(scene, side).reshape(side, side)


def quadrants(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Splits a grid into its quadrants, in the order of tiles."""
    half = len(labels) // 2
    return [labels[r : r + half, c : c + half] for r in (0, half) for c in (0, half)]


def place_patches_(tower: Any) -> None:
    """Starts the embeddings of positions at sines and cosines of row and column."""
    table = tower.embeddings.position_embedding.weight
    frequencies = torch.exp(-math.log(100.0) * torch.arange(0, 1, 4 / table.shape[1]))
    places = torch.arange(PATCHES**2)
    angles = [place[:, None] * frequencies for place in (places // PATCHES, places % PATCHES)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    table.data.copy_(0.5 * torch.cat(waves, 1))


def tile_batches(
    processor: Any, seed: int, size: int, quadrants_too: bool = True
) -> Iterator[Tiles]:
    """Yields endless batches of whole pictures, and of two quadrants for each picture."""
    rng = np.random.default_rng([seed, 1])
    of_groups = torch.tensor([[2 * (r // 2) + c // 2 for c in range(4)] for r in range(4)])
    while True:
        pixels, patches, groups, cells = [], [], [], []
        count = size // 3 if quadrants_too else size
        for kind in rng.choice(len(SCENE_KINDS), size=count, p=KIND_SHARES):
            scene = make_scene(SCENE_KINDS[int(kind)], rng)
            gain = torch.from_numpy(rng.uniform(0.85, 1.1, size=3)).float()[:, None, None]
            made = processor.image_processor([[render(scene)]], return_tensors="pt")
            tiles = ((made["pixel_values"][0] + 1) * gain - 1).clamp(-1, 1)
            fine = [*quadrants(labels_of(scene, 32)), labels_of(scene, 16)]
            coarse = [*quadrants(labels_of(scene, 8)), labels_of(scene, 4)]
            shown = [i for i in range(4) if (coarse[i] > 0).any()] or [0]
            for index in (4, *rng.choice(shown, size=2)) if quadrants_too else (4,):
                pixels.append(tiles[index])
                patches.append(torch.from_numpy(fine[index].copy()))
                groups.append(torch.from_numpy(coarse[index].copy()))
                cells.append(of_groups if index == 4 else torch.full((4, 4), -1))
        yield Tiles(*map(torch.stack, (pixels, patches, groups, cells)))


def encode_patches(
    tower: Any, pixels: torch.Tensor, corner: tuple[int, int] = (0, 0), side: int = PATCHES
) -> torch.Tensor:
    """Returns features of the patches of a crop of tiles (tile, side, side, width)."""
    seen = torch.ones(len(pixels), PATCHES, PATCHES, dtype=torch.bool)
    embedded = tower.embeddings(pixel_values=pixels, patch_attention_mask=seen)
    top, left = corner
    grid = embedded.unflatten(1, (PATCHES, PATCHES))
    crop = grid[:, top : top + side, left : left + side].flatten(1, 2)
    hidden = tower.encoder(inputs_embeds=crop, attention_mask=None).last_hidden_state
    found: torch.Tensor = tower.post_layernorm(hidden).unflatten(1, (side, side))
    return found


def grouped(features: torch.Tensor) -> torch.Tensor:
    """Joins the patches of each group: (tile, side, side, width) to (tile, groups, groups, C)."""
    tiles, side, _, width = features.shape
    n = side // SHUFFLE
    split = features.view(tiles, n, SHUFFLE, n, SHUFFLE, width).transpose(2, 3)
    return split.reshape(tiles, n, n, SHUFFLE * SHUFFLE * width)


class Labeller(nn.Module):
    """A tower with heads that label its patches and their groups."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        width, classes = tower.config.hidden_size, len(patch_classes())
        self.tower = tower
        self.of_patches = nn.Linear(width, classes)
        self.of_groups = nn.Linear(width * SHUFFLE**2, classes)

    def forward(
        self, tiles: Tiles, corner: tuple[int, int], side: int
    ) -> tuple[torch.Tensor, float]:
        """Returns the loss on a crop of ``side`` patches, and the share of right groups."""
        features = encode_patches(self.tower, tiles.pixels, corner, side)
        (top, left), ends = corner, (corner[0] + side, corner[1] + side)
        of_patches = tiles.patches[:, top : ends[0], left : ends[1]].flatten()
        rows = slice(top // SHUFFLE, ends[0] // SHUFFLE)
        columns = slice(left // SHUFFLE, ends[1] // SHUFFLE)
        of_groups = tiles.groups[:, rows, columns].flatten()
        logits = self.of_groups(grouped(features)).flatten(0, 2)
        loss = functional.cross_entropy(logits, of_groups)
        loss = loss + functional.cross_entropy(self.of_patches(features).flatten(0, 2), of_patches)
        shown = of_groups > 0
        return loss, float((logits.argmax(1) == of_groups)[shown].float().mean())


def train_tower(tower: Any, processor: Any, config: TrainConfig) -> None:
    """Trains the tower in place to label what is pasted where, or resumes that."""
    place_patches_(tower)
    labeller, total = Labeller(tower), config.crop_steps + config.tile_steps
    optimizer = torch.optim.AdamW(
        labeller.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98)
    )
    file, first, recent, start = config.out / "tower.pt", 0, list[float](), time.time()
    if file.is_file():
        saved = torch.load(file)
        labeller.load_state_dict(saved["state"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    rng = np.random.default_rng([config.seed, 2, first])
    crops, wholes = (
        tile_batches(processor, config.seed + 1000 * first + i, size, quadrants_too=i > 0)
        for i, size in enumerate((64, 15))
    )
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * decayed(step / total)
        if step < config.crop_steps:
            top, left = (SHUFFLE * int(v) for v in rng.integers(GROUPS - CROP + 1, size=2))
            loss, right = labeller(next(crops), (top, left), CROP * SHUFFLE)
        else:
            loss, right = labeller(next(wholes), (0, 0), PATCHES)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(labeller.parameters(), 1.0)
        optimizer.step()
        recent.append(100 * right)
        if (step + 1) % 20 == 0:
            mean, seconds = float(np.mean(recent[-20:])), time.time() - start
            told = f"loss {float(loss):.3f} groups {mean:.1f} % right {seconds:.0f}s"
            print(f"tower {step + 1}/{total} {told}", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == total:
            state = {"state": labeller.state_dict(), "optimizer": optimizer.state_dict()}
            save(file, {**state, "step": step + 1})


# The connector.


def name_targets(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean embeddings of the names of classes and of quadrants."""
    table = model.get_input_embeddings().weight.detach().float()

    def embed(text: str) -> torch.Tensor:
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        mean: torch.Tensor = table[torch.tensor(ids)].mean(0)
        return mean

    names, cells = ([embed(name) for name in each] for each in (patch_classes(), CELLS))
    return torch.stack(names), torch.stack([*cells, torch.zeros_like(cells[0])])


@torch.no_grad()
def align_connector(model: Any, tokenizer: Any, processor: Any, config: TrainConfig) -> None:
    """Fits the connector, a matrix, by least squares: groups land on their names' embeddings."""
    file, connector = config.out / "connector.pt", model.model.connector
    if file.is_file():
        connector.load_state_dict(torch.load(file))
        return
    (weight,) = connector.parameters()
    names, cells = name_targets(model, tokenizer)
    gram = torch.zeros(weight.shape[1], weight.shape[1])
    cross = torch.zeros(weight.shape[1], weight.shape[0])
    batches = tile_batches(processor, config.seed + 7, 15)
    for _, tiles in zip(range(config.align_steps), batches, strict=False):
        features = grouped(encode_patches(model.model.vision_model, tiles.pixels)).flatten(0, 2)
        labels, places = tiles.groups.flatten(), tiles.cells.flatten()
        known = labels >= 0
        rows = features[known]
        gram += rows.T @ rows
        cross += rows.T @ (names[labels[known]] + 0.5 * cells[places[known]])
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    weight.copy_(torch.linalg.solve(gram.double(), cross.double()).T)
    tiles = next(batches)
    features = encode_patches(model.model.vision_model, tiles.pixels)
    projected, labels = connector(features.flatten(1, 2)).flatten(0, 1), tiles.groups.flatten()
    scores = functional.normalize(projected, dim=-1) @ functional.normalize(names, dim=-1).T
    right = (scores.argmax(-1) == labels)[labels > 0].float().mean()
    print(f"connector: {100 * float(right):.1f} % of groups next to their name", flush=True)
    save(file, connector.state_dict())


# Conversations.


class Eyes(NamedTuple):
    """How pictures become tiles and tokens: whole, or in tiles."""

    processor: Any
    encoder: Encoder

    @classmethod
    def of(cls, tokenizer: Any, longest_edge: int) -> Eyes:
        """Makes both for a size of pictures."""
        processor = make_processor(tokenizer, longest_edge)
        blank = render(make_scene("single", np.random.default_rng(0)))
        made = processor(text="<image>", images=[[blank]], add_special_tokens=False)
        return cls(processor, Encoder(tokenizer, made["input_ids"][0]))


def answer_logits(model: Any, eyes: Eyes, batch: Batch) -> torch.Tensor:
    """Returns logits (target, vocabulary) at the places that have a target."""
    embeds = model.get_input_embeddings()(batch.ids)
    if batch.pixels is not None:
        pictures = [[each.numpy()] for each in batch.pixels]
        made = eyes.processor.image_processor(pictures, return_tensors="pt")
        pixels = made["pixel_values"].flatten(0, 1)
        features = encode_patches(model.model.vision_model, pixels)
        projected = model.model.connector(features.flatten(1, 2))
        places = (batch.ids == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, projected)
    hidden = model.model.text_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask.float(),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    chosen = hidden[batch.targets >= 0]
    return functional.linear(chosen, model.get_input_embeddings().weight)


@torch.no_grad()
def quick_scores(model: Any, eyes: Eyes) -> dict[str, float]:
    """Returns, per benchmark, how often the whole reply is the greedy one, in percent."""
    scores: dict[str, float] = {}
    for name, task in TASKS.items():
        if task.metric == "perplexity":
            continue
        questions = task.load(QUICK_QUESTIONS)
        items = list[Encoded]()
        for index, asked in enumerate(questions):
            told = Conversation(make_task_scene(task, index), ((asked.prompt, asked.answers[0]),))
            items.append(eyes.encoder.encode(told, chat=False))
        hits = 0
        for start in range(0, len(items), 8):
            batch = collate(items[start : start + 8])
            right = torch.ones_like(batch.targets, dtype=torch.bool)
            known = batch.targets >= 0
            logits = answer_logits(model, eyes, batch)
            right[known] = logits.argmax(-1) == batch.targets[known]
            hits += int(right.all(1).sum())
        scores[name] = 100 * hits / len(items)
    return scores


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns everything that was trained, under the names that `build` reads."""
    state = lora_state(model.model.text_model)
    for part in ("vision_model", "connector"):
        tensors = getattr(model.model, part).state_dict()
        state |= {f"{part}.{name}": value for name, value in tensors.items()}
    return state


def train_joint(model: Any, tokenizer: Any, config: TrainConfig) -> None:
    """Trains tower, connector and low-rank tensors to answer, with checkpoints."""
    inner = model.model
    low = [p for p in inner.text_model.parameters() if p.requires_grad]
    groups = [
        {"params": low, "peak": config.lora_lr},
        {"params": list(inner.connector.parameters()), "peak": config.lora_lr},
        {"params": list(inner.vision_model.parameters()), "peak": config.tower_lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01, betas=(0.9, 0.98))
    file, first, average, start = config.out / "checkpoint.pt", 0, 0.0, time.time()
    if file.is_file():
        saved = torch.load(file)
        load_lora_(inner.text_model, saved["state"])
        for part in ("vision_model", "connector"):
            own = {n.removeprefix(f"{part}."): v for n, v in saved["state"].items()}
            getattr(inner, part).load_state_dict(own, strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    whole, tiled = (Eyes.of(tokenizer, edge) for edge in (TILE, 2 * TILE))
    sources = [
        training_batches(eyes.encoder, config.seed + i, config.batch_size, first)
        for i, eyes in enumerate((whole, tiled))
    ]
    for step in range(first, config.steps):
        is_tiled = step >= config.tiled_from * config.steps and step % 4 > 0
        eyes, parts = (whole, tiled)[is_tiled], next(sources[is_tiled])
        total = sum(float(part.weights[part.targets >= 0].sum()) for part in parts)
        value = 0.0
        optimizer.zero_grad()
        for batch in parts:
            known = batch.targets >= 0
            logits = answer_logits(model, eyes, batch)
            losses = functional.cross_entropy(logits, batch.targets[known], reduction="none")
            loss: Any = (losses * batch.weights[known]).sum() / total
            loss.backward()
            value += float(loss)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * decayed(step / config.steps)
        nn.utils.clip_grad_norm_((p for g in groups for p in g["params"]), 1.0)  # type: ignore[attr-defined]
        optimizer.step()
        average = 0.95 * average + 0.05 * value if average else value
        done = step + 1
        if done % 10 == 0:
            seconds = time.time() - start
            print(f"joint {done}/{config.steps} loss {average:.3f} {seconds:.0f}s", flush=True)
        if done % config.save_every == 0 or done == config.steps:
            state = trained_state(model)
            save(file, {"state": state, "optimizer": optimizer.state_dict(), "step": done})
            save_weights(state, config.out / "weights.safetensors")
        if done % config.eval_every == 0:
            for name, each in (("whole", whole), ("tiled", tiled)):
                scores = quick_scores(model, each)
                told = " ".join(f"{k} {v:.0f}" for k, v in scores.items())
                print(f"quick {name} {told}", flush=True)


def train(config: TrainConfig) -> Path:
    """Trains the model."""
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model, tokenizer = make_base()
    processor = make_processor(tokenizer)
    model.set_attn_implementation("sdpa")
    train_tower(model.model.vision_model, processor, config)
    align_connector(model, tokenizer, processor, config)
    text = model.model.text_model
    text.requires_grad_(False)
    add_lora_(text, RANK, torch.float32)
    train_joint(model, tokenizer, config)
    return config.out / "weights.safetensors"


if __name__ == "__main__":
    print(train(tyro.cli(TrainConfig, prog=f"python -m {__spec__.name}", description=__doc__)))
