"""Asks an engine. Run by the engine's own interpreter, which need not have slimvlm.

Usage: ``python ask.py MODULE FOLDER...``, the module being ``vllm`` or ``xllamacpp``. Each folder
has a ``request.json``; ``replies.json`` is written beside it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def ask_vllm(asked: dict[str, Any]) -> list[list[int]]:
    """Token ids of greedy replies, in this one process."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm
    from PIL import Image

    model = vllm.LLM(
        asked["checkpoint"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=asked["max_length"],
        max_num_seqs=8,
        **({"limit_mm_per_prompt": {"image": 1}} if asked["sees"] else {}),
    )
    prompts = []
    for prompt in asked["prompts"]:
        given = {"prompt_token_ids": prompt["ids"]}
        if prompt["picture"]:
            given["multi_modal_data"] = {"image": Image.open(prompt["picture"])}
        prompts.append(given)
    how = vllm.SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"])
    return [list(found.outputs[0].token_ids) for found in model.generate(prompts, how)]


def leave_vllm() -> None:
    """Make room for the next model."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def ask_llama_cpp(asked: dict[str, Any]) -> list[str]:
    """Texts of greedy replies."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = asked["checkpoint"]
    settings.n_ctx, settings.warmup = asked["max_length"], False
    whole = xllamacpp.ggml_type.GGML_TYPE_F32  # keys and values would be float16
    settings.cache_type_k = settings.cache_type_v = whole
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    how = {"n_predict": asked["max_new_tokens"], "temperature": 0.0, "top_k": 1}
    replies = (server.handle_completions({"prompt": p["ids"], **how}) for p in asked["prompts"])
    return [reply["choices"][0]["text"] for reply in replies]


ENGINES: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[], Any]]] = {
    "vllm": (ask_vllm, leave_vllm),
    "xllamacpp": (ask_llama_cpp, gc.collect),
}
"""How each is asked, and left."""


def main(module: str, folders: list[str]) -> None:
    """Answer every request; what does not load is written down."""
    ask, leave = ENGINES[module]
    for folder in map(Path, folders):
        written: dict[str, Any] = {}
        try:
            written["replies"] = ask(json.loads((folder / "request.json").read_text()))
        except Exception as error:  # whatever it does not like
            written["error"] = " ".join(str(error).split()) or repr(error)
        written["version"] = getattr(import_module(module), "__version__", None) or version(module)
        (folder / "replies.json").write_text(json.dumps(written))
        leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
