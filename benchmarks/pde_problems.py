r"""The equations of `pde.py`: residuals, points, networks and solutions to compare with.

Every problem is a tanh network in float64 and some residuals on a domain; the error is that of the
network against a solution that is known or computed to 1e-8 or better, in the relative L2 norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.residuals import Residual, Taylor, TaylorNetwork

Residuals = dict[str, Residual]
Draw = Callable[[int], "Tensor | tuple[Tensor, Tensor]"]  # Points, or points and data.
PI = math.pi


@dataclass(frozen=True)
class Problem:
    """An equation with all that is needed to train on it and to judge the result.

    Attributes:
        title: What it is, for tables.
        widths: Of the layers, input and output included.
        sample: Seed → residuals at points drawn with it.
        truth: Points ``(M, D)`` and what the output is there.
        taylor: Derivatives that the residuals need, options of ``TaylorNetwork``.
        outputs: Columns of the output that are compared.
        resampled: Whether points are drawn anew for every step of methods that allow it.
        draw: Seed → functions to draw points of the parts by, where they are added as
            ``AdaptivePoints`` does, to methods that allow it; None where they stay.
        asked: Error and seconds that the project asks of itself, or None.
    """

    title: str
    widths: tuple[int, ...]
    sample: Callable[[int], Residuals]
    truth: Callable[[], tuple[Tensor, Tensor]]
    taylor: dict[str, Any]
    outputs: tuple[int, ...] = (0,)
    resampled: bool = False
    draw: Callable[[int], dict[str, Draw]] | None = None
    asked: tuple[float, float] | None = None

    def error(self, network: nn.Module) -> float:
        """Return ``‖u − u*‖ / ‖u*‖``."""
        points, known = self.truth()
        with torch.no_grad():
            return float((network(points)[:, list(self.outputs)] - known).norm() / known.norm())

    def model(self, network: nn.Sequential) -> TaylorNetwork:
        """Return the network with its derivatives."""
        return TaylorNetwork(network, **self.taylor)


def tanh_network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return a tanh network in float64, Xavier's weights and no biases to begin with."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(before, after, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def known(u: Taylor, x: Tensor, y: Tensor) -> Tensor:
    """Return u − y: boundary and initial values, measurements."""
    return u.value - y


def uniform(count: int, dimension: int, seed: int) -> Tensor:
    """Return points of the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dimension, generator=generator, dtype=torch.float64)


def on_faces(count: int, dimension: int, seed: int) -> Tensor:
    """Return points of the boundary of the unit cube."""
    points, generator = uniform(count, dimension, seed), torch.Generator().manual_seed(seed)
    face = torch.randint(dimension, (count, 1), generator=generator)
    side = torch.randint(2, (count, 1), generator=generator).double()
    return points.scatter(1, face, side)


def sobol_points(dimension: int, seed: int) -> Callable[[int], Tensor]:
    """Return what draws points of the unit cube, the next ones of a scrambled Sobol sequence."""
    sobol = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    return lambda count: sobol.draw(count, dtype=torch.float64)


def to_faces(points: Tensor) -> Tensor:
    """Move points of the unit cube, ``(N, D + 1)``, to the boundary of that of D dimensions."""
    dimension = points.shape[1] - 1
    face = (2 * dimension * points[:, -1:]).long()
    return points[:, :-1].scatter(1, face // 2, (face % 2).double())


def with_data(draw: Callable[[int], Tensor], data: Callable[[Tensor], Tensor]) -> Draw:
    """Return what draws points and what is known there."""

    def both(count: int) -> tuple[Tensor, Tensor]:
        points = draw(count)
        return points, data(points)

    return both


def column(*values: Tensor) -> Tensor:
    """Lay vectors side by side, ``(N, k)``."""
    return torch.stack(values, 1)


# Poisson's equation on the unit cube.


def poisson(u: Taylor, x: Tensor, f: Tensor) -> Tensor:
    """Return −Δu − f."""
    return -u.laplacian - f


def poisson_problem(
    dimension: int,
    hidden: tuple[int, ...],
    counts: tuple[int, int],
    solution: Callable[[Tensor], Tensor],
    source: Callable[[Tensor], Tensor],
    asked: tuple[float, float],
    added: bool = False,
) -> Problem:
    """Return −Δu = f with u known on the boundary, points added or drawn anew for every step."""

    def draw(seed: int) -> dict[str, Draw]:
        edge = sobol_points(dimension + 1, seed)
        return {
            "equation": with_data(sobol_points(dimension, seed), lambda x: source(x).unsqueeze(1)),
            "boundary": with_data(
                lambda count: to_faces(edge(count)), lambda x: solution(x).unsqueeze(1)
            ),
        }

    def sample(seed: int) -> Residuals:
        inside = uniform(counts[0], dimension, 2 * seed)
        edge = on_faces(counts[1], dimension, 2 * seed + 1)
        return {
            "equation": Residual(poisson, inside, source(inside).unsqueeze(1)),
            "boundary": Residual(known, edge, solution(edge).unsqueeze(1)),
        }

    @cache
    def truth() -> tuple[Tensor, Tensor]:
        points = uniform(10_000, dimension, 12345)
        return points, solution(points).unsqueeze(1)

    title = f"Poisson, {dimension} dimensions"
    return Problem(
        title, (dimension, *hidden, 1), sample, truth, {"laplacian": True}, resampled=not added,
        draw=draw if added else None, asked=asked,
    )  # fmt: skip


# The heat equation in four dimensions: u_t = Δu/4, u = exp(−t) Σ sin 2x_i, points (t, x).


def heat_solution(points: Tensor) -> Tensor:
    """Return the solution at ``(N, 5)``, as ``(N, 1)``."""
    return (-points[:, :1]).exp() * (2 * points[:, 1:]).sin().sum(1, keepdim=True)


def heat(u: Taylor, x: Tensor) -> Tensor:
    """Return u_t − Δu/4."""
    return u.first[0] - 0.25 * u.laplacian


def heat_sample(seed: int) -> Residuals:
    """Return 450 points inside, 40 at the start and 40 on the boundary."""
    start = uniform(40, 5, 3 * seed + 1)
    start[:, 0] = 0
    edge = torch.cat([uniform(40, 1, 3 * seed + 2), on_faces(40, 4, 3 * seed + 2)], 1)
    return {
        "equation": Residual(heat, uniform(450, 5, 3 * seed)),
        "start": Residual(known, start, heat_solution(start)),
        "boundary": Residual(known, edge, heat_solution(edge)),
    }


def heat_draw(seed: int) -> dict[str, Draw]:
    """Return what draws more points of the parts."""
    begin, edge = sobol_points(4, seed), sobol_points(6, seed)

    def start(count: int) -> Tensor:
        return torch.cat([torch.zeros(count, 1).double(), begin(count)], 1)

    def boundary(count: int) -> Tensor:
        points = edge(count)
        return torch.cat([points[:, :1], to_faces(points[:, 1:])], 1)

    return {
        "equation": sobol_points(5, seed),
        "start": with_data(start, heat_solution),
        "boundary": with_data(boundary, heat_solution),
    }


@cache
def heat_truth() -> tuple[Tensor, Tensor]:
    """Return 10,000 points and the solution there."""
    points = uniform(10_000, 5, 12345)
    return points, heat_solution(points)


# Burgers' equation: u_t + u u_x = ν u_xx on [−1, 1] × [0, 1], u = −sin πx at t = 0.


def burgers(points: Tensor, viscosity: float, nodes: int = 1201, chunk: int = 2000) -> Tensor:
    r"""Return the solution of Burgers' equation by Cole and Hopf, ``(N, 1)``.

    With ``y = x − 2√(νt) z`` and ``f(y) = exp(−cos(πy)/(2πν))`` it is the mean of ``−sin πy`` with
    weights ``f(y) exp(−z²)``, by the trapezoidal rule, which converges exponentially here.

    Args:
        points: (x, t), ``(N, 2)``.
        viscosity: ν.
        nodes: Of the rule, on [−12, 12].
        chunk: Points at a time.
    """
    z = torch.linspace(-12.0, 12.0, nodes, dtype=torch.float64)
    found = []
    for piece in points.split(chunk):
        x, t = piece.split(1, 1)
        y = PI * (x - 2 * (viscosity * t).sqrt() * z)
        weights = torch.softmax(-y.cos() / (2 * PI * viscosity) - z.square(), 1)
        found.append(-(weights * y.sin()).sum(1, keepdim=True))
    return torch.cat(found)


def burgers_problem(viscosity: float, title: str, asked: tuple[float, float]) -> Problem:
    """Return Burgers' equation, half of its 1,500 points near the front at x = 0."""

    def equation(u: Taylor, x: Tensor) -> Tensor:
        return u.first[1] + u.value * u.first[0] - viscosity * u.second[0]

    def first(points: Tensor) -> Tensor:
        return -torch.sin(PI * points[:, :1])

    def inside(seed: int) -> Callable[[int], Tensor]:
        cube = sobol_points(2, seed)

        def draw(count: int) -> Tensor:
            points = cube(count)
            points[:, 0] = 2 * points[:, 0] - 1
            near, width = points[: count // 2], 0.05
            near[:, 0] = width * torch.tan(near[:, 0] * math.atan(1 / width))
            return points

        return draw

    def sample(seed: int) -> Residuals:
        along = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
        start = column(2 * along - 1, torch.zeros_like(along))
        ends = column(torch.where(torch.arange(100) % 2 == 0, -1.0, 1.0).double(), along)
        return {
            "equation": Residual(equation, inside(seed)(1500)),
            "start": Residual(known, start, first(start), weight=20.0),
            "ends": Residual(known, ends, torch.zeros(100, 1).double(), weight=20.0),
        }

    def draw(seed: int) -> dict[str, Draw]:
        line, edge = sobol_points(1, seed), sobol_points(2, seed)

        def start(count: int) -> Tensor:
            along = line(count)[:, 0]
            return column(2 * along - 1, torch.zeros_like(along))

        def ends(count: int) -> Tensor:
            side, along = edge(count).unbind(1)
            return column(torch.where(side < 0.5, -1.0, 1.0), along)

        return {
            "equation": inside(seed),
            "start": with_data(start, first),
            "ends": with_data(ends, lambda points: torch.zeros(len(points), 1).double()),
        }

    @cache
    def truth() -> tuple[Tensor, Tensor]:
        x, t = torch.linspace(-1, 1, 257).double(), torch.linspace(0, 1, 101).double()
        points = torch.cartesian_prod(x, t)
        return points, burgers(points, viscosity)

    widths = (2, 20, 20, 20, 1)
    return Problem(title, widths, sample, truth, {"second": [(0, 0)]}, draw=draw, asked=asked)


# Allen and Cahn's equation: u_t = 1e-4 u_xx + 5u − 5u³, periodic, u = x² cos πx at t = 0. It is
# even, so that half of it is solved, x in [0, 1], with u_x = 0 at both ends.

DIFFUSION = 1e-4


def allen_cahn(times: int = 51, modes: int = 1024, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """Return a grid (x, t) of [0, 1]² and the solution there, by cosines in space.

    In time by the exponential Runge-Kutta method of fourth order of Cox & Matthews (2002) with the
    contour integrals of Kassam & Trefethen (2005).

    Args:
        times: Points in time, steps must be a multiple of ``times − 1``.
        modes: Intervals in x.
        steps: In time.
    """
    x = torch.linspace(0, 1, modes + 1, dtype=torch.float64)
    u = x.square() * torch.cos(PI * x)
    h = 1 / steps
    linear = 5 - DIFFUSION * (PI * torch.arange(modes + 1, dtype=torch.float64)).square()
    roots = torch.exp(1j * PI * (torch.arange(1, 33, dtype=torch.float64) - 0.5) / 32)
    z = h * linear.unsqueeze(1) + roots
    mean: Callable[[Tensor], Tensor] = lambda values: values.mean(1).real  # noqa: E731
    whole, half = (h * linear).exp(), (0.5 * h * linear).exp()
    q = h * mean(((z / 2).exp() - 1) / z)
    f1 = h * mean((-4 - z + z.exp() * (4 - 3 * z + z**2)) / z**3)
    f2 = h * mean((2 + z + z.exp() * (z - 2)) / z**3)
    f3 = h * mean((-4 - 3 * z - z**2 + z.exp() * (4 - z)) / z**3)

    def forward(values: Tensor) -> Tensor:
        return torch.fft.rfft(torch.cat([values, values[1:-1].flip(0)])).real

    def backward(transformed: Tensor) -> Tensor:
        return torch.fft.irfft(transformed.to(torch.complex128), 2 * modes)[: modes + 1]

    def cubic(transformed: Tensor) -> Tensor:
        return forward(-5 * backward(transformed) ** 3)

    # Exact coefficients of the start, whose kink at x = 1 interpolation would spread.
    m = torch.arange(modes + 2, dtype=torch.float64)
    moments = torch.where(m == 0, 1 / 3, 2 * (1 - 2 * (m % 2)) / (PI * m.clamp(min=1)).square())
    coefficients = moments[1:] + torch.cat([torch.zeros(1).double(), moments[:-2]])
    coefficients[0], coefficients[-1] = 2 * moments[1], 0
    v, kept = modes * coefficients, [u]
    for step in range(1, steps + 1):
        n = cubic(v)
        a = half * v + q * n
        na = cubic(a)
        nb = cubic(half * v + q * na)
        nc = cubic(half * a + q * (2 * nb - n))
        v = whole * v + f1 * n + 2 * f2 * (na + nb) + f3 * nc
        if step % (steps // (times - 1)) == 0:
            kept.append(backward(v))
    every = modes // 256
    t = torch.linspace(0, 1, times, dtype=torch.float64)
    return torch.cartesian_prod(t, x[::every])[:, [1, 0]], torch.cat(
        [one[::every] for one in kept]
    ).unsqueeze(1)


def allen_cahn_equation(u: Taylor, x: Tensor) -> Tensor:
    """Return u_t − 1e-4 u_xx − 5u + 5u³."""
    return u.first[1] - DIFFUSION * u.second[0] - 5 * u.value + 5 * u.value**3


def flat_end(u: Taylor, x: Tensor) -> Tensor:
    """Return u_x."""
    return u.first[0]


def allen_cahn_start(points: Tensor) -> Tensor:
    """Return u at t = 0, ``(N, 1)``."""
    return points[:, :1].square() * torch.cos(PI * points[:, :1])


# The start has slope −2 at x = 1, where u_x is 0 ever after: a kink, which spreads as a layer of
# width √(νt). What diffusion alone makes of it is known, and what is left is smooth.


def layer(points: Tensor) -> Tensor:
    """Return c with c_t = 1e-4 c_xx, c = 0 at t = 0 and c_x = 2 at x = 1, ``(..., 1)``.

    It is ``2√(4νt) ierfc((1 − x)/√(4νt))`` (Carslaw & Jaeger 1959, §2.9); at x = 0 it underflows.
    """
    width, z = _layer_place(points)
    return 2 * width * ((-z.square()).exp() / math.sqrt(PI) - z * torch.erfc(z))


def layer_slope(points: Tensor) -> Tensor:
    """Return c_x, ``(..., 1)``."""
    return 2 * torch.erfc(_layer_place(points)[1])


def _layer_place(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return √(4νt) and the distance from x = 1 in such widths, at most where erfc underflows."""
    width = (4 * DIFFUSION * points[..., 1:].clamp(min=1e-300)).sqrt()
    return width, ((1 - points[..., :1]) / width).clamp(max=28)


def smooth_part_equation(v: Taylor, x: Tensor) -> Tensor:
    """Return the residual of u = v + c, whose diffusion c brings along."""
    u = v.value + layer(x)
    return v.first[1] - DIFFUSION * v.second[0] - 5 * u + 5 * u**3


def smooth_part_end(v: Taylor, x: Tensor) -> Tensor:
    """Return u_x of u = v + c."""
    return v.first[0] + layer_slope(x)


def smooth_part() -> tuple[Tensor, Tensor]:
    """Return the grid and v = u − c there."""
    points, u = allen_cahn()
    return points, u - layer(points)


# Half of the points of each part are drawn evenly, half about that corner, (x, t) = (1, 0), such
# that logarithms of the distance or of t are even, and inside places across the layer. Residuals
# are divided by the root of the density, so that means over points are those over the domain.

NEAREST = 1e-5
LAYER_WIDTHS = 6  # Of √(4νt) each, that are called the layer.


def by_logarithm(u: Tensor) -> Tensor:
    """Return distances between NEAREST and 1, whose logarithms are even where u is, in [0, 1]."""
    return NEAREST**u


def corner_density(distance: Tensor, across: Tensor | float = 1.0) -> Tensor:
    """Return the density of points half of which are at distances `by_logarithm`.

    Args:
        distance: From the corner, or t.
        across: Over what length those are spread at that distance; infinite away from them.
    """
    far = distance.clamp(min=NEAREST)
    there = (distance >= NEAREST) / (far * -math.log(NEAREST))
    return 0.5 + 0.5 * there / across


def layer_density(points: Tensor) -> Tensor:
    """Return the density of points inside, ``(..., 1)``."""
    width = LAYER_WIDTHS * (4 * DIFFUSION * points[..., 1:].clamp(min=NEAREST)).sqrt()
    outside = 1 - points[..., :1] > width
    return corner_density(points[..., 1:], width.masked_fill(outside, math.inf))


def start_density(points: Tensor) -> Tensor:
    """Return the density of points at t = 0, ``(..., 1)``."""
    return corner_density(1 - points[..., :1])


def ends_density(points: Tensor) -> Tensor:
    """Return the density of points at x = 0, which are even, and x = 1, ``(..., 1)``."""
    return torch.where(points[..., :1] < 0.5, 1.0, corner_density(points[..., 1:]))


def allen_cahn_draw(seed: int) -> dict[str, Draw]:
    """Return what draws points of each part."""
    cube, square, edge = sobol_points(3, seed), sobol_points(2, seed), sobol_points(2, seed + 1)

    def inside(count: int) -> Tensor:
        kind, x, t = cube(count).unbind(1)
        late = by_logarithm(t)
        near = 1 - LAYER_WIDTHS * (4 * DIFFUSION * late).sqrt() * x
        return torch.where((kind < 0.5)[:, None], column(x, t), column(near, late))

    def start(count: int) -> Tensor:
        kind, x = square(count).unbind(1)
        return column(torch.where(kind < 0.5, x, 1 - by_logarithm(x)), torch.zeros_like(x))

    def ends(count: int) -> Tensor:
        kind, t = edge(count).unbind(1)
        return column((kind >= 0.5).double(), torch.where(kind < 0.75, t, by_logarithm(t)))

    return {"equation": inside, "start": with_data(start, allen_cahn_start), "ends": ends}


def by_density(residual: Callable[..., Tensor], density: Callable[[Tensor], Tensor]) -> Any:
    """Return a residual whose squares at points of a density have the mean of even ones."""
    return lambda u, x, *data: residual(u, x, *data) / density(x).sqrt()


def allen_cahn_sample(seed: int, smooth: bool = False) -> Residuals:
    """Return 2,000 points inside, 300 at the start and 200 at the ends; for u or for v."""
    draw = allen_cahn_draw(seed)
    start = draw["start"](300)
    inside = smooth_part_equation if smooth else allen_cahn_equation
    end = smooth_part_end if smooth else flat_end
    return {
        "equation": Residual(by_density(inside, layer_density), draw["equation"](2000)),
        "start": Residual(by_density(known, start_density), *start, weight=100.0),
        "ends": Residual(by_density(end, ends_density), draw["ends"](200)),
    }


# Kovasznay's flow: the stationary equations of Navier and Stokes, Reynolds number 40.

REYNOLDS = 40.0
GROWTH = REYNOLDS / 2 - math.sqrt(REYNOLDS**2 / 4 + 4 * PI**2)


def kovasznay(points: Tensor) -> Tensor:
    """Return both velocities and the pressure, ``(N, 3)``."""
    x, y = points.unbind(1)
    grown = torch.exp(GROWTH * x)
    u, v = 1 - grown * torch.cos(2 * PI * y), GROWTH / (2 * PI) * grown * torch.sin(2 * PI * y)
    return column(u, v, 0.5 * (1 - grown.square()))


def stationary_flow(u: Taylor, x: Tensor) -> Tensor:
    """Return the two momentum equations and the divergence."""
    by_x, by_y = u.first
    convection = u.value[0] * by_x[:2] + u.value[1] * by_y[:2]
    pressure = torch.stack([by_x[2], by_y[2]])
    momentum = convection + pressure - u.laplacian[:2] / REYNOLDS
    return torch.cat([momentum, (by_x[0] + by_y[1]).reshape(1)])


def velocities(u: Taylor, x: Tensor, y: Tensor) -> Tensor:
    """Return the velocities less what they should be."""
    return u.value[:2] - y


def flow_sample(seed: int) -> Residuals:
    """Return 600 points of [−0.5, 1] × [−0.5, 1.5] and 200 of its boundary."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    low, size = torch.tensor([-0.5, -0.5]).double(), torch.tensor([1.5, 2.0]).double()
    edge = low + size * on_faces(200, 2, seed)
    return {
        "equation": Residual(stationary_flow, low + size * sobol.draw(600, dtype=torch.float64)),
        "boundary": Residual(velocities, edge, kovasznay(edge)[:, :2], weight=10.0),
    }


@cache
def flow_truth() -> tuple[Tensor, Tensor]:
    """Return a grid and the velocities there."""
    x, y = torch.linspace(-0.5, 1, 101).double(), torch.linspace(-0.5, 1.5, 101).double()
    points = torch.cartesian_prod(x, y)
    return points, kovasznay(points)[:, :2]


# An inverse problem: −∇·(κ∇u) = f on the unit square, u measured inside, κ unknown there.


def conductivity(points: Tensor) -> Tensor:
    """Return κ, ``(N, 1)``."""
    x, y = points.split(1, 1)
    return 1 + 0.5 * torch.sin(PI * x) * torch.sin(PI * y) + 0.25 * x


def potential(points: Tensor) -> Tensor:
    """Return u, ``(N, 1)``."""
    x, y = points.split(1, 1)
    return x + y.square() + 0.25 * torch.sin(PI * x) * torch.cos(PI * y)


def inverse_source(points: Tensor) -> Tensor:
    """Return f = −∇·(κ∇u), ``(N, 1)``."""
    x, y = (PI * points).split(1, 1)
    kappa_x = 0.5 * PI * x.cos() * y.sin() + 0.25
    kappa_y = 0.5 * PI * x.sin() * y.cos()
    u_x = 1 + 0.25 * PI * x.cos() * y.cos()
    u_y = 2 * points[:, 1:] - 0.25 * PI * x.sin() * y.sin()
    laplacian = 2 - 0.5 * PI**2 * x.sin() * y.cos()
    return -(conductivity(points) * laplacian + kappa_x * u_x + kappa_y * u_y)


def conduction(u: Taylor, x: Tensor, f: Tensor) -> Tensor:
    """Return −κΔu − ∇κ·∇u − f for the outputs u and κ."""
    gradients = (u.first[:, 0] * u.first[:, 1]).sum()
    return -u.value[1] * u.laplacian[0] - gradients - f[0]


def first_output(u: Taylor, x: Tensor, y: Tensor) -> Tensor:
    """Return u − y."""
    return u.value[:1] - y


def inverse_sample(seed: int) -> Residuals:
    """Return 600 points, 300 measurements without noise, and both outputs on the boundary."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    inside, measured = sobol.draw(600, dtype=torch.float64), uniform(300, 2, seed)
    edge = on_faces(120, 2, seed + 1)
    both = torch.cat([potential(edge), conductivity(edge)], 1)
    return {
        "equation": Residual(conduction, inside, inverse_source(inside)),
        "measured": Residual(first_output, measured, potential(measured), weight=100.0),
        "boundary": Residual(known, edge, both, weight=100.0),
    }


@cache
def inverse_truth() -> tuple[Tensor, Tensor]:
    """Return a grid and κ there."""
    axis = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    points = torch.cartesian_prod(axis, axis)
    return points, conductivity(points)


PROBLEMS: dict[str, Problem] = {
    "poisson_5d": poisson_problem(
        5, (64, 64, 48, 48), (450, 75), lambda x: (PI * x).cos().sum(1),
        lambda x: PI**2 * (PI * x).cos().sum(1), (1e-5, 300), added=True,
    ),
    "poisson_10d": poisson_problem(
        10, (64, 64, 48, 48), (1000, 300), lambda x: (x[:, ::2] * x[:, 1::2]).sum(1),
        lambda x: 0 * x[:, 0], (7e-4, 600),
    ),
    "poisson_100d": poisson_problem(
        100, (512,), (100, 150), lambda x: x.square().sum(1),
        lambda x: 0 * x[:, 0] - 200, (2e-2, 600),
    ),
    "heat_4d": Problem(
        "heat, 4 + 1 dimensions", (5, 64, 64, 48, 48, 1), heat_sample, heat_truth,
        {"laplacian": (1, 2, 3, 4)}, draw=heat_draw, asked=(4.7e-5, 300),
    ),
    "burgers": burgers_problem(0.01 / PI, "Burgers, ν = 0.01/π", (1e-6, 300)),
    "burgers_smooth": burgers_problem(0.01, "Burgers, ν = 0.01", (1e-6, 60)),
    "allen_cahn": Problem(
        "Allen–Cahn", (2, 20, 20, 20, 20, 1), allen_cahn_sample, cache(allen_cahn),
        {"second": [(0, 0)]}, draw=allen_cahn_draw, asked=(4e-6, 300),
    ),
    "allen_cahn_smooth": Problem(
        "Allen–Cahn less its layer", (2, 20, 20, 20, 20, 1),
        partial(allen_cahn_sample, smooth=True), cache(smooth_part), {"second": [(0, 0)]},
        draw=allen_cahn_draw, asked=(4e-6, 300),
    ),
    "kovasznay": Problem(
        "Kovasznay, Re = 40", (2, 20, 20, 20, 3), flow_sample, flow_truth,
        {"laplacian": True}, outputs=(0, 1),
    ),
    "inverse": Problem(
        "unknown conductivity", (2, 20, 20, 20, 2), inverse_sample, inverse_truth,
        {"laplacian": True}, outputs=(1,),
    ),
}  # fmt: skip
