"""Bring originals into the classes of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def convert(
    source: Source,
    out: Out,
    vision_tower: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force: bool = False,
) -> None:
    """Write an original LLaVA-1.5, Bunny-v1.0 or Mini-InternVL-Chat as a native checkpoint.

    Logits, token ids and pixels stay those of the original code, which is neither needed nor run.

    Args:
        source: Folder or hub id of the original.
        out: The new checkpoint folder.
        vision_tower: Folder or hub id of the vision tower, for LLaVA and Bunny. Its weights are
            read where the original does not hold them, its description always.
        dtype: Data type of the new files; by default every tensor stays as it is stored.
        force: Replace an existing folder.
    """
    from slimvlm.conversion import convert as write_native

    print(f"checkpoint: {write_native(source, out, vision_tower, force, dtype)}")
