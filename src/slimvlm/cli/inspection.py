"""Look at a model before anything is done to it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from slimvlm.cli.options import Model
from slimvlm.cli.printing import console, print_json


def inspect(model: Model, json: bool = False) -> None:
    """Show what a model is made of: parts, parameters, units, legal widths, memory.

    Reads the configuration only, never the weights.

    Args:
        model: Folder, hub id, or demo.
        json: Print JSON.
    """
    from slimvlm.models.load import anatomy
    from slimvlm.runs import tables as summary

    found = anatomy(model)
    if json:
        extra = {
            "backbone_params": found.backbone_params,
            "total_params": found.total_params,
            "legal_kv_heads": found.legal_kv_heads(),
        }
        print_json({**found.to_dict(), **extra})
    else:
        console().print(summary.as_table(["", model], summary.anatomy_rows(found)))


def verify(folder: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
    """Check every file of a checkpoint against the list that was written with it.

    Names each missing, changed or extra file, and then ends with exit code 2.

    Args:
        folder: A checkpoint that slimvlm wrote, or a run folder.
        json: Print JSON.
    """
    from slimvlm.pruning.manifest import verify as check

    found = check(folder)
    if json:
        print_json(asdict(found))
    found.require_whole()
    if not json:
        print(f"{found.folder}: {found.num_files} files are as they were written")
