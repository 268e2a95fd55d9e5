"""Make a finished model run elsewhere, or say why it would not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slimvlm.errors import ConfigError
from slimvlm.verbs.options import Model
from slimvlm.verbs.printing import console, note, print_json


def export(
    model: Model,
    format: Literal["gguf"] = "gguf",
    out: Path | None = None,
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = "bf16",
    check: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Write the language backbone for llama.cpp, or check where the model can be served.

    Args:
        model: Folder, hub id, or demo.
        format: Format of the file: gguf (needs slimvlm[gguf]).
        out: The new file.
        outtype: How the file stores weights.
        check: Instead of a file: report what vllm, sglang, gguf or tp=N (N GPUs that share every
            layer) make of the shape. Reads the configuration only.
        force: Replace an existing file.
        json: Print JSON.
    """
    if bool(check) == (out is not None):
        raise ConfigError("export needs either --out or --check")
    if out is not None:
        _write(model, out, outtype, force)
        return
    from dataclasses import asdict

    from slimvlm import serving
    from slimvlm.checkpoint import load_config
    from slimvlm.configs import empty_model, is_quantized
    from slimvlm.geometry import read_anatomy
    from slimvlm.summary import as_table

    config = load_config(model)
    found = serving.check(read_anatomy(empty_model(config)), check, is_quantized(config))
    if json:
        print_json([asdict(finding) for finding in found])
        return
    header = ["target", "", "about", "found", "what to do"]
    rows = [[f.target, f.level, f.rule, f.what, f.advice] for f in found]
    console().print(as_table(header, rows))


def _write(
    model: str, out: Path, outtype: Literal["f32", "f16", "bf16", "q8_0"], force: bool
) -> None:
    from slimvlm.gguf_export import export_gguf

    for line in export_gguf(model, out, outtype, force):
        note(line)
    print(f"language backbone: {out}")
