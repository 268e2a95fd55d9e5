"""Weights of fewer bits in the files of compressed-tensors, which vLLM reads by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from slimvlm.models.parts import projections

SCHEMES = {"int8": "W8A8", "int4": "W4A16", "fp8": "FP8_DYNAMIC"}
"""Names that the library gives to what it writes: bits of weights, bits of activations."""


@contextmanager
def compressed(
    model: PreTrainedModel, to: str, skipped: Sequence[str], group: int
) -> Iterator[dict[str, Any]]:
    """Inside, matrices of decoder layers are small numbers and scales; afterwards, their products.

    A scale is the largest absolute weight of a row (int8, fp8) or of a group of a row (int4) over
    the largest number; weights are rounded to nearest, and no data is needed. int8 and fp8 (e4m3)
    also round activations to 8 bit, token by token, when the model runs.

    Args:
        model: The model, in floating point.
        to: ``int8``, ``int4`` or ``fp8``.
        skipped: Parts whose matrices stay as they are.
        group: Weights of a row that share a scale in int4.

    Yields:
        What the configuration of the checkpoint says about it.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(SCHEMES[to], ["Linear"])
    assert scheme.weights is not None
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = group
    # every reader has its own way to a part: the part's name is what they share
    ignored = sorted({f"re:.*{path.rpartition('.')[2]}.*" for path in skipped})
    settings = QuantizationConfig(config_groups={"decoder": scheme}, ignore=ignored)
    apply_quantization_config(model, settings)
    matrices: list[Any] = [linear for _, _, linear in projections(model)]
    for module in matrices:
        rows = module.weight.detach().float()
        groups = rows.unflatten(1, (-1, scheme.weights.group_size or rows.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    written: dict[str, Any] = json.loads(settings.model_dump_json(exclude_none=True))
    written["quantization_status"] = QuantizationStatus.COMPRESSED.value
    kind = matrices[0].quantization_scheme.format.value
    written["format"] = written["config_groups"]["decoder"]["format"] = kind
    yield written
    compressor.decompress_model(model)
