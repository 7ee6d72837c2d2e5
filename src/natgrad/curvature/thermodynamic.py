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
        seed: Seed of the noise.
    """

    def __init__(
        self,
        blocks: dict[str, BlockLayout],
        layout: ParameterLayout,
        time: float,
        step_size: float,
        temperature: float,
        start: Start,
        seed: int,
    ) -> None:
        super().__init__(blocks, layout)
        self.time, self.step_size, self.temperature = time, step_size, temperature
        self.start = start
        self.generator = torch.Generator(layout.device).manual_seed(seed)
        self._last: Tensor | None = None
        self._leading: Tensor | None = None
        self._largest = 1.0

    @property
    def simulated_steps(self) -> int:
        """Steps of one simulation."""
        return math.ceil(self.time / self.step_size)

    def refresh(self, damping: float) -> None:
        """Take the present rows and damping, and estimate ``λ_max(A)`` by power iteration."""
        super().refresh(damping)
        if self._applied_rows is None:
            return
        vector = self._leading
        if vector is None:
            vector = torch.randn(
                self.numel, generator=self.generator, dtype=self.layout.dtype,
                device=self.layout.device,
            )  # fmt: skip
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
        """Return where the process is at the end of the simulation."""
        if self.start == "gradient":
            x = gradient
        elif self.start == "zero" or self._last is None:
            x = torch.zeros_like(gradient)
        else:
            x = self._last
        steps = self.simulated_steps
        if steps:
            dt = self.time / steps / (MARGIN * self._largest)
        for _ in range(steps):
            x = x + dt * (gradient - self.damped_product(x))
            if self.temperature > 0:
                noise = torch.randn(
                    x.shape, generator=self.generator, dtype=x.dtype, device=x.device
                )
                x = x + (2.0 * self.temperature * dt) ** 0.5 * noise
        self._last = x
        return x

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of all steps."""
        return self.products_cost(workload, self.simulated_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the process and of its noise."""
        return {
            **super().state_dict(),
            "last": self._last,
            "leading": self._leading,
            "largest": self._largest,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        super().load_state_dict(state, device)
        for name in ("last", "leading"):
            value = state[name]
            setattr(self, f"_{name}", None if value is None else value.to(device))
        self._largest = state["largest"]
        self.generator.set_state(state["generator"].cpu())


@register_structure
class ThermodynamicFisher(FullFisher):
    """The exact Fisher matrix, solved by simulated thermal equilibration when it preconditions.

    Memory is that of the factored rows; a step costs ``time/step_size`` products with F.

    Options: ``time`` (default 20), ``step_size`` (1), ``temperature`` (0), ``start`` ("warm") and
    ``noise_seed`` (0) of :class:`ThermodynamicPart`.
    """

    structure: ClassVar[str] = "thermodynamic"

    def make_parts(
        self,
        time: float = 20.0,
        step_size: float = 1.0,
        temperature: float = 0.0,
        start: Start = "warm",
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
        part = ThermodynamicPart(
            self.blocks, self.layout, time, step_size, temperature, start, noise_seed
        )
        return {"all layers": part}
