r"""Solutions as the mean of a thermal equilibrium.

The Ornstein-Uhlenbeck process

.. math:: dx = -(A x - b)\, dt + \sqrt{2 T}\, dW, \qquad A = F + \lambda I, \quad b = \nabla L

has the stationary law :math:`N(A^{-1} b, T A^{-1})`: its mean is the natural gradient. An analog
device could let it run by itself; here it is simulated with products with F alone (Donatella et
al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from natgrad.arguments import check_choice, check_range
from natgrad.solvers.solver import IterativeSolver, Product

Start = Literal["warm", "gradient", "zero"]

#: Products that estimate the largest eigenvalue of every new matrix, from the last estimate on.
POWER_ITERATIONS = 4
#: The estimate is from below; steps are shortened by this much.
MARGIN = 1.2


@dataclass(frozen=True)
class Thermodynamic(IterativeSolver):
    """Simulates the process by the Euler-Maruyama scheme.

    What the delay does to the next solution needs nothing of that one, so it is simulated at the
    end of this one: only the state it leads to is kept, in checkpoints too, and no rows.

    Attributes:
        time: Simulated time t, in units of ``1/λ_max(A)``.
        step_size: Length of a step, in the same units; stable below 2.
        temperature: T; 0 for no noise.
        start: Where a simulation starts: ``"warm"``, where the last one ended, which acts like
            momentum; ``"gradient"``, which makes the step an interpolation of gradient descent
            (t = 0) and natural gradient descent (t → ∞); or ``"zero"``.
        delay: Share of the simulated time, in the same units (of the matrix that acts), during
            which the process still runs under the matrix and the gradient of the step before,
            while a device computes the new ones; the rest runs under the new. The first step has
            none before it and runs all the time under its own.
        burn_in: If given, the result is the mean of the states reached later than this under the
            new matrix; otherwise the last state. The process goes on from the last state either
            way.
        seed: Seed of the noise; the global random state is never used.

    Raises:
        ValueError: If an option is out of range.

    Source: Donatella et al., Thermodynamic natural gradient descent (2024). How the delay splits
    the simulated time, and the mean after burn-in, are choices of natgrad.
    """

    time: float = 20.0
    step_size: float = 1.0
    temperature: float = 0.0
    start: Start = "warm"
    delay: float = 0.0
    burn_in: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("time", self.time)
        if not 0 < self.step_size < 2:
            raise ValueError(
                f"step_size must be in (0, 2), beyond which it diverges: {self.step_size}"
            )
        check_range("temperature", self.temperature)
        check_choice("start", self.start, "warm", "gradient", "zero")
        if not 0 <= self.delay <= self.time:
            raise ValueError(
                f"delay must be in [0, time], got {self.delay} with time={self.time:g}"
            )
        if self.burn_in is not None and not 0 <= self.burn_in < self.time - self.delay:
            raise ValueError(
                "burn_in must be None or in [0, time - delay), so that states remain to be "
                f"averaged, got {self.burn_in} with time={self.time:g} and delay={self.delay:g}"
            )

    @property
    def products(self) -> float:
        """Steps of one simulation after the first, those of the delay included."""
        return self._steps(self.time - self.delay) + self._steps(self.delay)

    def _steps(self, time: float) -> int:
        return math.ceil(time / self.step_size)

    def prepare(self, multiply: Product, like: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Estimate ``λ_max(A)`` by power iteration."""
        vector = state.get("leading")
        if vector is None:
            generator = self._noise(like, state)
            vector = torch.randn(
                like.shape, generator=generator, dtype=like.dtype, device=like.device
            )
            state = {**state, "generator": generator.get_state()}
        largest = torch.zeros((), dtype=vector.dtype, device=vector.device)
        for _ in range(POWER_ITERATIONS):
            vector = vector / vector.norm().clamp(min=1e-30)
            vector = multiply(vector)
            largest = vector.norm()
        value = float(largest)
        if math.isfinite(value) and value > 0:
            state = {**state, "leading": vector, "largest": value}
        return state

    def solve(
        self, multiply: Product, right: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return where the process is at the end of the simulation, or its mean after burn-in."""
        state = dict(state)
        if state.get("delayed") is None:
            x, time = self._begin(right, state), self.time
        else:
            x, time = state["delayed"], self.time - self.delay
        result, state["last"] = self._simulate(multiply, x, right, time, state, self.burn_in)
        if self.delay > 0:
            x = self._begin(right, state)
            _, state["delayed"] = self._simulate(multiply, x, right, self.delay, state)
        return result, state

    def _begin(self, right: Tensor, state: dict[str, Any]) -> Tensor:
        """Return where a simulation starts."""
        if self.start == "gradient":
            return right
        last: Tensor | None = state.get("last")
        return torch.zeros_like(right) if self.start == "zero" or last is None else last

    def _simulate(
        self,
        multiply: Product,
        x: Tensor,
        right: Tensor,
        time: float,
        state: dict[str, Any],
        burn_in: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of the states after ``burn_in`` (the last, if None) and the last."""
        steps = self._steps(time)
        if steps == 0:
            return x, x
        dt = time / steps / (MARGIN * state.get("largest", 1.0))
        burnt = steps - 1 if burn_in is None else math.floor(burn_in * steps / time)
        burnt = min(burnt, steps - 1)
        total, generator = torch.zeros_like(x), self._noise(x, state)
        for index in range(steps):
            x = x + dt * (right - multiply(x))
            if self.temperature > 0:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = x + (2.0 * self.temperature * dt) ** 0.5 * noise
            if index >= burnt:
                total += x
        state["generator"] = generator.get_state()
        return total / (steps - burnt), x

    def _noise(self, like: Tensor, state: dict[str, Any]) -> torch.Generator:
        """Return a generator that goes on from the present state of the noise."""
        generator = torch.Generator(like.device)
        if "generator" in state:
            generator.set_state(state["generator"].cpu())
        else:
            generator.manual_seed(self.seed)
        return generator
