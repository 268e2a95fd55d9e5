"""Quiet, single-threaded, offline, repeatable."""

# ruff: noqa: E402  (the environment must be set before these libraries are imported)
import gc
import os

for variable, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """Let the fast tier try fewer examples of each property."""
    settings.register_profile(
        "tier",
        **{"deadline": None, "derandomize": True},
        max_examples=25 if "not slow" in config.option.markexpr else 60,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("tier")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tables in docs/")


def pytest_collection_finish() -> None:
    """Imports and collected tests are no garbage: whoever frees memory need not look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Nor are libraries that a module of tests was the first to import."""
    yield
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the Python files of checkpoints; not into the user's cache here."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def unhurried() -> Iterator[None]:
    """Times and speeds are not measured, which takes longer than the tiny models' answers."""
    from slimvlm.evaluation import bench
    from slimvlm.runs import cost

    runs = [(2.0, 1.0), (2.5, 1.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "timed_runs", lambda models, *_: [runs for _ in models])
        patch.setattr(cost, "device_flops", lambda *_: 1e9)
        yield
