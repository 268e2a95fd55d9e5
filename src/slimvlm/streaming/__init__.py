"""Score and prune checkpoints that do not fit in memory, one decoder layer at a time."""

from slimvlm.streaming.opened import OpenCheckpoint, open_checkpoint
from slimvlm.streaming.pruned import prune_checkpoint
from slimvlm.streaming.scoring import Request, score_checkpoint, score_opened

__all__ = [
    "OpenCheckpoint",
    "Request",
    "open_checkpoint",
    "prune_checkpoint",
    "score_checkpoint",
    "score_opened",
]
