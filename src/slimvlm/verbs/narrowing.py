"""Write a checkpoint with a narrower residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from slimvlm.config import CalibrationConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model, load_model, read_samples
from slimvlm.verbs.printing import note


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
    from slimvlm.calibrate import calibration_batches
    from slimvlm.cards import CardFacts
    from slimvlm.checkpoint import load_config, save
    from slimvlm.narrowing import narrow_to_, narrowing_ratio
    from slimvlm.outputs import require_free
    from slimvlm.roles import parse_token_weights

    require_free(out, force)
    narrowing_ratio(load_config(model, calibration.trust_remote_code), hidden_size)
    needs_data = criterion == "activation"
    if needs_data and calibration.data is None:
        raise ConfigError("criterion 'activation' needs --data")
    samples = read_samples(calibration, model) if needs_data else []
    given = calibration.token_weights
    weights = None if given is None else parse_token_weights(given)
    advise_width(hidden_size)
    loaded, processor = load_model(model, calibration)
    batches = calibration_batches(processor, samples, 4, "channels") if needs_data else ()
    done = narrow_to_(loaded, hidden_size, batches, criterion, weights, seed)
    command = f"slimvlm narrow {model} --hidden-size {hidden_size} --criterion {criterion}"
    facts = CardFacts(base=loaded.config._name_or_path, name=out.name, command=command)
    save(loaded, processor, out, force=force, also=done.save, facts=facts)
    print(done.summary())
    print(f"checkpoint: {out}")


def advise_width(hidden_size: int) -> None:
    """Say so if a hidden size is off the multiples that matrix products like."""
    from slimvlm.serving import WIDTH_MULTIPLE

    if hidden_size % WIDTH_MULTIPLE:
        note(
            f"hidden_size {hidden_size} is no multiple of {WIDTH_MULTIPLE}, which would run faster"
        )
