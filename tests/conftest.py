"""Settings for the whole test suite: one thread, reproducible hypothesis, float64 where exact."""

from __future__ import annotations

import gc
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load what tests need, but not in the process that hands them out to others."""
    if config.getoption("numprocesses", None):
        return
    gc.disable()  # What loading and collecting make stays.
    import torch
    import torch._dynamo  # Torch's optimizers load it; so it is left out of garbage collections.
    from hypothesis import HealthCheck, settings
    from hypothesis.internal.conjecture import providers

    # Examples depend on tests alone: looking through all code for numbers takes a second besides.
    providers._get_local_constants = lambda: providers._local_constants
    settings.register_profile(
        "default",
        max_examples=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.register_profile(
        "thorough",
        parent=settings.get_profile("default"),
        max_examples=200,
        derandomize=False,
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
    # Nobody reads how long guards of what is compiled take; torch empties the caches before.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    torch.set_num_threads(int(os.environ.get("NATGRAD_TEST_THREADS", "1")))
    if not torch.cuda.is_available():
        # What torch does besides is to note the call, with its stack, for devices to come.
        torch.manual_seed = torch.default_generator.manual_seed


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of every garbage collection that follows."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports at whose figures a test does not look hold empty ones: each takes a second."""
    monkeypatch.setattr("natgrad.experiments.pages.save_figure", lambda *_: b"<svg></svg>")
