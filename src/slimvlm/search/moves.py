"""Small changes of a plan that keep its number of parameters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slimvlm.plan import Plan
from slimvlm.planning import with_widths
from slimvlm.planning.ranking import can_be_written
from slimvlm.search.request import Request
from slimvlm.values import Scores


class Moves:
    """Random changes of a plan; neurons, where they may change, make up for other differences."""

    def __init__(self, request: Request, rng: random.Random) -> None:
        self._request, self._rng = request, rng
        self._budget, self._scored = request.budget, request.scored
        self._kinds = [
            *(["neurons", "neurons"] if "neuron" in self._scored else []),
            *(["groups"] if "kv_group" in self._scored else []),
            *(["layers"] if request.axis != "width" else []),
        ]

    def changed(self, plan: Plan) -> Plan | None:
        """A neighbour of a plan, or None if the move that was drawn is not possible."""
        kind = self._rng.choice(self._kinds)
        widths = {i: (len(plan.kv_groups[i]), len(plan.neurons[i])) for i in plan.layers}
        moved = {
            "neurons": self._move_neurons,
            "groups": self._move_groups,
            "layers": self._swap_layers,
        }[kind](widths)
        if not moved or ("neuron" in self._scored and not self._balance(widths)):
            return None
        candidate = _reshaped(plan, self._scored, widths)
        is_equally_large = "neuron" in self._scored or candidate.ratio == plan.ratio
        return candidate if is_equally_large and can_be_written(candidate, widths) else None

    def _open(self, widths: Mapping[int, Any]) -> list[int]:
        return [i for i in widths if self._budget.is_open(i)]

    def _move_neurons(self, widths: dict[int, tuple[int, int]]) -> bool:
        """From one layer to another, by a power of two of multiples."""
        layers = self._open(widths)
        if len(layers) < 2:
            return False
        giver, taker = self._rng.sample(layers, 2)
        most = max(self._request.anatomy.layers[giver].intermediate_size // 8, 1)
        sizes = [1 << k for k in range(max(most // self._budget.multiple, 1).bit_length())]
        size = self._rng.choice(sizes)
        for _ in range(size):
            if not (self._step(widths, giver, -1) and self._step(widths, taker, 1)):
                return False
        return True

    def _move_groups(self, widths: dict[int, tuple[int, int]]) -> bool:
        """A KV group from one layer to another, or against neurons."""
        layers = self._open(widths)
        if not layers:
            return False
        takes = "neuron" in self._scored and self._rng.random() < 0.5
        changes = (self._rng.choice((-1, 1)),) if takes or len(layers) < 2 else (-1, 1)
        for index, change in zip(self._rng.sample(layers, len(changes)), changes, strict=True):
            groups, neurons = widths[index]
            if not 1 <= groups + change <= self._request.anatomy.layers[index].num_kv_heads:
                return False
            widths[index] = groups + change, neurons
        return True

    def _swap_layers(self, widths: dict[int, tuple[int, int]]) -> bool:
        """A removed layer comes back for a kept one and takes over its widths."""
        removable = self._budget.removable_layers
        gone = [i for i in removable if i not in widths]
        kept = [i for i in removable if i in widths]
        shapes = self._request.anatomy.layers
        if not gone or not kept:
            return False
        back, out = self._rng.choice(gone), self._rng.choice(kept)
        if shapes[back] != shapes[out]:
            return False
        widths[back] = widths.pop(out)
        return True

    def _step(self, widths: dict[int, tuple[int, int]], index: int, change: int) -> bool:
        """One multiple of neurons more or fewer in a layer, if it has them."""
        multiple, full = (
            self._budget.multiple,
            self._request.anatomy.layers[index].intermediate_size,
        )
        groups, neurons = widths[index]
        if change > 0:
            wanted = min((neurons // multiple + 1) * multiple, full)
        else:
            wanted = (neurons - 1) // multiple * multiple
        if wanted == neurons or wanted < 1:
            return False
        widths[index] = groups, wanted
        return True

    def _balance(self, widths: dict[int, tuple[int, int]]) -> bool:
        """Give or take neurons, one multiple a layer in turn, until the budget is met."""
        shapes, order = self._request.anatomy.layers, self._open(widths)
        self._rng.shuffle(order)
        kept = sum(
            shapes[i].fixed_params + g * shapes[i].kv_group_params + n * shapes[i].neuron_params
            for i, (g, n) in widths.items()
        )
        whole = sum(shape.params for shape in shapes)
        excess = kept - (whole - self._budget.params)
        stuck = 0
        while order and stuck < len(order):
            index = order.pop(0)
            order.append(index)
            if abs(excess) <= 0.5 * self._budget.multiple * shapes[index].neuron_params:
                return True
            before = widths[index][1]
            moved = self._step(widths, index, -1 if excess > 0 else 1)
            stuck = 0 if moved else stuck + 1
            excess += (widths[index][1] - before) * shapes[index].neuron_params
        return False


def _reshaped(
    plan: Plan, scored: Mapping[str, Scores], widths: Mapping[int, tuple[int, int]]
) -> Plan:
    """The plan that keeps these layers, each with so many of its best units."""
    everything = Plan.everything(plan.before)
    whole = replace(
        plan,
        layers=tuple(sorted(widths)),
        kv_groups=tuple(k if i in widths else () for i, k in enumerate(everything.kv_groups)),
        neurons=tuple(k if i in widths else () for i, k in enumerate(everything.neurons)),
    )
    return with_widths(whole, scored, widths)
