"""Scores, plans and batches made by hand, and what a tiny model says and holds."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from slimvlm import cli
from slimvlm.models.anatomy import Anatomy
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores

Batch = dict[str, Tensor]


def random_scores(anatomy: Anatomy, seed: int = 0) -> Scores:
    """Scores of every unit, without ties."""
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        "by-hand",
        layer=torch.rand(anatomy.num_layers, generator=generator),
        kv_group=[torch.rand(s.num_kv_heads, generator=generator) for s in anatomy.layers],
        neuron=[torch.rand(s.intermediate_size, generator=generator) for s in anatomy.layers],
        expert=[torch.rand(s.num_experts, generator=generator) for s in anatomy.layers],
    )


def plan_by_hand(
    anatomy: Anatomy,
    layers: Sequence[int] | None = None,
    kv_groups: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
) -> Plan:
    """The same kept groups and neurons in every kept layer; None keeps all."""
    kept = tuple(range(anatomy.num_layers)) if layers is None else tuple(layers)

    def units(chosen: Sequence[int] | None, index: int, count: int) -> tuple[int, ...]:
        if index not in kept or count == 0:
            return ()
        return tuple(range(count)) if chosen is None else tuple(chosen)

    shapes = list(enumerate(anatomy.layers))
    return Plan(
        before=anatomy,
        layers=kept,
        kv_groups=tuple(units(kv_groups, i, s.num_kv_heads) for i, s in shapes),
        neurons=tuple(units(neurons, i, s.intermediate_size) for i, s in shapes),
        axis="both",
    )


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's answer to a batch, without a cache."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output: Tensor = model(**inputs, use_cache=False).logits
    return output


def snapshot(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, model.config.to_dict()


def assert_untouched(model: Any, before: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Weights and configuration are what a snapshot says, bit for bit."""
    weights, config = before
    assert model.config.to_dict() == config
    now = model.state_dict()
    assert list(now) == list(weights)
    changed = [name for name in now if not torch.equal(now[name], weights[name])]
    assert changed == []


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's weight files."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(
    actual: Mapping[str, Tensor] | Path, expected: Mapping[str, Tensor] | Path
) -> None:
    """Tensors, or those of two folders, have the same names and bits."""
    ours, theirs = (tensors_of(x) if isinstance(x, Path) else x for x in (actual, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder; empty folders count, too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in folder.rglob("*")
    }


def in_python(code: str, *words: str, **how: Any) -> str:
    """What another process prints, which must end well."""
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Watched(TorchDispatchMode):
    """Inside, a function sees each operator, what it was given, and what it gave."""

    def __init__(self, look: Callable[[Any, list[Tensor], list[Tensor]], object]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given, made = (
            [value for value in tree_leaves(values) if isinstance(value, Tensor)]
            for values in ((args, kwargs), found)
        )
        self.look(func, given, made)
        return found


class Stopped(Exception):
    """The machine goes down."""


def stops(*args: Any, **kwargs: Any) -> Any:
    raise Stopped


def joined(batches: Iterable[Batch]) -> Batch:
    """One batch of several with equally long sequences."""
    parts = list(batches)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def padded(batches: Iterable[Batch], left: bool = False) -> Batch:
    """One batch of several, padded at their end (or beginning) with a token that looks real."""
    parts = list(batches)
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 77, "attention_mask": 0, "labels": -100, "token_type_ids": 0}
    fill["mm_token_type_ids"] = 0

    def widened(name: str, value: Tensor) -> Tensor:
        if name not in fill:
            return value
        missing = longest - value.shape[1]
        return nn.functional.pad(value, (missing, 0) if left else (0, missing), value=fill[name])

    return joined({name: widened(name, value) for name, value in p.items()} for p in parts)


def changed_copy(model: PreTrainedModel, size: float = 0.05, seed: int = 1) -> PreTrainedModel:
    """The model with noise on its weights."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return copied


def refused(*words: object, alone: bool = False) -> str:
    """The one line that a command ends with (or is all it says): the mistake is the user's."""
    with redirect_stderr(StringIO()) as said, pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    told = said.getvalue()
    assert end.value.code == 2, told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("slimvlm: ")]
    assert not alone or told == f"{line}\n"
    return line
