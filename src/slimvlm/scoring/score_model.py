"""Score a model's units on calibration data: model + batches → `Scores`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import DataError, NumericalError, raised_as
from slimvlm.core.progress import Say, progress, silent
from slimvlm.data.chat import batches_by_kind, encode_samples
from slimvlm.data.roles import valid_tokens
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import LAYER_UNITS, read_anatomy
from slimvlm.models.devices import device_named
from slimvlm.models.hidden import evaluating
from slimvlm.models.load import require_full_precision
from slimvlm.models.parts import text_config_of
from slimvlm.scoring.batches import Batch, first_spoilt_layer
from slimvlm.scoring.criteria import DEFAULT_CRITERIA, criterion_named, require_low_memory
from slimvlm.scoring.layerwise import HIDDEN, LayerwiseModel, LazyCheckpoint, open_checkpoint
from slimvlm.scoring.stores import Scratch, scratch_folder
from slimvlm.scoring.unit_scores import Scores, Statistics, Values

PART_BYTES = 2 * 2**30  # statistics that `score` holds at a time, where all would be large


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: str,
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Statistics:
    """Run the capture that a criterion needs; the model is unchanged afterwards.

    ``batches`` are model inputs (``input_ids`` or ``inputs_embeds``, ``attention_mask``,
    ``labels``, ``pixel_values``, ...), read once, in order; without ``labels`` the whole text
    counts. ``criterion`` is a name from ``CRITERIA``, and ``options`` are its own.

    ``token_weights`` are weights of tokens by role (``image``, ``prompt``, ``answer``; roles that
    are not named weigh 1), for any criterion that needs data. Without them sums run over all valid
    tokens, losses over the labelled ones. With them sums and losses are weighted; losses are those
    of prompt and answer tokens, since image tokens are never predicted.

    Raises:
        ConfigError: If the criterion, an option or a role is unknown, or a weight cannot be used.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
    """
    return _collected(model, batches, criterion, token_weights, options)


def score(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    criterion: str = DEFAULT_CRITERIA["width"][0],
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Scores:
    """Score the units that a criterion is about, in float32 on the CPU; higher means keep.

    Arguments and errors as in `collect`. See ``slimvlm.CRITERIA`` for the criteria and their
    options. A criterion that needs Gram matrices reads the batches several times if those of all
    layers take more than 2 GiB (``PART_BYTES``), for so many layers at a time.
    """
    row, anatomy = criterion_named(criterion, options), read_anatomy(model)
    parts, room = list[list[int]](), 0  # runs of layers whose statistics fit, one layer at least
    for index, shape in enumerate(anatomy.layers if row.capture.is_divided else ()):
        channels = (shape.num_heads * shape.head_dim, shape.intermediate_size)
        size = sum(count**2 for count in channels) * torch.float32.itemsize  # of Gram matrices
        if not parts or size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(index)
        room -= size
    shown = list(batches) if len(parts) > 1 else batches
    given = {name: value for name, value in options.items() if name not in row.capture.options}
    shapes, kinds = enumerate(anatomy.layers), {*row.units} & {*LAYER_UNITS}
    values: Values = {(i, kind): torch.zeros(s.units(kind)) for i, s in shapes for kind in kinds}
    for part in [{"layers": layers} for layers in parts] or [{}]:
        found = _collected(model, shown, criterion, token_weights, options, **part)
        values |= row.function(found, anatomy, **given)  # layers that no batch runs keep zeros
    about = {"samples": found.num_samples, "tokens": found.num_tokens, **options}
    if token_weights is not None:
        about["token_weights"] = dict(token_weights)
    return Scores.of_units(criterion, row.units, anatomy.num_layers, values, about)


def _collected(
    model: Any,
    batches: Iterable[Batch],
    criterion: str,
    token_weights: Mapping[str, float] | None,
    options: Mapping[str, Any],
    **part: Any,
) -> Statistics:
    """As `collect`; ``part`` names the part of the statistics that is collected."""
    require_full_precision(model.config, "scored")
    row = criterion_named(criterion, options, token_weights)
    given = {**row.fixed, **{k: v for k, v in options.items() if k in row.capture.options}}
    if token_weights is not None:
        given["token_weights"] = token_weights
    last, batch = 0, Batch()  # in flight, and the number of its last sample

    def watched() -> Iterator[Batch]:
        nonlocal last, batch
        for batch in batches:
            last += len(valid_tokens(batch))
            yield batch

    with evaluating(model):
        try:
            return row.capture.function(model, watched(), **given, **part)
        except NumericalError as error:
            layer = first_spoilt_layer(model, batch) if last else None
            if layer is None:
                raise
            first = last - len(valid_tokens(batch)) + 1
            which = f"sample {last}" if last == first else f"samples {first} to {last}"
            where = f"(calibration {which}, from layer {layer} on)"
            raise NumericalError(f"{error} {where}") from error


def score_checkpoint(
    model: str | Path,
    batches: Iterable[Batch] = (),
    criterion: str = DEFAULT_CRITERIA["width"][0],
    token_weights: Mapping[str, float] | None = None,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    say: Say = silent,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    **options: Any,
) -> Scores:
    """`slimvlm.score` of a checkpoint whose weights do not fit in memory.

    One decoder layer is in memory at a time, mapped from the safetensors files. All batches go
    through it before the next one comes; its outputs lie in a scratch folder. Vision tower,
    projector and embeddings run first, alone. Criteria of gradients and ``angular`` are refused.

    A run that was killed resumes after the last whole layer when it is started again with the same
    ``scratch``. The folder is removed when all is done.

    ``model`` is a folder, a hub id or ``demo``, with weights as safetensors, and ``dtype`` the data
    type of the weights; statistics are float32 or better. ``scratch`` is the folder for activations
    (by default a temporary one, which cannot be resumed), whose size ``say`` receives, and
    ``device`` where layers run (by default the accelerator if there is one, else the CPU). With
    ``trust_remote_code``, code in the checkpoint runs. All other arguments and the scores are those
    of `slimvlm.score`.

    Raises:
        ConfigError: If the criterion needs the whole model, something cannot be read, or the
            scratch folder's disk is too small.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
        UnsupportedModelError: If layers read keys and values of earlier ones.
    """
    device = device_named(device)
    require_low_memory(criterion, options, token_weights)
    checkpoint = open_checkpoint(model, dtype, trust_remote_code)
    asked = {criterion: options}
    return score_by_layer(checkpoint, batches, asked, token_weights, scratch, say, device)[0]


def score_by_layer(
    checkpoint: LazyCheckpoint,
    batches: Iterable[Batch],
    criteria: Mapping[str, Mapping[str, Any]],
    token_weights: Mapping[str, float] | None = None,
    scratch: str | Path | None = None,
    say: Say = silent,
    device: str | torch.device | None = None,
) -> list[Scores]:
    """Score by several criteria, given with their options. Otherwise as `score_checkpoint`."""
    captures = {name: require_low_memory(name, given).capture for name, given in criteria.items()}
    by_layer = [name for name, capture in captures.items() if capture.sees == "layer"]
    needs_data = any(capture.passes for capture in captures.values())
    model = checkpoint.model
    with scratch_folder(scratch) as folder:
        store = Scratch(folder)
        store.keep_if_same(checkpoint.identity, "model.json")
        runner = LayerwiseModel(checkpoint, store, device_named(device))
        request = {
            "batches": runner.embed(batches) if needs_data else None,
            "criteria": [[name, dict(given)] for name, given in criteria.items()],
            "token_weights": token_weights and dict(token_weights),
        }
        store.keep_if_same(request, spared="batches")
        if needs_data:
            tokens = sum(batch["attention_mask"].numel() for batch in runner.batches())
            token_bytes = text_config_of(model.config).hidden_size * model.dtype.itemsize
            store.announce(2 * tokens * token_bytes, say)
        depth, begin = len(runner.layers), 0
        for index in range(depth):  # that are scored, and whose outputs are stored
            scored = (store.about(f"scores-{name}", index) is not None for name in by_layer)
            if all(scored) and runner.has(HIDDEN, index + 1, runner.places):
                begin = index + 1
        for index in progress(range(begin, depth), "layers forward"):
            with runner.layer(index) as view:
                for name in by_layer:  # as if the model had no other layer
                    if store.about(f"scores-{name}", index) is not None:  # of a stopped run
                        continue
                    shown = (runner.batches(), name, token_weights)
                    given = shown if captures[name].passes else ((), name)
                    where = f"decoder layer {index}, called 0 here:"
                    with raised_as(NumericalError, NumericalError, where):
                        found = score(view, *given, **criteria[name])
                    store.write(f"scores-{name}", index, found.tensors(), {**found.options})
                rest = [at for at in runner.places if not runner.has(HIDDEN, index + 1, [at])]
                runner.pass_on(HIDDEN, index, index + 1, rest)
            store.drop(f"{HIDDEN}-{index}")
        return [
            joined(store, name, depth) if name in by_layer else score(model, (), name, **options)
            for name, options in criteria.items()
        ]


def joined(store: Scratch, criterion: str, depth: int) -> Scores:
    """Join the stored scores of models that have a layer each."""
    name, cpu = f"scores-{criterion}", torch.device("cpu")
    parts = [store.read(name, index, cpu) for index in range(depth)]
    rows: dict[str, Any] = {
        key.partition(".")[0]: [part[key] for part in parts] for key in parts[0]
    }
    if "layer" in rows:
        rows["layer"] = torch.cat(rows["layer"])
    return Scores(criterion, options=store.about(name, 0), **rows)


def calibration_batches(
    processor: Any, samples: Sequence[Sample], batch_size: int = 1, description: str = "calibrate"
) -> Iterable[dict[str, Tensor]]:
    """Encode samples batch by batch, with images or without; show progress on stderr."""
    if not samples:
        raise DataError("no calibration sample was given")
    sees = [bool(sample.images) for sample in samples]
    for places in progress(batches_by_kind(range(len(samples)), sees, batch_size), description):
        yield encode_samples(processor, [samples[place] for place in places])
