"""All random numbers that a user's code may draw: seeded, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState", "reproducible"]


class RandomState:
    """The state of torch's, numpy's and Python's random numbers on the CPU."""

    def __init__(self) -> None:
        self.keep()

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """Return the state after seeding, and seed nothing."""
        with reproducible(seed):
            return cls()

    def keep(self) -> None:
        """Become the present state."""
        self._torch, self._numpy = torch.get_rng_state(), np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function with this state, and keep how it leaves it."""
        outside = RandomState()
        self.restore()
        try:
            return function()
        finally:
            self.keep()
            outside.restore()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed all random numbers, and at the end put back what they were."""
    outside = RandomState()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        outside.restore()
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
