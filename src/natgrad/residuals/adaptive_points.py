"""Points that are added where residuals are large, once the loss elsewhere exceeds theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.capture.model_output import unwrap
from natgrad.distributed import Replicas
from natgrad.residuals.residual import Residual, as_residuals
from natgrad.residuals.rows import FunctionRows

#: ``draw(count)``, returning that many points ``(count, D)`` or a pair of them and their data.
Draw = Callable[[int], "Tensor | tuple[Tensor, Tensor]"]

#: Candidates drawn for each point that is added: so many that narrow layers are among them.
CANDIDATES = 128


class AdaptivePoints:
    r"""Adds points where residuals are large, once the loss elsewhere exceeds that at the points.

    A network can fit the residuals at its points and be wrong between them. So of every part as
    many points are held out. Where the loss of a part there exceeds that at its points by more than
    the whole loss, it gets more: points are added by the density ``‖r(x)‖ / mean ‖r‖ + 1`` times
    that which ``draw`` draws by, and others are held out. Until then points stay as they are,
    which suits optimizers that need a loss that stays; afterwards they are more, so that what was
    fitted stays so.

    Several processes that have points of their own add what one would that has all of them, all at
    the same steps: losses are those of all points, candidates are drawn by each its share and
    chosen among those of all. So more points come to the processes where residuals are large.

    Args:
        model: The network, as for :class:`natgrad.ResidualNGD`.
        residuals: The parts by name, or one: those that the optimizer was given. Their points are
            what they begin with.
        draw: Part → function of a number of points that draws that many, ``(count, D)``, or a pair
            of them and their data ``(count, ...)``; one function for a lone part. Points of other
            parts stay. Low-discrepancy sequences fill the domain better than independent points:
            ``torch.quasirandom.SobolEngine(D, scramble=True).draw``. Of several processes each
            draws others, such as from a seed or a region of its own.
        growth: Points added at a time, as a share of those there are.
        most: Most points of a part; beyond, those of least residual make room. No bound by default.
        generator: Random numbers to choose among candidates by; PyTorch's by default. Those of the
            first process decide.
        process_group: As for :class:`natgrad.ResidualNGD`. All processes make the object and update
            it together.

    Raises:
        TypeError: If a part is no :class:`natgrad.Residual`.
        ValueError: If an option is out of range, a part to draw for is unknown, or ``draw`` returns
            another number of points, or no data for a part that has some.

    Source: Wu, Zhu, Tan, Kartha & Lu, A comprehensive study of non-adaptive and residual-based
    adaptive sampling for physics-informed neural networks (2023), algorithm RAR-D with k = c = 1,
    but for when to add points, which is a fixed number of iterations there.

    Example:
        >>> sobol = torch.quasirandom.SobolEngine(2, scramble=True)
        >>> def draw(count):
        ...     return sobol.draw(count, dtype=torch.float64)
        >>> residuals = {"equation": natgrad.Residual(heat, draw(500)), "start": start}
        >>> optimizer = natgrad.ResidualNGD(model, residuals)
        >>> points = natgrad.residuals.AdaptivePoints(model, residuals, {"equation": draw})
        >>> for _ in range(200):
        ...     optimizer.step()
        ...     points.update()
    """

    def __init__(
        self,
        model: nn.Module,
        residuals: Residual | Mapping[str, Residual],
        draw: Draw | Mapping[str, Draw],
        *,
        growth: float = 0.25,
        most: int | None = None,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        if not 0 < growth < math.inf:
            raise ValueError(f"growth must be a finite number above 0, got {growth}")
        if most is not None:
            check_integer("most", most)
        self.residuals: dict[str, Residual] = as_residuals(residuals)
        draws = draw if isinstance(draw, Mapping) else {"residual": draw}
        unknown = [name for name in draws if name not in self.residuals]
        if unknown or not draws:
            raise ValueError(
                "draw must have functions for some of the parts "
                f"{', '.join(map(repr, self.residuals))}, got {', '.join(map(repr, draws))}"
            )
        self.draw: dict[str, Draw] = dict(draws)
        self.growth = growth
        self.most = most
        self.generator = generator
        self.replicas: Replicas = Replicas.of(model, process_group)
        self._rows = FunctionRows(unwrap(model), self.residuals, None, self.replicas)
        self._rows.agree()
        counts = self._rows.joint.counts
        self.held_out: dict[str, Residual] = {
            name: self._drawn(name, counts[name]) for name in self.draw
        }

    @torch.no_grad()
    def update(self) -> list[str]:
        """Add points where they are needed; to be called after a step.

        Returns:
            The parts that got points, mostly none.
        """
        losses, counts = self._losses(self.residuals)
        outside, _ = self._losses(self.held_out)
        total = sum(losses.values())
        excess = {name: loss - losses[name] for name, loss in outside.items()}
        needy = [name for name, value in excess.items() if total < value < math.inf]
        for name in needy:
            count = max(1, round(self.growth * counts[name]))
            there = self._add(name, count, counts[name])
            self.held_out[name] = self._drawn(name, there)
        return needy

    def _add(self, name: str, count: int, there: int) -> int:
        """Add points to a part, in place of others beyond the most; return their number then."""
        residual, candidates = self.residuals[name], self._drawn(name, CANDIDATES * count)
        sizes, begin = self._of_all(self._sizes(candidates))
        density = sizes / sizes.mean() + 1
        added = torch.multinomial(density, count, generator=self.generator)
        before, first = self._of_all(self._sizes(residual))
        kept = torch.arange(there, device=added.device)
        if self.most is not None and there + count > self.most:
            kept = before.topk(max(0, self.most - count)).indices
            added = added[: self.most]
        if not self.replicas.are_alone:
            self.replicas.follow_first([kept, added])
        mine = kept[(kept >= first) & (kept < first + len(residual))] - first
        new = added[(added >= begin) & (added < begin + len(candidates))] - begin
        data: Tensor | None = None
        if residual.data is not None and candidates.data is not None:
            data = torch.cat([residual.data[mine], candidates.data[new]])
        residual.replace(torch.cat([residual.points[mine], candidates.points[new]]), data)
        return len(kept) + len(added)

    def _drawn(self, name: str, count: int) -> Residual:
        """Return a part at other points, of which this process draws its share."""
        residual, number = self.residuals[name], self.replicas.number
        count = count // number + (self.replicas.rank < count % number)
        if not count:
            data = None if residual.data is None else residual.data[:0]
            return Residual(residual.function, residual.points[:0], data, residual.weight)
        drawn = self.draw[name](count)
        points, data = drawn if isinstance(drawn, tuple) else (drawn, None)
        if len(points) != count or (data is None) != (residual.data is None):
            expected = "points" if residual.data is None else "a pair of points and data"
            raise ValueError(
                f"draw of {name!r} must return {expected} for {count} points, got "
                f"{len(points)} points{'' if data is None else ' and data'}"
            )
        return Residual(residual.function, points, data, residual.weight)

    def _losses(self, parts: Mapping[str, Residual]) -> tuple[dict[str, float], dict[str, int]]:
        """Return the loss of each part and its number of points, in all processes."""
        own = [
            torch.stack([sizes.square().sum().double(), sizes.new_tensor(len(sizes)).double()])
            for sizes in map(self._sizes, parts.values())
        ]
        found = dict(zip(parts, self.replicas.added_up(torch.stack(own)).tolist(), strict=True))
        losses = {name: 0.5 * parts[name].weight * s / n for name, (s, n) in found.items()}
        return losses, {name: int(n) for name, (_, n) in found.items()}

    def _of_all(self, own: Tensor) -> tuple[Tensor, int]:
        """Return the numbers of all processes, ``(Σ n,)``, and where those of this one begin."""
        each = self.replicas.gathered(own, own.device)
        return torch.cat(each), sum(len(one) for one in each[: self.replicas.rank])

    def _sizes(self, residual: Residual) -> Tensor:
        """Return ``‖r(x_n)‖``, ``(N,)``."""
        sizes: Tensor = self._rows.values_of(residual).norm(dim=1)
        return sizes
