"""All random numbers that a user's code may draw: seeded, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStream:
    """Random numbers of torch, numpy and Python on the CPU from a seed on, apart from others."""

    def __init__(self, seed: int) -> None:
        with reproducible(seed):
            self._state = _present()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function that draws from this stream."""
        outside = _present()
        _restore(self._state)
        try:
            return function()
        finally:
            self._state = _present()
            _restore(outside)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed all random numbers, and at the end put back what they were."""
    outside = _present()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        _restore(outside)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _present() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
