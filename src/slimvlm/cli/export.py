"""What becomes of a finished model: quantize, export, bench, convert, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.cli.options import INLINE, Model, check_model, load_model
from slimvlm.cli.printing import console, note, print_json
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import LoadConfig, Workload


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

    from slimvlm.export import serving
    from slimvlm.models.anatomy import read_anatomy
    from slimvlm.models.classes import empty_model, is_quantized
    from slimvlm.models.load import load_config
    from slimvlm.runs.tables import as_table

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
    from slimvlm.export.gguf import export_gguf

    for line in export_gguf(model, out, outtype, force):
        note(line)
    print(f"language backbone: {out}")


def quantize(
    model: Model,
    out: Path,
    to: Literal["int8", "int4"] = "int8",
    backend: Literal["auto", "torchao", "bitsandbytes"] = "auto",
    device: str | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a checkpoint whose decoder layers have weights of 8 or 4 bits.

    Tower, projector, embeddings and head stay as they are. Quantise last: the result cannot be
    pruned or trained.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        to: Type of the weights.
        backend: Library; auto is torchao, but for int4 on a CPU, which needs bitsandbytes.
        device: Where to quantise, such as cpu or cuda:1; default the first GPU, else the CPU.
        force: Replace an existing folder.
        json: Print JSON.
    """
    from dataclasses import asdict

    from slimvlm.export.quantize import quantize as run
    from slimvlm.runs.tables import size

    done = run(model, out, to, backend, device, force)
    if json:
        print_json({**asdict(done), "saved": done.saved})
        return
    before, after = size(done.bytes_before), size(done.bytes_after)
    print(f"{done.to} by {done.backend}: weights {before} -> {after} ({done.saved:.1%} less)")
    print(f"checkpoint: {out}; loading it needs {done.backend}")


def bench(
    model: Model,
    baseline: str | None = None,
    workload: Annotated[Workload, INLINE] = Workload(),
    loading: Annotated[LoadConfig, INLINE] = LoadConfig(),
    device: str | None = None,
    json: bool = False,
) -> None:
    """Time reading and writing, count FLOPs and memory; with a baseline, against the ideal.

    Prompts are random tokens, so the vision tower is not timed. Model and baseline run in turn in
    one process, and speed-ups are medians of neighbouring runs.

    Args:
        model: Folder, hub id, or demo.
        baseline: The model before pruning.
        workload: What to time.
        loading: How models are read.
        device: Where to run, such as cpu or cuda:1; default the first GPU, else the CPU.
        json: Print JSON.
    """
    from slimvlm.evaluation.bench import bench as run
    from slimvlm.evaluation.bench import bench_rows
    from slimvlm.runs import tables as summary

    names = (model, *((baseline,) if baseline is not None else ()))
    for name in names:
        check_model(name, loading)
    small, *large = (load_model(name, loading, device)[0] for name in names)
    result = run(small, large[0] if large else None, workload, names)
    if json:
        print_json(result.to_dict())
        return
    title = f"{result.dtype} on {result.device}, {result.threads} CPU threads"
    console().print(summary.as_table(*bench_rows(result), title=title))
    for measured in filter(None, (result.baseline, result.model)):
        for line in measured.warnings:
            note(f"{measured.model}: {line}")


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
    from slimvlm_tools.convert import convert as write_native

    print(f"checkpoint: {write_native(source, out, vision_tower, force, dtype)}")


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
    from slimvlm.export.hub import push as upload

    print(upload(folder, repo_id, private))
