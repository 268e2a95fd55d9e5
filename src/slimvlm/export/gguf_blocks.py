"""GGUF files with K formats: 4 to 6 bits a weight, as llama.cpp's own quantiser would choose them.

Blocks are computed by llama.cpp itself, the copy in the package ``xllamacpp``; which tensor gets
which format is decided here, after ``llama_tensor_get_type`` of llama.cpp (MIT).
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slimvlm.core.errors import ConfigError

ENGINE = "xllamacpp"
KType = Literal["q4_k_m", "q5_k_m", "q6_k"]
FORMATS: dict[str, str] = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}
"""The format of most weights, by the file's."""
SMALLER_ROWS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What rows get that are no multiple of 256, if they are one of 32; all others become F16."""
_BETTER = "Q6_K"
_SENSITIVE = ("attn_v.weight", "ffn_down.weight")
"""Weights of which llama.cpp stores some layers in a better format."""


def require_engine(outtype: str) -> None:
    """Find out whether blocks can be computed.

    Raises:
        ConfigError: If they cannot.
    """
    if find_spec(ENGINE) is None:
        raise ConfigError(f"outtype {outtype!r} needs: pip install 'slimvlm[gguf]'")


def format_of(name: str, row: int, num_layers: int, kind: KType, is_tied: bool) -> str:
    """The format of a tensor of a language model.

    Args:
        name: Its name in the file, such as ``blk.0.attn_v.weight``.
        row: Length of its rows.
        num_layers: Layers of the model.
        kind: The file's format.
        is_tied: Whether the embedding is the head, too.
    """
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    is_head = name == "output.weight" or (name == "token_embd.weight" and is_tied)
    is_better = is_head or (name.endswith(_SENSITIVE) and _is_better(layer, num_layers))
    wanted = _BETTER if is_better else FORMATS[kind]
    if row % 256:
        wanted = "F16" if row % 32 else SMALLER_ROWS[wanted]
    return wanted


def _is_better(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def quantize_file(source: Path, out: Path, kind: KType) -> None:
    """Write a GGUF file of a language model again, with its matrices in a K format.

    Args:
        source: A file in 16 or 32 bit.
        out: The new one.
        kind: Its format.
    """
    gguf: Any = import_module("gguf")
    read = gguf.GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in read.tensors}
    written = gguf.GGUFWriter(out, _text(read, "general.architecture"))
    _copy_facts(gguf, read, written, kind)
    num_layers = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blk."))
    is_tied = "output.weight" not in tensors
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or not name.endswith("weight"):
            written.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = format_of(name, values.shape[-1], num_layers, kind, is_tied)
        if wanted == "F16":
            written.add_tensor(name, values.astype(np.float16))
            continue
        target = gguf.GGMLQuantizationType[wanted]
        size = gguf.GGML_QUANT_SIZES[target]
        blocks = _blocks(values, int(target), size)
        written.add_tensor(name, blocks, raw_dtype=target)
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()


def _text(read: Any, key: str) -> str:
    return str(read.fields[key].contents())


def _copy_facts(gguf: Any, read: Any, written: Any, kind: KType) -> None:
    """Everything that the file says beside its tensors, but for how they are stored."""
    known = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, field in read.fields.items():
        if not key.startswith(known):
            inner = field.types[1] if len(field.types) > 1 else None
            written.add_key_value(key, field.contents(), field.types[0], inner)
    written.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    written.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _blocks(values: Any, target: int, size: tuple[int, int]) -> Any:
    """Rows of float32 numbers as rows of blocks, by llama.cpp."""
    library = ctypes.CDLL(import_module(f"{ENGINE}.{ENGINE}").__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    values = np.ascontiguousarray(values, dtype=np.float32)
    row = values.shape[-1]
    length, num_bytes = size
    found = np.empty((*values.shape[:-1], row // length * num_bytes), dtype=np.uint8)
    library.ggml_quantize_chunk(
        ctypes.c_int(target),
        values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        found.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(values.size // row),
        ctypes.c_int64(row),
        None,
    )
    return found
