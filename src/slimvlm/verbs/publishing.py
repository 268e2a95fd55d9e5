"""Checkpoints for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def push(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_ID")],
    private: bool = False,
) -> None:
    """Upload a checkpoint and its card to the Hugging Face hub.

    Needs a token: hf auth login, or HF_TOKEN.

    Args:
        folder: A checkpoint, or a run folder of compress.
        repo_id: owner/name; made if it does not exist.
        private: Make a new repository private.
    """
    from slimvlm.hub import push as upload

    print(upload(folder, repo_id, private))
