"""Score a model's units on calibration data: model + batches → `Scores`."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import DataError, NumericalError, raised_as
from slimvlm.core.files import new_folder
from slimvlm.core.progress import Say, progress, silent
from slimvlm.data.chat import batches_by_kind, encode_samples
from slimvlm.data.roles import valid_tokens
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import LAYER_UNITS, read_anatomy
from slimvlm.models.devices import device_named
from slimvlm.models.hidden import evaluating
from slimvlm.models.load import require_full_precision
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.scoring.batches import Batch, first_spoilt_layer
from slimvlm.scoring.criteria import DEFAULT_CRITERIA, criterion_named, require_low_memory
from slimvlm.scoring.layerwise import LayerwiseModel, LazyCheckpoint, open_checkpoint
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
    parts, room = list[list[int]](), 0  # runs of layers whose statistics fit, one layer at least
    is_divided = criterion_named(criterion, options).capture.is_divided
    for index, shape in enumerate(read_anatomy(model).layers if is_divided else ()):
        channels = (shape.num_heads * shape.head_dim, shape.intermediate_size)
        size = sum(count**2 for count in channels) * torch.float32.itemsize  # of Gram matrices
        if not parts or size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(index)
        room -= size
    given = list(batches) if len(parts) > 1 else batches
    asked = ({"layers": layers} for layers in parts) if is_divided else [{}]
    found = (_collected(model, given, criterion, token_weights, options, **part) for part in asked)
    return scores_from(found, model, criterion, token_weights, **options)


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
    # the batches in flight, since some captures read one ahead, by the numbers of first samples
    in_flight = deque[tuple[int, Batch]](maxlen=2)

    def watched() -> Iterator[Batch]:
        first = 1
        for batch in batches:
            in_flight.append((first, batch))
            yield batch
            first += len(valid_tokens(batch))

    with evaluating(model):
        try:
            return row.capture.function(model, watched(), **given, **part)
        except NumericalError as error:
            for first, batch in in_flight:
                layer = first_spoilt_layer(model, batch)
                if layer is not None:
                    last = first + len(valid_tokens(batch)) - 1
                    which = f"sample {last}" if last == first else f"samples {first} to {last}"
                    where = f"(calibration {which}, from layer {layer} on)"
                    raise NumericalError(f"{error} {where}") from error
            raise


def scores_from(
    collected: Iterable[Statistics],
    model: nn.Module,
    criterion: str,
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Scores:
    """Turn statistics, or parts of them, into scores; ``token_weights`` is only written down."""
    row, anatomy = criterion_named(criterion, options), read_anatomy(model)
    given = {name: value for name, value in options.items() if name not in row.capture.options}
    shapes, kinds = enumerate(anatomy.layers), {*row.units} & {*LAYER_UNITS}
    values: Values = {(i, kind): torch.zeros(s.units(kind)) for i, s in shapes for kind in kinds}
    for part in collected:  # layers that no batch runs keep zeros
        values |= row.function(part, anatomy, **given)
        about = {"samples": part.num_samples, "tokens": part.num_tokens, **options}
    if token_weights is not None:
        about["token_weights"] = dict(token_weights)
    return Scores.of_units(criterion, row.units, anatomy.num_layers, values, about)


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
    projector and embeddings run first, alone. Criteria that compute gradients are refused.

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
    needs_data = any(capture.passes for capture in captures.values())
    keeps_hidden = any(capture.sees == "hidden_states" for capture in captures.values())
    by_layer = [name for name, capture in captures.items() if capture.sees == "layer"]
    model, depth = checkpoint.model, len(Parts(checkpoint.model).layers)

    with scratch_folder(scratch) as folder:
        store = Scratch(folder)
        runner = LayerwiseModel(checkpoint, store, device_named(device))
        store.keep_if_same("model.json", checkpoint.identity)
        request = {
            "batches": runner.embed(batches) if needs_data else None,
            "criteria": [[name, dict(given)] for name, given in criteria.items()],
            "token_weights": token_weights and dict(token_weights),
        }
        store.keep_if_same("run.json", request, spared="batches")
        if needs_data:
            tokens = sum(batch["attention_mask"].numel() for batch in runner.batches())
            token_bytes = text_config_of(model.config).hidden_size * model.dtype.itemsize
            store.announce((depth if keeps_hidden else 2) * tokens * token_bytes, say)

        there = [i for i in range(1, depth + 1) if store.has(f"hidden-{i}")]
        done = max(there, default=0)
        if keeps_hidden:  # all are read again
            done = next(i for i in range(depth + 1) if i + 1 not in there)
        last = depth if by_layer or needs_data else 0
        for index in progress(range(done, last), "layers forward"):
            with runner.layer(index) as view:
                for name in by_layer:  # as if the model had no other layer
                    file = folder / f"scores-{name}-{index}"
                    if file.exists():  # of a run that was stopped
                        continue
                    data = (runner.batches(), name, token_weights)
                    given = data if captures[name].passes else ((), name)
                    where = f"decoder layer {index}, called 0 here:"
                    with raised_as(NumericalError, NumericalError, where):
                        found = score(view, *given, **criteria[name])
                    with new_folder(file) as partial:
                        found.save(partial / "scores")
                if needs_data:
                    runner.finish(index)
            if not keeps_hidden:
                store.drop(f"hidden-{index}")
        scores: list[Scores] = []
        for name, options in criteria.items():
            if captures[name].sees == "nothing":
                scores.append(score(model, (), name, **options))
            elif captures[name].sees == "hidden_states":
                with runner.layer(None) as view:
                    statistics = collect(view, runner.batches(), name, token_weights, **options)
                scores.append(scores_from([statistics], model, name, token_weights, **options))
            else:
                files = (folder / f"scores-{name}-{index}" / "scores" for index in range(depth))
                scores.append(_joined([Scores.load(file) for file in files]))
        return scores


def _joined(parts: Sequence[Scores]) -> Scores:
    """Join scores of models that have a layer each."""
    first = parts[0]
    rows: dict[str, Any] = {
        unit: [values for part in parts for values in part.of(unit)]
        for unit in LAYER_UNITS
        if first.of(unit) is not None
    }
    if first.layer is not None:
        rows["layer"] = torch.cat([part.of("layer") for part in parts])
    return Scores(first.criterion, options=first.options, **rows)


def calibration_batches(
    processor: Any, samples: Sequence[Sample], batch_size: int = 1, description: str = "calibrate"
) -> Iterable[dict[str, Tensor]]:
    """Encode samples batch by batch, with images or without; show progress on stderr."""
    if not samples:
        raise DataError("no calibration sample was given")
    sees = [bool(sample.images) for sample in samples]
    for places in progress(batches_by_kind(range(len(samples)), sees, batch_size), description):
        yield encode_samples(processor, [samples[place] for place in places])
