"""Write a checkpoint with a narrower residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from slimvlm.config import CalibrationConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model, load_model, read_samples
from slimvlm.verbs.printing import note

NARROWING_FILE = "slimvlm_narrowing.json"
_GOOD_MULTIPLE = 128


def narrow(
    model: Model,
    out: Path,
    hidden_size: int,
    calibration: Annotated[CalibrationConfig, INLINE] = CalibrationConfig(),
    criterion: Literal["activation", "magnitude", "random"] = "activation",
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write a checkpoint whose hidden states have fewer channels; prune and recover it afterwards.

    Norms divide by the mean over channels, so even an unused channel is missed: recover what comes
    out.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        hidden_size: Channels to keep; multiples of 128 run fastest.
        calibration: What activation reads.
        criterion: What keeps a channel: its size after the norms, the size of its weights, chance.
        seed: For random.
        force: Replace an existing folder.
    """
    import json

    from slimvlm.calibrate import calibration_batches
    from slimvlm.checkpoint import load_config, save
    from slimvlm.narrowing import best_channels, narrow_, narrowed_config, ratio_of, score_channels
    from slimvlm.outputs import require_free, write_text
    from slimvlm.roles import parse_token_weights

    require_free(out, force)
    before = load_config(model, calibration.trust_remote_code)
    ratio = ratio_of(before, narrowed_config(before, hidden_size))
    needs_data = criterion == "activation"
    if needs_data and calibration.data is None:
        raise ConfigError("criterion 'activation' needs --data")
    samples = read_samples(calibration) if needs_data else []
    given = calibration.token_weights
    weights = None if given is None else parse_token_weights(given)
    if hidden_size % _GOOD_MULTIPLE:
        note(
            f"hidden_size {hidden_size} is no multiple of {_GOOD_MULTIPLE}: slower than it could be"
        )
    loaded, processor = load_model(model, calibration)
    batches = calibration_batches(processor, samples, 4, "channels") if needs_data else ()
    channels = best_channels(score_channels(loaded, batches, criterion, weights, seed), hidden_size)
    narrow_(loaded, channels)
    record = json.dumps({"criterion": criterion, "ratio": ratio, "channels": channels})
    save(
        loaded,
        processor,
        out,
        force=force,
        also=lambda folder: write_text(folder / NARROWING_FILE, record + "\n"),
    )
    print(f"removes {ratio:.2%} of the backbone: hidden size {hidden_size}")
    print(f"checkpoint: {out}")
