"""Tests that need an accelerator: a real one, or the pretended card.

``pytest -p tests.pretended_gpu tests/gpu`` takes the pretended card; without the plugin the tests
run on the machine's own accelerator, and are skipped where there is none.
"""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here, and skip it where nothing can run it, with the reason."""
    plugin = sys.modules.get("tests.pretended_gpu")
    why = None
    if not torch.accelerator.is_available():
        why = getattr(plugin, "REASON", None) or "no accelerator, nor -p tests.pretended_gpu"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def card() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, 0)
