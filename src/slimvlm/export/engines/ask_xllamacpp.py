"""Asks llama.cpp. Run by the interpreter that has xllamacpp, which need not have slimvlm.

Usage: ``python ask_xllamacpp.py FOLDER...``, each with a ``request.json``; writes ``replies.json``
there.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def answer(asked: dict[str, Any]) -> list[str]:
    """Greedy replies to the prompts of a request."""
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


def main(folders: list[str]) -> None:
    """Answer every request; what does not load is written down."""
    for folder in map(Path, folders):
        written: dict[str, Any] = {"version": version("xllamacpp")}
        try:
            written["replies"] = answer(json.loads((folder / "request.json").read_text()))
        except Exception as error:  # whatever it does not like
            written["error"] = " ".join(str(error).split()) or repr(error)
        (folder / "replies.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(sys.argv[1:])
