r"""The two-layer ReLU network of convergence theory, and its infinite-width Gram matrix.

Source: Zhang, Martens & Grosse, Fast Convergence of Natural Gradient Descent for
Over-Parameterized Neural Networks (2019); the kernel is the arc-cosine kernel of degree 0 times
the inner product (Cho & Saul 2009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer


class TwoLayerNetwork(nn.Module):
    r"""The network ``f(x) = (1/√m) Σ_r a_r max(w_rᵀx, 0)`` of which only ``w`` is trained.

    The weights are drawn as ``w_r ~ N(0, ν² I)`` and the signs ``a_r = ±1`` with equal
    probability. The size of the output does not grow with the width, and its Gram matrix ``JJᵀ``
    tends to :func:`two_layer_kernel`.

    Args:
        inputs: Input dimension ``d``.
        width: Number of hidden units ``m``.
        weight_std: ``ν``, the standard deviation of each initial weight. The kernel does not
            depend on it; the larger it is, the less a step of given size changes the kernel.
        generator: Source of randomness, on the CPU; the global one by default.
        device: Device of the weights.
        dtype: Their dtype.

    Attributes:
        hidden: The trained layer, weight ``(m, d)``, no bias.
        signs: The fixed output weights ``a``, ``(m,)``.

    Raises:
        ValueError: If a size is below 1 or ``weight_std`` is not positive.

    Example:
        >>> model = TwoLayerNetwork(10, 4096, dtype=torch.float64)
    """

    signs: Tensor

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        weight_std: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("inputs", inputs)
        check_integer("width", width)
        if not 0 < weight_std < math.inf:
            raise ValueError(f"weight_std must be positive and finite, got {weight_std}")
        super().__init__()
        # Drawn on the CPU, so that a seed gives the same network on every device.
        shape = (width, inputs)
        weight = weight_std * torch.randn(shape, generator=generator, device="cpu", dtype=dtype)
        draws = torch.randint(0, 2, (width,), generator=generator, device="cpu")
        signs = 2.0 * draws.to(weight.dtype) - 1.0
        place = torch.empty(0, device=device).device
        self.hidden: nn.Module = nn.utils.skip_init(
            nn.Linear, inputs, width, bias=False, device=place, dtype=dtype
        )
        with torch.no_grad():
            self.hidden.weight.copy_(weight)
        self.register_buffer("signs", signs.to(place))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``f``, ``(N, 1)``, for inputs ``(N, d)``."""
        active = torch.relu(self.hidden(input))
        output: Tensor = (active @ self.signs / self.signs.numel() ** 0.5).unsqueeze(-1)
        return output


def two_layer_kernel(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    r"""Return the infinite-width Gram matrix of :class:`TwoLayerNetwork`.

    .. math:: G^\infty_{ij} = x_i^\top x_j \, \frac{\pi - \arccos(\cos \angle(x_i, x_j))}{2 \pi}

    It is ``lim JJᵀ``, without a factor ``1/N``, and its diagonal is ``‖x‖²/2``. The angle is
    computed as ``2 atan2(‖u − v‖, ‖u + v‖)`` of the normalised inputs, which keeps full precision
    for nearly parallel inputs.

    The matrix of distinct unit vectors is singular in one case only: more opposite pairs
    ``x_i = −x_j`` than the inputs have independent directions among them. The rows of a pair are
    ``x 1[wᵀx ≥ 0]`` and ``−x 1[wᵀx < 0]``; their difference is ``x`` whatever ``w`` is, so a linear
    dependence of such ``x`` is one of the rows. A single opposite pair does no harm.

    Args:
        x1: Inputs, ``(N, d)``.
        x2: Further inputs, ``(N', d)``; ``x1`` by default.

    Returns:
        The kernel, ``(N, N')``, float64.

    Raises:
        ValueError: If the inputs are not matrices with the same number of columns.
    """
    left = x1.double()
    right = left if x2 is None else x2.double()
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            "inputs must be matrices (N, d) and (N', d) with the same d, got shapes "
            f"{tuple(left.shape)} and {tuple(right.shape)}; flatten them first"
        )
    return left @ right.T * (math.pi - angles(left, right)) / (2.0 * math.pi)


def angles(left: Tensor, right: Tensor) -> Tensor:
    """Return the angles between rows in radians, ``(N, N')``."""
    u = nn.functional.normalize(left, dim=1, eps=torch.finfo(left.dtype).tiny)
    v = nn.functional.normalize(right, dim=1, eps=torch.finfo(right.dtype).tiny)
    return 2.0 * torch.atan2(_distances(u, v), _distances(u, -v))


def _distances(u: Tensor, v: Tensor) -> Tensor:
    # The route by matrix products cancels for close points.
    return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
