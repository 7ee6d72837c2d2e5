r"""A physics-informed network for the Poisson equation, by natural gradients.

    python examples/poisson_pinn.py --fast
    python examples/poisson_pinn.py --optimizer adam exact --seconds 30 --seeds 3

A small tanh network learns the solution of −Δu = f on the unit square with u = g on its boundary,
from nothing but the residuals of these two equations. Every optimizer gets the same network, the
same points and the same seconds; the plot shows the relative L2 error against the known solution.

Natural gradients of differential operators are easy because ``natgrad.TaylorNetwork`` propagates a
*stack* of T = 4 rows per point, namely the value, both first derivatives and the Laplacian. Each
linear layer is called once, on the whole stack, so that to natgrad it is a linear layer whose
weight is shared by four positions: its rows J_n = Σ_t δ_nt a_ntᵀ are exact, and every structure
and optimizer works as it is (the Kronecker factors are those of Dangel, Müller & Zeinhofer,
*Kronecker-factored approximate curvature for physics-informed neural networks*, 2024, with one pair
for both kinds of points).

The optimizers:

* ``adam``: Adam with a cosine schedule over the time there is (``--search`` tries five rates);
* ``lbfgs``: L-BFGS of PyTorch with a strong Wolfe line search;
* ``implicit``: ``natgrad.ImplicitSGD``, whose inner problems L-BFGS solves;
* ``kfac``: ``natgrad.KFAC`` whose rate and momentum minimise the quadratic model, with damping by
  Levenberg and Marquardt;
* ``block_diagonal``, ``exact``: ``natgrad.ResidualNGD``, with one exact block per layer or the
  whole Fisher matrix (Müller & Zeinhofer, *Achieving high accuracy with PINNs via energy natural
  gradient descent*, 2023);
* ``egn``: the exact natural gradient once more, by ``natgrad.EGN``.

It writes ``pinn.png`` and ``pinn.json`` to the output directory.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pinn_training import Problem, compare, complete, parser
from torch import Tensor, nn

from natgrad.residuals import Residual, Taylor, TaylorNetwork

MODES = ((1, 1, 1.0), (2, 3, 0.5))
"""The solution is a sum of c sin(kπx) sin(mπy), plus the harmonic function x² − y²."""


def solution(points: Tensor) -> Tensor:
    """Return u at points ``(N, 2)``, as ``(N, 1)``."""
    x, y = points.mul(math.pi).unbind(1)
    waves = sum(c * torch.sin(k * x) * torch.sin(m * y) for k, m, c in MODES)
    return (waves + points[:, 0].square() - points[:, 1].square()).unsqueeze(1)


def source(points: Tensor) -> Tensor:
    """Return f = −Δu at points ``(N, 2)``, as ``(N, 1)``."""
    x, y = points.mul(math.pi).unbind(1)
    waves = [(k, m, c * torch.sin(k * x) * torch.sin(m * y)) for k, m, c in MODES]
    return sum(math.pi**2 * (k * k + m * m) * wave for k, m, wave in waves).unsqueeze(1)


def interior_residual(u: Taylor, point: Tensor, f: Tensor) -> Tensor:
    """Return −Δu − f at one point."""
    return -u.laplacian - f


def boundary_residual(u: Taylor, point: Tensor, g: Tensor) -> Tensor:
    """Return u − g at one point."""
    return u.value - g


def sample(interior: int, boundary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return quasi-random points of the square and equidistant ones of its boundary."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    inside = sobol.draw(interior, dtype=torch.float64)
    along = (torch.arange(boundary, dtype=torch.float64) + 0.5) / boundary * 4
    corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.float64)
    side, share = along.long(), (along % 1).unsqueeze(1)
    return inside, corners[side] * (1 - share) + corners[side + 1] * share


class Poisson(Problem):
    """−Δu = f on the unit square, u = g on its boundary."""

    name = "poisson"
    axes = ("x", "y")

    def __init__(self, interior: int, boundary: int, boundary_weight: float, seed: int) -> None:
        inside, edge = sample(interior, boundary, seed)
        self.residuals = {
            "interior": Residual(interior_residual, inside, source(inside)),
            "boundary": Residual(boundary_residual, edge, solution(edge), boundary_weight),
        }
        axis = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
        self.shape = (64, 64)
        self.grid = torch.cartesian_prod(axis, axis)
        self.truth = solution(self.grid)

    def taylor(self, network: nn.Sequential) -> TaylorNetwork:
        return TaylorNetwork(network, laplacian=True)

    def loss(self, network: nn.Module) -> Tensor:
        interior, boundary = self.residuals["interior"], self.residuals["boundary"]
        points = interior.points.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(network(points).sum(), points, create_graph=True)
        laplacian = sum(
            torch.autograd.grad(first[:, i].sum(), points, create_graph=True)[0][:, i : i + 1]
            for i in range(2)
        )
        inside = (-laplacian - interior.data).square().mean()
        edge = (network(boundary.points) - boundary.data).square().mean()
        return 0.5 * (inside + boundary.weight * edge)


def main(arguments: list[str] | None = None) -> None:
    shared = parser(
        (__doc__ or "").split("\n")[0], width=24, depth=3, adam_lr=1e-2, implicit_lr=10.0,
        damping=1e-2, output=Path("results/poisson_pinn"),
    )  # fmt: skip
    shared.add_argument("--interior", type=int, default=None, help="points: 900, fast 500")
    shared.add_argument("--boundary", type=int, default=None, help="points: 120, fast 80")
    shared.add_argument("--boundary-weight", type=float, default=100.0)
    options = complete(shared.parse_args(arguments), interior=(900, 500), boundary=(120, 80))
    compare(
        lambda seed: Poisson(options.interior, options.boundary, options.boundary_weight, seed),
        options,
    )


if __name__ == "__main__":
    main()
