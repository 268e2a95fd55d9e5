"""Verbs of one model or two: inspect, compare, chat, bench, export, quantize, convert."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.cli.options import Model
from slimvlm.cli.printing import note, print_json, print_table, show
from slimvlm.core.errors import ConfigError, printable
from slimvlm.core.options import DeviceOptions, LoadConfig, OutType, Workload


def inspect(model: Model, json: bool = False) -> None:
    """Show what a model is made of: parts, parameters, units, legal widths, memory.

    Reads the configuration only, never the weights.
    """
    from slimvlm.models.load import anatomy
    from slimvlm.runs.tables import anatomy_rows

    found = anatomy(model)
    if json:
        extra = ("backbone_params", "total_params")
        values = {**asdict(found), **{name: getattr(found, name) for name in extra}}
        print_json({**values, "legal_kv_heads": found.legal_kv_heads()})
    else:
        print_table(["", model], anatomy_rows(found))


def compare(
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    tasks: str = "demo",
    limit: int | None = None,
    out: Path | None = None,
    loading: LoadConfig = LoadConfig(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Set two models side by side, answer by answer: both right, lost, gained, both wrong.

    Args:
        a: The original: a result file of evaluate --out, or a model.
        b: The other one, likewise.
        tasks: Tasks that models are asked; those of result files are in the files.
        limit: Only the first so many questions of each task, for models.
        out: One HTML file with every lost answer and its picture.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.evaluation.compare import comparison_json, comparison_rows
    from slimvlm.runs.report import comparison_html
    from slimvlm.runs.verbs import side_by_side

    if out is not None:
        require_free(out, force)
    found = side_by_side(a, b, tasks, limit, loading)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_html(found, f"What {found.name_b} lost and gained"))
    notes = [f"{name} is not compared: {why}" for name, why in found.left_out.items()]
    notes = [found.note, *notes] if found.note else notes
    title = f"A: {found.name_a}   B: {found.name_b}"
    show(json, partial(comparison_json, found), partial(comparison_rows, found), title, notes)


def chat(
    model: Model,
    question: Annotated[str, tyro.conf.Positional],
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    other: str | None = None,
    max_new_tokens: int = 64,
    loading: LoadConfig = LoadConfig(),
    json: bool = False,
) -> None:
    """Ask one model, or two side by side.

    Args:
        question: What to ask.
        image: A picture to show; give it again for more.
        other: A second model to ask the same.
        max_new_tokens: Longest answer.
    """
    from slimvlm.data.samples import Question
    from slimvlm.evaluation.ask import answer
    from slimvlm.models.load import check_models, load_as

    if missing := [str(path) for path in image if not path.is_file()]:
        raise ConfigError(f"image {missing[0]!r}: no such file")
    names = [model, *([other] if other is not None else [])]
    check_models(loading, *names)
    asked = [Question("chat", question, ("",), tuple(image))]
    replies = {name: answer(*load_as(loading, name), asked, max_new_tokens)[0] for name in names}
    if json:
        print_json(replies)
        return
    for name, reply in replies.items():
        print(printable(f"{name}: {reply}" if other is not None else reply))


def bench(
    model: Model,
    baseline: str | None = None,
    workload: Workload = Workload(),
    loading: LoadConfig = LoadConfig(),
    json: bool = False,
) -> None:
    """Time reading and writing, count FLOPs and memory; with a baseline, against the ideal.

    Prompts are random tokens, so the vision tower is not timed. Model and baseline run in turn, and
    speed-ups are medians of neighbouring runs.

    Args:
        baseline: The model before pruning.
    """
    from slimvlm.evaluation.bench import bench as run
    from slimvlm.evaluation.bench import bench_rows
    from slimvlm.models.load import check_models, load_as

    names = (model, *((baseline,) if baseline is not None else ()))
    check_models(loading, *names)
    small, *large = (load_as(loading, name)[0] for name in names)
    found = run(small, large[0] if large else None, workload, names)
    title = f"{found.dtype} on {found.device}, {found.threads} CPU threads"
    sides = filter(None, (found.baseline, found.model))
    notes = [f"{side.model}: {line}" for side in sides for line in side.warnings]
    show(json, found.to_dict, partial(bench_rows, found), title, notes)


def export(
    model: Model,
    format: Literal["gguf"] = "gguf",
    out: Path | None = None,
    outtype: OutType = "bf16",
    original: str | None = None,
    check: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Write files for llama.cpp, or check where the model can be served.

    The file holds the language backbone. Vision tower and projector go into a second file, with
    mmproj- before its name, for models whose vision tower llama.cpp's converter can write.

    Args:
        format: Format of the file: gguf (needs slimvlm[gguf]).
        out: The new file.
        outtype: How the file stores weights.
        original: The original of a model that lost tokens: llama.cpp knows its tokenizer.
        check: Instead of a file: report what vllm, sglang, gguf, openvino, onnx, mlx or tp=N (N
            GPUs that share every layer) make of the shape. Reads the configuration only.
    """
    if bool(check) == (out is not None):
        raise ConfigError("export needs either --out or --check")
    if out is not None:
        from slimvlm.export.gguf import export_gguf

        exported = export_gguf(model, out, outtype, force, original)
        for line in exported.losses:
            note(line)
        print(f"language backbone: {exported.text}")
        if exported.pictures is not None:
            print(f"vision tower: {exported.pictures}")
        return
    from slimvlm.export import serving
    from slimvlm.models.anatomy import read_anatomy
    from slimvlm.models.load import empty_model, is_quantized, load_config

    config = load_config(model)
    found = serving.check(read_anatomy(empty_model(config)), check, is_quantized(config))
    if json:
        print_json([asdict(finding) for finding in found])
        return
    rows = [[f.target, f.level, f.rule, f.what, f.seen or "source", f.advice] for f in found]
    print_table(["target", "", "about", "found", "known from", "what to do"], rows)


def quantize(
    model: Model,
    out: Path,
    to: Literal["int8", "int4", "fp8"] = "int8",
    backend: Literal["auto", "torchao", "bitsandbytes", "compressed-tensors"] = "auto",
    place: DeviceOptions = DeviceOptions(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a checkpoint whose decoder layers have weights of 8 or 4 bits.

    Tower, projector, embeddings and head stay as they are. Quantise last: the result cannot be
    pruned or trained.

    Args:
        out: The new checkpoint folder.
        to: Type of the weights.
        backend: Library; auto is torchao, but bitsandbytes for int4 on a CPU and compressed-tensors
            for fp8. What compressed-tensors writes is what vLLM reads best.
    """
    from slimvlm.export.quantize import quantize as run
    from slimvlm.runs.tables import size

    done = run(model, out, to, backend, place.device, force)
    if json:
        print_json({**asdict(done), "saved": done.saved})
        return
    before, after = size(done.bytes_before), size(done.bytes_after)
    print(f"{done.to} by {done.backend}: weights {before} -> {after} ({done.saved:.1%} less)")
    print(f"checkpoint: {out}; loading it needs {done.backend}")


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
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
    """
    from slimvlm_tools.convert import convert as write_native

    print(f"checkpoint: {write_native(source, out, vision_tower, force, dtype)}")
