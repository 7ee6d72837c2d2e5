r"""A physics-informed network for the viscous Burgers equation, by natural gradients.

    python examples/burgers_pinn.py --fast
    python examples/burgers_pinn.py --optimizer adam exact --seconds 30 --seeds 3

u_t + u u_x = ν u_xx with ν = 0.01/π for x in [−1, 1] and t in [0, 1], u = −sin(πx) at t = 0 and
u = 0 at both ends: the benchmark of Raissi, Perdikaris & Karniadakis, *Physics-informed neural
networks*, 2019. A wave steepens to a front of width 0.01 at x = 0, which is what makes it hard:
optimizers that see the residuals through a gradient alone spend their time on its conditioning.

Half of the points are drawn near x = 0 (a Cauchy distribution of width 0.05, cut off at the ends);
they are the same, with the same weights, for every optimizer. The reference solution is that of
Cole and Hopf, an integral of Gaussian decay by the trapezoidal rule, which converges exponentially
for such integrals: its error is below 1e-11.

The optimizers are those of ``poisson_pinn.py``. It writes ``pinn.png`` and ``pinn.json`` to the
output directory.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pinn_training import Problem, compare, complete, parser
from torch import Tensor, nn

from natgrad.residuals import Residual, Taylor, TaylorNetwork

VISCOSITY = 0.01 / math.pi


def start(x: Tensor) -> Tensor:
    """Return u at t = 0."""
    return -torch.sin(math.pi * x)


def reference(points: Tensor, nodes: int = 1201, chunk: int = 2000) -> Tensor:
    r"""Return the solution at points (x, t) ``(N, 2)``, as ``(N, 1)``.

    By the Cole-Hopf transformation, with ``y = x − 2√(νt) z``,

    .. math:: u = -\frac{\int \sin(\pi y)\, f(y)\, e^{-z^2} dz}{\int f(y)\, e^{-z^2} dz}, \qquad
              f(y) = \exp\left(-\frac{\cos \pi y}{2 \pi \nu}\right)

    Args:
        points: ``(N, 2)``.
        nodes: Nodes of the trapezoidal rule on [−12, 12].
        chunk: Points at a time.
    """
    z = torch.linspace(-12.0, 12.0, nodes, dtype=torch.float64)
    result = []
    for x, t in (piece.split(1, 1) for piece in points.double().split(chunk)):
        y = math.pi * (x - 2 * (VISCOSITY * t).sqrt() * z)
        # The ratio of the integrals is a mean with weights of exponentials up to e^50.
        weights = torch.softmax(-torch.cos(y) / (2 * math.pi * VISCOSITY) - z.square(), 1)
        result.append(-(weights * torch.sin(y)).sum(1, keepdim=True))
    return torch.cat(result)


def equation_residual(u: Taylor, point: Tensor) -> Tensor:
    """Return u_t + u u_x − ν u_xx at one point."""
    return u.first[1] + u.value * u.first[0] - VISCOSITY * u.second[0]


def value_residual(u: Taylor, point: Tensor, known: Tensor) -> Tensor:
    """Return u − known at one point."""
    return u.value - known


def sample(inside: int, edge: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return points of the equation, of the start and of the ends."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    points = sobol.draw(inside, dtype=torch.float64)
    points[:, 0] = 2 * points[:, 0] - 1
    near, width = points[: inside // 2], 0.05
    near[:, 0] = width * torch.tan(near[:, 0] * math.atan(1 / width))
    along = (torch.arange(edge, dtype=torch.float64) + 0.5) / edge
    first = torch.stack([2 * along - 1, torch.zeros_like(along)], 1)
    ends = torch.cat([torch.stack([torch.full_like(along, x), along], 1) for x in (-1.0, 1.0)])
    return points, first, ends[::2]


class Burgers(Problem):
    """u_t + u u_x = ν u_xx with u known at the start and at both ends."""

    name = "burgers"
    axes = ("x", "t")

    def __init__(self, inside: int, edge: int, edge_weight: float, seed: int) -> None:
        points, first, ends = sample(inside, edge, seed)
        zeros = torch.zeros(len(ends), 1, dtype=torch.float64)
        self.residuals = {
            "equation": Residual(equation_residual, points),
            "start": Residual(value_residual, first, start(first[:, :1]), edge_weight),
            "ends": Residual(value_residual, ends, zeros, edge_weight),
        }
        self.shape = (256, 100)
        self.grid = torch.cartesian_prod(
            torch.linspace(-1.0, 1.0, 256, dtype=torch.float64),
            torch.linspace(0.0, 1.0, 100, dtype=torch.float64),
        )
        self.truth = reference(self.grid)

    def taylor(self, network: nn.Sequential) -> TaylorNetwork:
        return TaylorNetwork(network, second=[(0, 0)])

    def loss(self, network: nn.Module) -> Tensor:
        equation, first, ends = self.residuals.values()
        points = equation.points.clone().requires_grad_(True)
        u = network(points)
        (d,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (dd,) = torch.autograd.grad(d[:, 0].sum(), points, create_graph=True)
        inside = d[:, 1] + u[:, 0] * d[:, 0] - VISCOSITY * dd[:, 0]
        edges = [part.weight * (network(part.points) - part.data).square().mean()
                 for part in (first, ends)]  # fmt: skip
        return 0.5 * (inside.square().mean() + sum(edges))


def main(arguments: list[str] | None = None) -> None:
    shared = parser(
        (__doc__ or "").split("\n")[0], width=20, depth=3, adam_lr=3e-2, implicit_lr=10.0,
        damping=1e-2, output=Path("results/burgers_pinn"),
    )  # fmt: skip
    shared.add_argument("--inside", type=int, default=None, help="points: 1500, fast 600")
    shared.add_argument("--edge", type=int, default=None, help="points: 100, fast 50")
    shared.add_argument("--edge-weight", type=float, default=20.0)
    options = complete(shared.parse_args(arguments), inside=(1500, 600), edge=(100, 50))
    compare(lambda seed: Burgers(options.inside, options.edge, options.edge_weight, seed), options)


if __name__ == "__main__":
    main()
