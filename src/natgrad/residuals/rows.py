"""Where the residuals and their Jacobian rows come from: functions, or a watched network."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from natgrad.capture import Block, Capture
from natgrad.capture.evaluation import unit_vectors
from natgrad.capture.generic import parameter_places, parameters_by_samples
from natgrad.capture.graph import leaves
from natgrad.capture.kinds import dense_layout
from natgrad.distributed import Replicas
from natgrad.jacobians import CHUNK_ELEMENTS, DenseJacobian, Jacobians, LayerJacobian
from natgrad.layouts import ParameterLayout
from natgrad.residuals.joint_points import JointPoints
from natgrad.residuals.network import ResidualNetwork
from natgrad.residuals.residual import Residual
from natgrad.residuals.taylor import TaylorNetwork

#: How many times more entries than its rows a chunk of points takes while it is differentiated.
OVERHEAD = 8


class ResidualRows(ABC):
    """Scaled residuals ``ρ_bn = √(w_b/N_b) r_bn`` and their rows: ``L = ½‖ρ‖²``, ``F = JᵀJ``.

    Of several processes each has points and rows of its own, N_b counts those of all.

    Args:
        model: The model.
        residuals: The parts by name.
        chunk_size: Points at a time; by default as many as keep temporary tensors small.
        replicas: The processes; none but this one by default.

    Attributes:
        blocks: Block name → block.
        layout: Order of all trainable parameters.
        parameters: Parameter name → parameter, in the same order.
    """

    blocks: Mapping[str, Block]
    layout: ParameterLayout
    parameters: dict[str, nn.Parameter]

    def __init__(
        self,
        model: nn.Module,
        residuals: Mapping[str, Residual],
        chunk_size: int | None,
        replicas: Replicas | None = None,
    ) -> None:
        self.model: nn.Module = model
        self.residuals: Mapping[str, Residual] = residuals
        self.chunk_size: int | None = chunk_size
        self.replicas: Replicas = Replicas() if replicas is None else replicas
        self._agreed: JointPoints | None = None
        self._widths: dict[str, tuple[Any, int]] = {}

    @abstractmethod
    def _evaluated(self, residual: Residual, chosen: slice) -> Tensor:
        """Return the residuals of some points, ``(n, R)``."""

    @abstractmethod
    def _leaves_without_rows(self, residual: Residual) -> list[Tensor]:
        """Return the parameters that a residual depends on otherwise than rows can tell."""

    @abstractmethod
    def chunks(self) -> Iterator[tuple[float, Tensor, Jacobians]]:
        """Yield shares of the points, their ρ ``(n, K)`` and their rows.

        All points come at once if they have no more rows than there are parameters, or few entries;
        where this process has none of them, as a chunk without rows.
        """

    @abstractmethod
    def scaled_values(self) -> Iterator[Tensor]:
        """Yield ρ alone, chunk by chunk as :meth:`chunks` does."""

    @abstractmethod
    def lengths(self) -> list[int]:
        """Return how many rows each process has where all come at once, in the order of ranks."""

    @property
    def joint(self) -> JointPoints:
        """The points of all processes, those of the last :meth:`agree` where there are others."""
        if self._agreed is None or self.replicas.are_alone:
            return JointPoints.of(self._sizes())
        return self._agreed

    def agree(self, flag: bool = False) -> bool:
        """Learn how many points each process has, as all do together before a step.

        Return whether a flag is up in any of them. That they have other parts or weights, or none
        has points of a part, is a ValueError.
        """
        if self.replicas.are_alone:
            return flag
        weights = [one.weight for one in self.residuals.values()]
        own = {"parts": self._sizes(), "weights": weights, "flag": flag}
        found = self.replicas.gathered(own, self.layout.device)
        self._agreed = JointPoints.of(*(one["parts"] for one in found))
        if any(one["weights"] != weights for one in found):
            given = ", ".join(str(one["weights"]) for one in found)
            raise ValueError(f"the residuals' weights differ between processes: {given}")
        return any(one["flag"] for one in found)

    def values(self) -> dict[str, Tensor]:
        """Return the residuals as they are, part by part, ``(N_b, R_b)``, those of this process."""
        return {name: self.values_of(residual) for name, residual in self.residuals.items()}

    def values_of(self, residual: Residual) -> Tensor:
        """Return the residuals of a part, one of those given or another, ``(N, R)``."""
        found = [self._values(residual, chosen) for chosen in self._slices(residual)]
        return torch.cat(found) if found else residual.points.new_zeros(0, 1)

    def _values(self, residual: Residual, chosen: slice) -> Tensor:
        with torch.no_grad():
            return self._evaluated(residual, chosen)

    def loss(self) -> Tensor:
        """Return ``Σ_b w_b/(2N_b) Σ_n ‖r_bn‖²``, a scalar, over the points of all processes."""
        return self.loss_of(self.scaled_values())

    def loss_of(self, scaled: Iterable[Tensor]) -> Tensor:
        """Return the loss of what :meth:`scaled_values` yields in each process, a scalar."""
        squares = [rho.square().sum() for rho in scaled]
        own = torch.stack(squares).sum() if squares else self.layout.zeros(1)[0]
        return 0.5 * self.replicas.added_up(own)

    def come_at_once(self) -> bool:
        """Return whether all rows fit the memory that the factorisation or a chunk takes anyway."""
        rows = self.joint.rows
        few = rows * self.layout.numel <= CHUNK_ELEMENTS and self.chunk_size is None
        return few or rows <= self.layout.numel

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Return of every part how many points this process has, and of residuals at each."""
        return {name: (len(one), self._width(name)) for name, one in self.residuals.items()}

    def _width(self, name: str) -> int:
        """Return the number of residuals per point, evaluating a function once; 0 without any."""
        residual = self.residuals[name]
        if not len(residual):
            return 0
        function, width = self._widths.get(name, (None, 0))
        if function is not residual.function:
            width = self._values(residual, slice(0, 1)).shape[1]
            self._check_parameters(name, residual)
            self._widths[name] = residual.function, width
        return width

    def _check_parameters(self, name: str, residual: Residual) -> None:
        """Refuse, or tell of, parameters in a residual that the step would not follow."""
        own = {id(parameter) for parameter in self.parameters.values()}
        for leaf in self._leaves_without_rows(residual):
            what = f"a parameter of shape {tuple(leaf.shape)}"
            if id(leaf) in own:
                raise ValueError(
                    f"the function of residual {name!r} holds {what} of the model as a variable of "
                    "its own, where torch.func does not see it: read it from the model inside the "
                    "function, as in model.coefficient * u(x)"
                )
            warnings.warn(
                f"the function of residual {name!r} reads {what} that is not the model's, so that "
                "it is not trained: register it on the model, as in model.coefficient = "
                "nn.Parameter(...), and read it from there; if it is to stay as it is, "
                "requires_grad_(False) says so",
                stacklevel=2,
            )

    def _slices(self, residual: Residual) -> Iterator[slice]:
        size = self.chunk_size or max(1, CHUNK_ELEMENTS // (OVERHEAD * self.layout.numel))
        for start in range(0, len(residual), size):
            yield slice(start, min(start + size, len(residual)))


class FunctionRows(ResidualRows):
    """Rows of any module by :mod:`torch.func`, one dense block per module with parameters.

    Raises:
        ValueError: If the model treats points jointly or at random, or has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        residuals: Mapping[str, Residual],
        chunk_size: int | None,
        replicas: Replicas | None = None,
    ) -> None:
        super().__init__(model, residuals, chunk_size, replicas)
        self.parameters: dict[str, nn.Parameter] = parameters_by_samples(model, "residual", "point")
        self.layout: ParameterLayout = ParameterLayout.of(model)
        self.blocks: dict[str, Block] = _dense_blocks(model, self.parameters)
        self._at_point = _ResidualAtPoint(model)
        self._places = parameter_places(self._at_point, self.parameters)

    def _evaluated(self, residual: Residual, chosen: slice) -> Tensor:
        values: Tensor = self._over_points(residual, chosen, {}, lambda function: function)
        return values

    def _leaves_without_rows(self, residual: Residual) -> list[Tensor]:
        lent = {name: parameter.detach() for name, parameter in self.parameters.items()}
        with torch.enable_grad():
            value = self._over_points(residual, slice(0, 1), lent, lambda function: function)
        return list(leaves(value))

    def chunks(self) -> Iterator[tuple[float, Tensor, Jacobians]]:
        """Yield shares of the points, their ρ ``(n·R, 1)`` and their rows."""
        waiting: list[tuple[float, Tensor, dict[str, Tensor]]] = []
        together, joint, count = self.come_at_once(), self.joint, 0
        for name, residual in self.residuals.items():
            for chosen in self._slices(residual):
                scale = residual.row_scale(joint.counts[name])
                waiting.append((scale, *self._rows(residual, chosen)))
                count += chosen.stop - chosen.start
                if not together:
                    yield count / joint.total, *self._joined(waiting)
                    waiting, count = [], 0
        if together:
            yield count / joint.total, *self._joined(waiting)

    def scaled_values(self) -> Iterator[Tensor]:
        """Yield ρ alone, ``(n·R, 1)``."""
        counts = self.joint.counts
        found = [
            residual.row_scale(counts[name]) * self._values(residual, chosen).reshape(-1, 1)
            for name, residual in self.residuals.items()
            for chosen in self._slices(residual)
        ]
        yield from [self._end_to_end(found)] if self.come_at_once() else found

    def lengths(self) -> list[int]:
        """Return how many rows each process has."""
        joint = self.joint
        return [sum(n * joint.widths[name] for name, n in own.items()) for own in joint.each]

    def _rows(self, residual: Residual, chosen: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the residuals of some points, ``(n·R, 1)``, and block name → rows ``(n·R, P)``."""
        parameters = {name: p.detach() for name, p in self.parameters.items()}

        def differentiated(function: Any) -> Any:
            def twice(*arguments: Any) -> Any:
                value = function(*arguments)
                return value, value

            return jacrev(twice, has_aux=True)

        rows, values = self._over_points(residual, chosen, parameters, differentiated)
        count = values.numel()
        return values.reshape(count, 1), {
            name: torch.cat([rows[n].reshape(count, -1) for n in block.layout.names], 1)
            for name, block in self.blocks.items()
        }

    def _over_points(
        self, residual: Residual, chosen: slice, parameters: dict[str, Tensor], transform: Any
    ) -> Any:
        """Apply a function of parameters and one point to many points."""

        def at_point(parameters: dict[str, Tensor], point: Tensor, *data: Tensor) -> Tensor:
            given = {place: parameters[name] for place, name in self._places.items() if parameters}
            arguments = residual, point, *(data or (None,))
            value: Tensor = functional_call(self._at_point, given, arguments, tie_weights=False)
            return value

        data = () if residual.data is None else (residual.data[chosen],)
        arguments = (residual.points[chosen], *data)
        in_dims = (None, *(0 for _ in arguments))
        return vmap(transform(at_point), in_dims=in_dims)(parameters, *arguments)

    def _joined(
        self, chunks: list[tuple[float, Tensor, dict[str, Tensor]]]
    ) -> tuple[Tensor, Jacobians]:
        """Scale residuals and rows and join them."""
        values = self._end_to_end([scale * value for scale, value, _ in chunks])
        dense: dict[str, LayerJacobian] = {}
        for name, block in self.blocks.items() if chunks else ():
            scaled = [chunk.pop(name).mul_(scale) for scale, _, chunk in chunks]
            rows = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
            del scaled
            dense[name] = DenseJacobian(block.layout, rows.unsqueeze(1))
        return values, Jacobians(self.layout, dense, len(values), 1)

    def _end_to_end(self, values: list[Tensor]) -> Tensor:
        return torch.cat(values) if values else self.layout.zeros(0, 1)


class CapturedRows(ResidualRows):
    """Factored rows of a :class:`natgrad.TaylorNetwork`, from one pass over all points.

    Raises:
        TypeError: If the model is something else.
        ValueError: If a parameter of the network has no formula.
    """

    def __init__(
        self,
        model: nn.Module,
        residuals: Mapping[str, Residual],
        chunk_size: int | None,
        replicas: Replicas | None = None,
    ) -> None:
        if not isinstance(model, TaylorNetwork):
            raise TypeError(
                f"jacobians='captured' needs a natgrad.TaylorNetwork, got {type(model).__name__}: "
                "wrap the network in one, or use jacobians='vmap'"
            )
        super().__init__(model, residuals, chunk_size, replicas)
        self.problem: ResidualNetwork = ResidualNetwork(model, residuals)
        self.capture: Capture = Capture(self.problem)
        self.capture.check_covered()
        self.capture.recording = False
        self.blocks: dict[str, Block] = self.capture.blocks
        self.layout: ParameterLayout = self.capture.layout
        named = dict(self.problem.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in self.layout.names}

    def _evaluated(self, residual: Residual, chosen: slice) -> Tensor:
        assert isinstance(self.model, TaylorNetwork)
        stack = self.model(residual.points[chosen])
        return self.problem.values_of_stack(residual, stack, chosen)

    def _leaves_without_rows(self, residual: Residual) -> list[Tensor]:
        own = {id(parameter) for parameter in self.parameters.values()}
        with torch.enable_grad():
            value = self._evaluated(residual, slice(0, 1))
        return [leaf for leaf in leaves(value) if id(leaf) not in own]

    def chunks(self) -> Iterator[tuple[float, Tensor, Jacobians]]:
        """Yield shares of the points, their ρ ``(n, K)`` and their rows."""
        total = self.joint.total
        for chosen in self._together():
            count = sum(which.stop - which.start for _, which in chosen)
            yield count / total, *(self._pulled_back(chosen) if count else self._nothing())

    def scaled_values(self) -> Iterator[Tensor]:
        """Yield ρ alone, ``(n, K)``."""
        joint = self.joint
        for chosen in self._together():
            with torch.no_grad():
                scaled = self.problem(chosen, joint) if chosen else self._nothing()[0]
                yield joint.total**-0.5 * scaled

    def lengths(self) -> list[int]:
        """Return how many rows each process has, padded to the widest part."""
        joint = self.joint
        return [sum(own.values()) * joint.least_width for own in joint.each]

    def _together(self) -> list[list[tuple[str, slice]]]:
        slices = [
            (name, chosen)
            for name, residual in self.residuals.items()
            for chosen in self._slices(residual)
        ]
        return [slices] if self.come_at_once() else [[one] for one in slices]

    def _nothing(self) -> tuple[Tensor, Jacobians]:
        """Return residuals and rows where there are no points."""
        width = self.joint.least_width
        return self.layout.zeros(0, width), Jacobians(self.layout, {}, 0, width)

    def _pulled_back(self, chosen: list[tuple[str, slice]]) -> tuple[Tensor, Jacobians]:
        joint = self.joint
        scale = joint.total**-0.5
        self.capture.recording = True
        try:
            with torch.enable_grad():
                output = self.problem(chosen, joint)
            if not output.requires_grad:
                raise ValueError(
                    "the residuals do not depend on any trainable parameter of the network"
                )
            vectors = scale * unit_vectors(output)
            rows = self.capture.pull_back(output, vectors, retain_graph=False)
        finally:
            self.capture.recording = False
            self.capture.clear()
        return scale * output.detach(), rows


class _ResidualAtPoint(nn.Module):
    """A residual of a network at one point, as a module whose parameters can be others.

    They are also where the residual's function itself reads those of the network, as coefficients
    of an equation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, residual: Residual, point: Tensor, data: Tensor | None) -> Tensor:
        """Return it, flat."""
        model = self.model
        u = model.at(point) if isinstance(model, TaylorNetwork) else self._network
        return residual.at(u, point, data)

    def _network(self, x: Tensor) -> Tensor:
        value: Tensor = self.model(x.unsqueeze(0))[0]
        return value


def _dense_blocks(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Block]:
    """Return one block per module that owns parameters; a shared one belongs to the first."""
    names = {parameter: name for name, parameter in parameters.items()}
    blocks: dict[str, Block] = {}
    taken: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p in names and p not in taken]
        if not own:
            continue
        taken.update(own)
        qualified = tuple(names[p] for p in own)
        shapes = tuple(tuple(p.shape) for p in own)
        kind, name = type(module).__name__, module_name or type(module).__name__
        blocks[name] = Block(name, kind, dense_layout(qualified, shapes), ())
    return blocks
