r"""The natural gradient as the mean of a thermal equilibrium.

The Ornstein-Uhlenbeck process

.. math:: dx = -(A x - b)\, dt + \sqrt{2 T}\, dW, \qquad A = F + \lambda I, \quad b = \nabla L

has the stationary law :math:`N(A^{-1} b, T A^{-1})`: its mean is the natural gradient. An analog
device could let it run by itself; here it is simulated with products with F alone (Donatella et
al. 2024).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad.curvature.base import check_choice, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.full import FullFisher
from natgrad.curvature.matrix_free import MatrixFreeRows
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.curvature.registry import register_structure
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["Start", "ThermodynamicFisher"]

Start = Literal["warm", "gradient", "zero"]

#: Products that estimate the largest eigenvalue at every refresh, from the last estimate on.
POWER_ITERATIONS = 4
#: The estimate is from below; steps are shortened by this much.
MARGIN = 1.2


class ThermodynamicPart(MatrixFreeRows):
    """Simulates the process by the Euler-Maruyama scheme.

    Args:
        blocks: Block name → layout.
        layout: Order of all trainable parameters.
        time: Simulated time t, in units of ``1/λ_max(A)``.
        step_size: Length of a step, in the same units; stable below 2.
        temperature: T; 0 for no noise.
        start: Where a simulation starts: ``"warm"``, where the last one ended; ``"gradient"``,
            which makes the step an interpolation of gradient descent (t = 0) and natural gradient
            descent (t → ∞); or ``"zero"``.
        delay: Share of the simulated time, in the same units (of the matrix that acts), during
            which the process still runs under the matrix and the gradient of the step before,
            while a device computes the new ones; the rest runs under the new. The first step has
            none before it and runs all the time under its own.
        burn_in: If given, the result is the mean of the states reached later than this under the
            new matrix; otherwise the last state. The process goes on from the last state either
            way.
        seed: Seed of the noise.

    What the delay does to the next step needs nothing of that step, so it is simulated at the end
    of this one: only the state it leads to is kept, in checkpoints too, and no rows.
    """

    def __init__(
        self,
        blocks: dict[str, BlockLayout],
        layout: ParameterLayout,
        time: float,
        step_size: float,
        temperature: float,
        start: Start,
        delay: float,
        burn_in: float | None,
        seed: int,
    ) -> None:
        super().__init__(blocks, layout)
        self.time, self.step_size, self.temperature = time, step_size, temperature
        self.start = start
        self.delay, self.burn_in = delay, burn_in
        # Replaced like all state and never changed in place, so that steps can be taken back.
        self._noise_state = torch.Generator(layout.device).manual_seed(seed).get_state()
        self._last: Tensor | None = None
        self._delayed: Tensor | None = None  # Where the next step finds the process.
        self._leading: Tensor | None = None
        self._largest = 1.0

    @property
    def simulated_steps(self) -> int:
        """Steps of one simulation after the first, those of the delay included."""
        return self._steps(self.time - self.delay) + self._steps(self.delay)

    def _steps(self, time: float) -> int:
        return math.ceil(time / self.step_size)

    def refresh(self, damping: float) -> None:
        """Take the present rows and damping, and estimate ``λ_max(A)`` by power iteration."""
        super().refresh(damping)
        if self._applied_rows is None:
            return
        vector = self._leading
        if vector is None:
            generator = self._noise()
            vector = torch.randn(
                self.numel, generator=generator, dtype=self.layout.dtype, device=self.layout.device
            )
            self._noise_state = generator.get_state()
        largest = torch.zeros((), dtype=vector.dtype, device=vector.device)
        for _ in range(POWER_ITERATIONS):
            vector = vector / vector.norm().clamp(min=1e-30)
            following = self.damped_product(vector)
            largest = following.norm()
            vector = following
        value = float(largest)
        if math.isfinite(value) and value > 0:
            self._leading, self._largest = vector, value

    def approximate_solution(self, gradient: Tensor) -> Tensor:
        """Return where the process is at the end of the simulation, or its mean after burn-in."""
        if self._delayed is None:
            x, time = self._begin(gradient), self.time
        else:
            x, time = self._delayed, self.time - self.delay
        result, x = self._simulate(x, gradient, time, self.burn_in)
        self._last = x
        if self.delay > 0:
            _, self._delayed = self._simulate(self._begin(gradient), gradient, self.delay)
        return result

    def _begin(self, gradient: Tensor) -> Tensor:
        """Return where a simulation starts."""
        if self.start == "gradient":
            return gradient
        if self.start == "zero" or self._last is None:
            return torch.zeros_like(gradient)
        return self._last

    def _simulate(
        self, x: Tensor, gradient: Tensor, time: float, burn_in: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of the states after ``burn_in`` (the last, if None) and the last."""
        steps = self._steps(time)
        if steps == 0:
            return x, x
        dt = time / steps / (MARGIN * self._largest)
        burnt = steps - 1 if burn_in is None else math.floor(burn_in * steps / time)
        burnt = min(burnt, steps - 1)
        total, generator = torch.zeros_like(x), self._noise()
        for index in range(steps):
            x = x + dt * (gradient - self.damped_product(x))
            if self.temperature > 0:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = x + (2.0 * self.temperature * dt) ** 0.5 * noise
            if index >= burnt:
                total += x
        self._noise_state = generator.get_state()
        return total / (steps - burnt), x

    def _noise(self) -> torch.Generator:
        """Return a generator that goes on from the present state of the noise."""
        generator = torch.Generator(self.layout.device)
        generator.set_state(self._noise_state)
        return generator

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of all steps."""
        return self.products_cost(workload, self.simulated_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the process and of its noise."""
        return {
            **super().state_dict(),
            "last": self._last,
            "delayed": self._delayed,
            "leading": self._leading,
            "largest": self._largest,
            "generator": self._noise_state,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        super().load_state_dict(state, device)
        for name in ("last", "delayed", "leading"):
            value = state.get(name)
            setattr(self, f"_{name}", None if value is None else value.to(device))
        self._largest = state["largest"]
        self._noise_state = state["generator"].cpu()


@register_structure
class ThermodynamicFisher(FullFisher):
    """The exact Fisher matrix, solved by simulated thermal equilibration when it preconditions.

    Memory is that of the factored rows; a step costs ``time/step_size`` products with F.

    Options: ``time`` (default 20), ``step_size`` (1), ``temperature`` (0), ``start`` ("warm"),
    ``delay`` (0), ``burn_in`` (None) and ``noise_seed`` (0) of :class:`ThermodynamicPart`.
    """

    structure: ClassVar[str] = "thermodynamic"

    def make_parts(
        self,
        time: float = 20.0,
        step_size: float = 1.0,
        temperature: float = 0.0,
        start: Start = "warm",
        delay: float = 0.0,
        burn_in: float | None = None,
        noise_seed: int = 0,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part with every block.

        Raises:
            ValueError: If an option is out of range.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        if not 0 <= time < math.inf:
            raise ValueError(f"time must be a finite number >= 0, got {time}")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size must be in (0, 2), beyond which it diverges: {step_size}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
        check_choice("start", start, "warm", "gradient", "zero")
        if not 0 <= delay <= time:
            raise ValueError(f"delay must be in [0, time], got {delay} with time={time:g}")
        if burn_in is not None and not 0 <= burn_in < time - delay:
            raise ValueError(
                "burn_in must be None or in [0, time - delay), so that states remain to be "
                f"averaged, got {burn_in} with time={time:g} and delay={delay:g}"
            )
        part = ThermodynamicPart(
            self.blocks, self.layout, time, step_size, temperature, start, delay, burn_in,
            noise_seed,
        )  # fmt: skip
        return {"all layers": part}
