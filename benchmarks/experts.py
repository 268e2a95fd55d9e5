"""Which experts to keep: REAP, frequency, magnitude and chance on a mixture that learned something.

Command:  .venv/bin/python benchmarks/experts.py --out runs/experts
Expect:   five minutes on one core, most of them for training, which a second run does not repeat.

A Qwen3-VL-MoE of 4 layers with 16 experts each, of which a token takes 2, learns two things from
nothing: to name the colour of the marked cell of a 6 x 6 picture, and the most frequent one (36
picture tokens, 4 of text), and to go on with Python's docstrings, byte by byte. A share of the
experts then goes; nothing is trained after that. Each calibration seed draws other pictures and
passages. "pictures" and "text" are the losses of unseen answers and bytes, in nats, and "right" how
many answers are. --balance is the weight of the loss that makes tokens take all experts alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import slimvlm as sv
from slimvlm.core.files import write_text
from slimvlm.data.roles import IGNORE
from slimvlm.demo.questions import load_passages
from slimvlm.runs.tables import as_markdown

CELLS, SIDE = 6, 16
"""Cells along a picture's side, and pixels along a cell's: one token each."""
COLOURS = "rgbcmyw"
IMAGE, VOCAB = 256, 264
"""The token of a picture's patch, and how many tokens there are: bytes and a few."""
LENGTH, BATCH, UNSEEN = 64, 16, 24
"""Bytes of a passage, samples of a batch, and unseen batches of each kind."""
SHARES, SEEDS = (0.25, 0.5), (0, 1, 2)
CRITERIA = ("reap", "frequency", "magnitude", "random")
BLIND = {"image": 0.0, "prompt": 1.0, "answer": 1.0}
Batch = dict[str, Tensor]


def make_model(balance: float, seed: int) -> Any:
    torch.manual_seed(seed)
    config = hf.Qwen3VLMoeConfig(
        text_config={
            **{"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 128},
            **{"output_router_logits": True, "router_aux_loss_coef": balance},
            **{"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
                "mrope_interleaved": True,
            },
        },
        vision_config={
            **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
            **{"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1},
            **{"in_channels": 3, "out_hidden_size": 64, "num_position_embeddings": 144},
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        **{"video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259},
        tie_word_embeddings=False,
    )
    return hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def pictures(generator: torch.Generator) -> Batch:
    """Pictures of coloured cells: what colour has the marked one, and which is most frequent."""
    size, count = (BATCH, CELLS * CELLS), len(COLOURS)
    kinds = torch.randint(count, size, generator=generator)
    most = torch.randint(count, (BATCH, 1), generator=generator)
    kinds = torch.where(torch.rand(size, generator=generator) < 0.4, most, kinds)
    marked = torch.randint(CELLS * CELLS, (BATCH, 1), generator=generator)
    answers = torch.cat([kinds.gather(1, marked), most], 1)
    bits = torch.tensor([[(c >> k) & 1 for k in range(3)] for c in (4, 2, 1, 3, 5, 6, 7)])
    cells = bits[kinds].float() * 2 - 1  # [B, cell, channel]
    patches = cells[:, :, None, :, None] + 0.3 * torch.randn(*size, 4, 3, 64, generator=generator)
    patches[torch.arange(BATCH), marked[:, 0], 0] += 3.0
    pixels = patches.reshape(-1, 3 * 64)
    ids = torch.full((BATCH, CELLS * CELLS + 4), IMAGE)
    for row, (one, other) in enumerate(answers.tolist()):
        text = f"d{COLOURS[one]}m{COLOURS[other]}"
        ids[row, -4:] = torch.tensor(list(text.encode()))
    labels = torch.full_like(ids, IGNORE)
    labels[:, -3::2] = ids[:, -3::2]
    grid = torch.tensor([[1, 2 * CELLS, 2 * CELLS]]).expand(BATCH, 3)
    return {
        **{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)},
        **{"pixel_values": pixels, "image_grid_thw": grid},
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def passages(rng: random.Random, texts: Sequence[bytes]) -> Batch:
    """Pieces of texts."""
    rows = []
    for text in rng.choices(texts, weights=[len(t) for t in texts], k=BATCH):
        start = rng.randrange(len(text) - LENGTH)
        rows.append(list(text[start : start + LENGTH]))
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def load_texts() -> tuple[list[bytes], list[bytes]]:
    """Docstrings to learn from, and unseen ones."""
    found = [text.encode() for _, text in load_passages() if len(text.encode()) > 2 * LENGTH]
    random.Random(0).shuffle(found)
    return found[len(found) // 10 :], found[: len(found) // 10]


def both(seed: int, texts: Sequence[bytes], count: int) -> Iterator[tuple[Batch, Batch]]:
    """Pairs of a batch of pictures and one of passages."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in range(count):
        yield pictures(generator), passages(rng, texts)


def train(model: Any, texts: Sequence[bytes], steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step, pair in enumerate(both((1 + 2 * seed) * 10**6, texts, steps)):
        losses = [model(**batch).loss for batch in pair]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: " + ", ".join(f"{loss.item():.3f}" for loss in losses), flush=True)


@torch.no_grad()
def measured(model: Any, texts: Sequence[bytes]) -> dict[str, float]:
    """Losses of unseen answers and bytes, and the share of right answers."""
    losses: dict[str, list[float]] = {"pictures": [], "text": [], "right": []}
    for seen, read in both(2 * 10**6, texts, UNSEEN):
        logits = model(**seen).logits[:, -4::2].flatten(0, 1)
        answers = seen["input_ids"][:, -3::2].flatten()
        losses["pictures"].append(float(torch.nn.functional.cross_entropy(logits, answers)))
        losses["right"].append(float((logits.argmax(1) == answers).float().mean()))
        logits = model(**read).logits[:, :-1].flatten(0, 1)
        losses["text"].append(
            float(torch.nn.functional.cross_entropy(logits, read["input_ids"][:, 1:].flatten()))
        )
    return {name: statistics.fmean(values) for name, values in losses.items()}


def tried() -> Iterator[tuple[str, str, Mapping[str, float] | None]]:
    """Names, criteria and weights of tokens."""
    for criterion in CRITERIA:
        yield criterion, criterion, None
    for criterion in ("reap", "frequency"):
        yield f"{criterion}, without picture tokens", criterion, BLIND


def row_of(folder: Path, share: float, seed: int, how: Any, data: Any) -> dict[str, Any]:
    """Remove a share of the experts and measure what is left."""
    known, unseen, calibration = data
    name, criterion, weights = how
    model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.config.text_config.output_router_logits = False
    options = {"seed": seed} if criterion == "random" else {}
    shown = [batch for pair in both(seed, known, calibration) for batch in pair]
    scores = sv.score(model, shown, criterion, weights, **options)
    plan = sv.make_plan(sv.anatomy(model), scores, 0.0, experts=share)
    sv.prune_(model, plan)
    return {"share": share, "criterion": name, "seed": seed, **measured(model, unseen)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and the spread of the sum of both losses."""
    lines = []
    for share, name in dict.fromkeys((row["share"], row["criterion"]) for row in rows):
        same = [row for row in rows if (row["share"], row["criterion"]) == (share, name)]
        sums = [row["pictures"] + row["text"] for row in same]
        means = {key: statistics.fmean(row[key] for row in same)
                 for key in ("pictures", "right", "text")}  # fmt: skip
        lines.append([
            *(f"{share:.0%}", name, f"{means['pictures']:.3f}", f"{means['right']:.0%}"),
            *(f"{means['text']:.3f}", f"{statistics.fmean(sums):.3f}"),
            f"{min(sums):.3f} to {max(sums):.3f}",
        ])  # fmt: skip
    header = ["experts gone", "chosen by", "pictures", "right", "text", "both", "over seeds"]
    return as_markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0, help="of the model's training")
    parser.add_argument("--calibration", type=int, default=4, help="batches of each kind")
    asked = parser.parse_args()
    known, unseen = load_texts()
    folder = asked.out / "model"
    if not folder.exists():
        model = make_model(asked.balance, asked.seed)
        train(model, known, asked.steps, asked.seed)
        model.save_pretrained(folder)
    data = (known, unseen, asked.calibration)
    whole = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    whole.config.text_config.output_router_logits = False
    rows = [{"share": 0.0, "criterion": "original", "seed": 0, **measured(whole, unseen)}]
    for share in SHARES:
        for how in tried():
            for seed in SEEDS:
                rows.append(row_of(folder, share, seed, how, data))
                print(json.dumps(rows[-1]), flush=True)
    write_text(asked.out / "rows.json", json.dumps(rows, indent=1) + "\n")
    write_text(asked.out / "table.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
