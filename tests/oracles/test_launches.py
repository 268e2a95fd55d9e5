"""What a layer of LLaVA-1.5-7B's shape asks of a GPU: launched kernels, and waits for the device.

A launch takes some 5 microseconds of the host, whatever it computes, so 60,000 of them in a layer
are 0.3 s, and 10 s in 32 layers. They are counted on the pretended card, as operators that touch a
tensor of its and are no views; ``python -m pytest -p tests.pretended_gpu`` runs this.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimvlm.scoring.obs import removal_order
from tests import pretended_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(pretended_gpu.REASON is not None, reason="needs -p tests.pretended_gpu"),
]
NEURONS, MOST = 11_008, 60_000  # of a layer of LLaVA-1.5-7B; launches that it may take


class Launches(TorchDispatchMode):
    """Count operators on a card."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        tensors = [v for v in tree_leaves((args, kwargs, found)) if isinstance(v, torch.Tensor)]
        self.count += not operator.is_view and any(v.device.type != "cpu" for v in tensors)
        return found


def eliminated(neurons, share):
    """Launches and waits of removing a share of the neurons of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * neurons, neurons, generator=generator)
    gram = (inputs * torch.rand(neurons, generator=generator)).cuda()
    gram, matrix = gram.T @ gram, torch.randn(64, neurons, generator=generator).cuda()
    with Launches() as launches:
        found = []
        run = lambda: found.append(removal_order(matrix, gram, neurons, int(share * neurons)))  # noqa: E731
        waits = pretended_gpu.waits_of(run)
    assert len(found[0].order) == int(share * neurons)
    return launches.count, waits


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_choosing_neurons_takes_few_launches_and_fewer_waits(share):
    """They grow at most in proportion to the neurons: blocks of equal size, half as many."""
    (few, _), (many, waits) = (eliminated(neurons, share) for neurons in (512, 1024))
    assert many <= 2.5 * few
    assert many * NEURONS / 1024 <= MOST
    assert waits <= many / 8
