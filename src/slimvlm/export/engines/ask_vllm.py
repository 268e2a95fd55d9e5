"""Asks vLLM. Run by vLLM's own interpreter, which need not have slimvlm.

Usage: ``python ask_vllm.py FOLDER...``, each with a ``request.json``; writes ``replies.json``
there.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(asked: dict[str, Any]) -> list[list[int]]:
    """Greedy replies to the prompts of a request."""
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


def main(folders: list[str]) -> None:
    """Answer every request, in this one process; what does not load is written down."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    for folder in map(Path, folders):
        written: dict[str, Any] = {"version": vllm.__version__}
        try:
            written["replies"] = answer(json.loads((folder / "request.json").read_text()))
        except Exception as error:  # whatever it does not like
            written["error"] = " ".join(str(error).split()) or repr(error)
        (folder / "replies.json").write_text(json.dumps(written))
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
