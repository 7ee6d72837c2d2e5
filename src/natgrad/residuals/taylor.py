"""Networks that return their derivatives with respect to the input beside their value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from natgrad.residuals.stack_layers import StackActivation, StackLinear, StackRows

#: Rows of a stack from which on it pays to compute only those that are asked for.
MANY_ROWS = 32


class Taylor(NamedTuple):
    """A network's value and derivatives, at one point or, with a leading N, at many.

    Attributes:
        value: ``u``, ``(C,)``.
        first: First derivatives in the order they were asked for, ``(F, C)``.
        second: Second derivatives in the order of the pairs asked for, ``(S, C)``.
        laplacian: The Laplacian, ``(C,)``; empty ``(0,)`` where it was not asked for.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    laplacian: Tensor


class TaylorAtPoint:
    """The fields of a :class:`Taylor` at one point, each computed when it is first asked for.

    What a residual does not ask for costs nothing, as all derivatives where it takes the value
    alone. Before the first activation first derivatives are the same at all points, so that under
    :func:`torch.func.vmap` they are computed once; behind the last one only where they are asked
    for.

    Args:
        network: The layers, of stacks.
        rows: Which derivatives there are.
        point: ``(D,)``.
    """

    def __init__(self, network: nn.Sequential, rows: StackRows, point: Tensor) -> None:
        self._layers: list[nn.Module] = list(_in_order(network))
        self._rows: StackRows = rows
        self._point: Tensor = point
        last = [i for i, layer in enumerate(self._layers) if isinstance(layer, StackActivation)]
        self._curved: int = last[-1] + 1 if last else 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the fields in the order of :class:`Taylor`."""
        yield from (self.value, self.first, self.second, self.laplacian)

    def __getitem__(self, index: int) -> Tensor:
        """Return a field by its place in :class:`Taylor`."""
        name: str = Taylor._fields[index]
        field: Tensor = getattr(self, name)
        return field

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(Taylor._fields)

    @cached_property
    def value(self) -> Tensor:
        """``u``, ``(C,)``."""
        return self._values[0]

    @cached_property
    def first(self) -> Tensor:
        """First derivatives, ``(F, C)``."""
        first, slopes = self._firsts[-1], self._values[1]
        if self._curved:
            first = slopes[-1][0] * first
        for layer in self._layers[self._curved :]:
            first = _mapped(layer, first)
        return first

    @cached_property
    def second(self) -> Tensor:
        """Second derivatives, ``(S, C)``."""
        return self._seconds[: len(self._rows.second)]

    @cached_property
    def laplacian(self) -> Tensor:
        """The Laplacian, ``(C,)``; empty ``(0,)`` where there is none."""
        return self._seconds[-1] if self._rows.laplacian else self._point.new_zeros(0)

    @cached_property
    def _values(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The value, and φ' and φ'' of every activation, ``(d,)``."""
        value, slopes = self._point, list[tuple[Tensor, Tensor]]()
        for layer in self._layers:
            if isinstance(layer, StackActivation):
                at_stack = layer.derivatives(value[None, None])
                value, slope, bend = (one[0, 0] for one in at_stack)
                slopes.append((slope, bend))
            else:
                assert isinstance(layer, StackLinear)
                value = nn.functional.linear(value, layer.weight, layer.bias)
        return value, slopes

    @cached_property
    def _firsts(self) -> list[Tensor]:
        """First derivatives of what every activation is given, ``(F, d)``; without any, of x."""
        first, slopes, found = self._rows.directions(self._point), self._values[1], []
        for layer in self._layers[: self._curved]:
            if isinstance(layer, StackActivation):
                found.append(first)
                first = slopes[len(found) - 1][0] * first if len(found) < len(slopes) else first
            else:
                first = _mapped(layer, first)
        return found or [first]

    @cached_property
    def _seconds(self) -> Tensor:
        """Second derivatives and the Laplacian, ``(S + 1, C)``; ``(S, C)`` without it."""
        rows, slopes, done = self._rows, self._values[1], 0
        rest = self._point.new_zeros(len(rows.second) + bool(rows.laplacian), len(self._point))
        for layer in self._layers:
            if isinstance(layer, StackActivation):
                slope, bend = slopes[done]
                products = rows.products(self._firsts[done].unsqueeze(0))
                rest = rest if products is None else slope * rest + bend * products[0]
                done += 1
            else:
                rest = _mapped(layer, rest)
        return rest


class TaylorNetwork(nn.Module):
    """A multilayer perceptron that propagates derivatives forward, exactly.

    Value, first and second derivatives are T rows of a stack that goes through the network once,
    each linear layer called once on all of it. No derivative with respect to the input is taken by
    autograd; to natgrad the layers are linear layers with T shared positions, so that every
    optimizer and every structure of the Fisher matrix works, with exact rows.

    The parameters are those of the network given: it can be evaluated, saved and loaded as before,
    and follows the training.

    Args:
        network: A :class:`torch.nn.Sequential`, nested or not, of Linear layers and elementwise
            activations: Tanh, Sigmoid, Softplus, SiLU, GELU, :class:`natgrad.residuals.Sine`, and
            what :func:`natgrad.residuals.register_activation` was told of.
        first: Coordinates to differentiate by once; all by default.
        second: Pairs of coordinates to differentiate by, such as ``[(0, 0), (0, 1)]``; each must
            be in ``first``.
        laplacian: Coordinates whose second derivatives are summed, or True for all of ``first``.
            One row, however many coordinates.

    Raises:
        TypeError: If a layer is neither a plain Linear nor a known activation.
        ValueError: If a coordinate does not exist or is not in ``first``.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
        >>> u = TaylorNetwork(network, second=[(0, 0)]).derivatives(points)
        >>> residual = u.first[:, 1] - u.second[:, 0]  # the heat equation in (x, t)

    Source: the propagation of derivatives is Taylor-mode differentiation; for the Laplacian in one
    row see Li et al., A computational framework for neural network-based variational Monte Carlo
    with forward Laplacian (2024).
    """

    def __init__(
        self,
        network: nn.Sequential,
        *,
        first: Sequence[int] | None = None,
        second: Sequence[tuple[int, int]] = (),
        laplacian: Sequence[int] | bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Sequential):
            raise TypeError(
                "TaylorNetwork needs an nn.Sequential of Linear layers and activations, got "
                f"{type(network).__name__}: use jacobians='vmap', which takes any module"
            )
        linear = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            raise TypeError("TaylorNetwork needs a network with at least one Linear layer")
        self.dimension: int = linear.in_features
        self.rows: StackRows = _rows(self.dimension, first, second, laplacian)
        self.network: nn.Sequential = _converted(network, self.rows, {})

    @property
    def has_large_stacks(self) -> bool:
        """Whether many derivatives make rows larger in factors, (a, δ), than entry by entry."""
        layers = {m for m in self.network.modules() if isinstance(m, StackLinear)}
        factors = sum(layer.in_features + layer.out_features for layer in layers)
        entries = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return self.rows.count >= MANY_ROWS and self.rows.count * factors > entries

    def forward(self, points: Tensor) -> Tensor:
        """Return the stack at points ``(N, D)``: ``(N, T, C)``, value first.

        Raises:
            ValueError: If the points do not have the network's dimension.
        """
        if points.dim() != 2 or points.shape[1] != self.dimension:
            raise ValueError(
                f"points must have shape (N, {self.dimension}), got {tuple(points.shape)}"
            )
        result: Tensor = self.network(self.rows.start(points))
        return result

    def derivatives(self, points: Tensor) -> Taylor:
        """Return value and derivatives at points ``(N, D)``, each with a leading N."""
        return self.split(self(points))

    def at(self, point: Tensor) -> TaylorAtPoint:
        """Return value and derivatives at one point ``(D,)``, computed as they are asked for."""
        return TaylorAtPoint(self.network, self.rows, point)

    def split(self, stack: Tensor) -> Taylor:
        """Take a stack ``(..., T, C)`` apart."""
        sizes = [len(self.rows.first), len(self.rows.second)]
        value, first, second, rest = stack.split([1, *sizes, stack.shape[-2] - 1 - sum(sizes)], -2)
        laplacian = rest[..., 0, :] if self.rows.laplacian else rest.flatten(-2)
        return Taylor(value[..., 0, :], first, second, laplacian)


def _rows(
    dimension: int,
    first: Sequence[int] | None,
    second: Sequence[tuple[int, int]],
    laplacian: Sequence[int] | bool,
) -> StackRows:
    coordinates = tuple(range(dimension)) if first is None else tuple(first)
    if len(set(coordinates)) < len(coordinates) or not all(0 <= c < dimension for c in coordinates):
        raise ValueError(
            f"first must hold different coordinates from 0 to {dimension - 1}, got {coordinates}"
        )
    summed = coordinates if laplacian is True else tuple(laplacian or ())
    missing = {c for pair in second for c in pair} | set(summed)
    missing -= set(coordinates)
    if missing or len(set(summed)) < len(summed):
        raise ValueError(
            "second and laplacian need each coordinate's first derivative, once: add "
            f"{sorted(missing) or 'no coordinate twice'} to first={coordinates}"
        )
    place = {coordinate: index for index, coordinate in enumerate(coordinates)}
    pairs = tuple((place[i], place[j]) for i, j in second)
    return StackRows(coordinates, pairs, tuple(place[c] for c in summed))


def _in_order(network: nn.Sequential) -> Iterator[nn.Module]:
    """Yield the layers of a nested network as often as they occur."""
    for module in network:
        if isinstance(module, nn.Sequential):
            yield from _in_order(module)
        else:
            yield module


def _mapped(layer: nn.Module, rows: Tensor) -> Tensor:
    """Map derivatives by a linear layer, which adds its bias to the value alone."""
    assert isinstance(layer, StackLinear)
    return nn.functional.linear(rows, layer.weight)


def _converted(
    network: nn.Sequential, rows: StackRows, done: dict[nn.Module, nn.Module]
) -> nn.Sequential:
    """Return the network on stacks; a layer that occurs twice stays one layer."""
    result = nn.Sequential()
    for name, module in zip(network._modules, network, strict=True):  # With repetitions.
        if module not in done:
            if type(module) is nn.Sequential:
                done[module] = _converted(module, rows, done)
            elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                done[module] = StackLinear(module)
            else:
                done[module] = StackActivation(module, rows)
        result.add_module(name, done[module])
    return result
