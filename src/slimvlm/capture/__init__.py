"""Run calibration batches through a model and keep sums: batches → `Statistics`.

Nothing that grows with the data is kept. Hidden states are compared inside forward hooks, inputs
of the matrices that write to the residual stream become sums at once, and gradients are reduced
to one number per channel inside post-accumulate hooks and freed. The one exception is
`capture_greedy`, which reads its batches again and again.

Every capture takes ``token_weights``: a weight for each role of a token (`slimvlm.roles`). Sums
over tokens become weighted sums; None weighs every valid token 1.
"""

from __future__ import annotations

from collections.abc import Callable

from slimvlm.capture.activations import capture_activations, capture_moments
from slimvlm.capture.batches import Batch
from slimvlm.capture.gates import capture_gates
from slimvlm.capture.gradients import capture_gradients
from slimvlm.capture.grams import capture_grams
from slimvlm.capture.greedy import capture_greedy
from slimvlm.capture.hidden_states import capture_hidden_states
from slimvlm.capture.weights import capture_nothing, capture_weights
from slimvlm.values import Statistics

__all__ = [
    "CAPTURES",
    "Batch",
    "capture_activations",
    "capture_gates",
    "capture_gradients",
    "capture_grams",
    "capture_greedy",
    "capture_hidden_states",
    "capture_moments",
    "capture_nothing",
    "capture_weights",
]

CAPTURES: dict[str, Callable[..., Statistics]] = {
    "nothing": capture_nothing,
    "weights": capture_weights,
    "hidden_states": capture_hidden_states,
    "activations": capture_activations,
    "moments": capture_moments,
    "grams": capture_grams,
    "gates": capture_gates,
    "gradients": capture_gradients,
    "greedy": capture_greedy,
}
"""How each kind of statistics that a criterion may ask for is collected."""
