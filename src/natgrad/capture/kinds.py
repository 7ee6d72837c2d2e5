"""What natgrad must know of a layer kind to turn its hooks' recordings into Jacobian rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.capture.samples import SampleAxis
from natgrad.jacobians import DenseJacobian, LayerJacobian, LinearJacobian
from natgrad.layouts import BlockLayout


@dataclass(eq=False)
class LayerCall:
    """One recorded call of a layer.

    Attributes:
        module: The layer.
        key: Which part of the layer was called (attention has several; otherwise ``""``).
        inputs: Detached positional inputs, and whatever else the kind needs later.
        outputs: Output tensors; dropped by the capture once their gradient edges are taken.
        options: Keyword inputs or other facts about the call.
        axis: Where the samples lie, or lay before they were brought to the front.
        of_data: Whether a linear map's inputs are data, or what frozen layers make of them: no
            gradient goes there.
    """

    module: nn.Module
    key: str
    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    axis: SampleAxis = SampleAxis()  # noqa: RUF009, frozen
    of_data: bool = False


def dense(tensor: Tensor) -> Tensor:
    """Return a detached tensor whose entries all have a place, as rows of products need it."""
    detached = tensor.detach()
    return detached if detached.layout is torch.strided else detached.to_dense()


def is_parameter(value: Any) -> bool:
    """Return whether a value is a parameter or a view of one."""
    known = isinstance(value, Tensor)
    return known and any(isinstance(one, nn.Parameter) for one in (value, value._base))


def is_data(inputs: Tensor) -> bool:
    """Return whether no gradient goes to inputs; False for those of torch.fx, which cannot tell."""
    return inputs.requires_grad is False


def sparsity(tensor: Tensor) -> dict[str, Any]:
    """Return the option that tells a call's inputs were sparse; none for others."""
    return {} if tensor.layout is torch.strided else {"sparse": True}


#: A layer call and the gradients of its outputs, ``(K, *output.shape)``.
CallGradients = tuple[LayerCall, list[Tensor | None]]


@dataclass(frozen=True, eq=False)
class BlockRecord:
    """What the rows of a block are formed from.

    Attributes:
        layout: The block's layout.
        names: The block's parameter names within the module.
        calls: Recorded calls, each with the gradients of its outputs, ``(K, *output.shape)``.
        samples: ``N``.
        partial: Which of them leave positions with zero gradient out of input factors, as some
            of their events do not count, ``(N,)``; None for none.
    """

    layout: BlockLayout
    names: tuple[str, ...]
    calls: list[CallGradients]
    samples: int
    partial: Tensor | None

    def single_outputs(self) -> Iterator[tuple[LayerCall, Tensor]]:
        """Yield the calls of a layer with one output, each with its gradient."""
        for call, (gradient,) in self.calls:
            assert gradient is not None
            yield call, gradient

    def linear(self, rows: list[tuple[Tensor, Tensor]], bias_value: float = 1.0) -> LinearJacobian:
        """Return the rows of a linear map of inputs ``(N, T, G, d)`` and δ ``(N, K, T, G, d_out)``.

        They come call by call; the bias is multiplied by ``bias_value``.
        """
        inputs, gradients = rows[0]
        if len(rows) > 1:
            inputs = torch.cat([a for a, _ in rows], dim=1)
            gradients = torch.cat([d for _, d in rows], dim=2)
        return LinearJacobian(
            self.layout, inputs, gradients, bias_value=bias_value, partial=self.partial
        )


class LayerKind(ABC):
    """How one kind of layer is recorded and how its rows are formed."""

    #: Names of child modules whose parameters this kind handles itself.
    owned_children: tuple[str, ...] = ()
    #: Whether one call may serve all samples, as that of a table of positions does.
    may_be_shared: ClassVar[bool] = False
    #: Whether the kind brings the samples of its calls to the front by itself. Otherwise inputs
    #: and output gradients come as ``(N·r, ...)`` and ``(K, N·r, ...)`` whatever the layout.
    own_layout: ClassVar[bool] = False
    #: Whether calls are recorded while the module runs, by a :meth:`recorder`, not after it has.
    records_inside: ClassVar[bool] = False

    def sample_dims(self, dims: int) -> Sequence[int]:
        """Return which of the dimensions of an output may hold the samples, the likeliest first."""
        return range(min(dims, 1))

    def samples_first(self, call: LayerCall, gradients: Tensor) -> Tensor | None:
        """Return output gradients ``(K, N·r, ...)`` of a kind that has a layout of its own.

        None if there is no way to lay them out so.
        """
        return gradients

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        """Return the layer's parameter names, one tuple per block."""
        present = tuple(
            name for name in ("weight", "bias") if getattr(module, name, None) is not None
        )
        return [present] if present else []

    def refuse(self, module: nn.Module) -> str | None:
        """Return why the layer cannot be covered in its present mode, or None."""
        return None

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Turn one forward call into recordings; the default takes the first input."""
        first = args[0] if args else next(iter(kwargs.values()))
        options, of_data = sparsity(first), is_data(first)
        return [LayerCall(module, "", (dense(first),), (output,), options, of_data=of_data)]

    def recorder(self, module: nn.Module, record: Callable[[LayerCall], None]) -> TorchFunctionMode:
        """Return a mode in which the module runs, and which records its calls."""
        raise NotImplementedError

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the call keys that concern a block with these parameters."""
        return ("",)

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return the layout of the block that holds the parameters ``names`` of ``module``.

        By default it is that of a weight ``d_out × d_in``, a bias or both.
        """
        shapes = parameter_shapes(module, names)
        has_weight, has_bias = "weight" in names[0], "bias" in names[-1]
        d_in = shapes[0][1] if has_weight else 0
        return BlockLayout(qualified, shapes, 1, shapes[0][0], d_in, has_weight, has_bias)

    @abstractmethod
    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form the rows of one block."""


_KINDS: dict[type[nn.Module], LayerKind] = {}
# Layers of libraries that need not be installed, by module and class name.
_NAMED_KINDS: dict[tuple[str, str], LayerKind] = {}


def register_kind(kind: LayerKind, *module_types: type[nn.Module]) -> None:
    """Let ``kind`` handle modules of the given types."""
    for module_type in module_types:
        _KINDS[module_type] = kind


def register_named_kind(kind: LayerKind, module_name: str, class_name: str) -> None:
    """Let ``kind`` handle a class of a library that need not be installed."""
    _NAMED_KINDS[(module_name, class_name)] = kind


def find_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind that handles a module, or None.

    A subclass inherits its parent's kind only if it keeps the parent's ``forward``: an overridden
    one may compute anything.
    """
    for parent in type(module).__mro__:
        kind = _KINDS.get(parent) or _NAMED_KINDS.get((parent.__module__, parent.__name__))
        if kind is not None:
            keeps_forward = getattr(type(module), "forward") is getattr(parent, "forward")  # noqa: B009
            return kind if keeps_forward and "forward" not in vars(module) else None
    return None


def fold_inputs(inputs: Tensor, samples: int, features: int) -> Tensor:
    """Reshape ``(N·r, ..., d)`` to ``(N, T, d)``, folding everything between into positions."""
    _check_fold(inputs.shape[0], samples)
    return inputs.reshape(samples, -1, features)


def fold_gradients(gradients: Tensor, samples: int, features: int) -> Tensor:
    """Reshape ``(K, N·r, ..., d)`` to ``(N, K, T, d)``."""
    _check_fold(gradients.shape[1], samples)
    return gradients.reshape(gradients.shape[0], samples, -1, features).transpose(0, 1)


def of_samples(inputs: Tensor, samples: int, chosen: Tensor | None) -> Tensor:
    """Return the part of ``(N·r, ...)`` that belongs to the chosen samples; all of it for None."""
    if chosen is None:
        return inputs
    return inputs.reshape(samples, -1, *inputs.shape[1:])[chosen].flatten(0, 1)


def _check_fold(size: int, samples: int) -> None:
    if size % samples:
        raise ValueError(
            f"a layer saw a batch of {size}, which is no multiple of the {samples} samples in the "
            "model's output; natgrad needs the batch in the first dimension of every layer input"
        )


def parameter_shapes(module: nn.Module, names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of some parameters of a module."""
    return tuple(tuple(module.get_parameter(name).shape) for name in names)


def dense_layout(qualified: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> BlockLayout:
    """Return the layout of parameters that have no matrix form: a single row of all of them."""
    return BlockLayout(qualified, shapes, 1, 1, sum(map(prod, shapes)), True, False)


RowsFunction = Callable[[Any, tuple[Any, ...], Tensor], "tuple[Tensor, Tensor] | dict[str, Tensor]"]


class _RegisteredKind(LayerKind):
    """A layer kind made from one user function."""

    def __init__(self, function: RowsFunction, parameters: tuple[str, ...] | None) -> None:
        self.function = function
        self.parameters = parameters

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        names = self.parameters or tuple(n for n, _ in module.named_parameters(recurse=False))
        return [names]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        values = (*args, *kwargs.values())
        detached = tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
        return [LayerCall(module, "", detached, (output,))]

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        shapes = parameter_shapes(module, names)
        if len(shapes[0]) == 2 and shapes[1:] in ((), ((shapes[0][0],),)):
            return BlockLayout(
                qualified, shapes, 1, shapes[0][0], shapes[0][1], True, len(shapes) == 2
            )
        return dense_layout(qualified, shapes)

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        pairs: list[tuple[Tensor, Tensor]] = []
        dense: Tensor | None = None
        for call, gradient in block.single_outputs():
            result = self.function(call.module, call.inputs, gradient)
            if isinstance(result, dict):
                rows = torch.cat([result[n].flatten(2) for n in block.names], dim=2)
                dense = rows if dense is None else dense + rows
            else:
                a, delta = result
                pairs.append((a.unsqueeze(2), delta.unsqueeze(3)))
        if dense is not None:
            return DenseJacobian(dense_layout(block.layout.names, block.layout.shapes), dense)
        return block.linear(pairs)


def register_layer(
    module_type: type[nn.Module],
    jacobian: RowsFunction,
    parameters: tuple[str, ...] | None = None,
) -> None:
    """Teach natgrad a layer kind of your own with one function.

    Args:
        module_type: The layer class. Subclasses that keep its ``forward`` are covered too.
        jacobian: ``jacobian(module, inputs, output_gradients)`` where ``inputs`` are the detached
            inputs of one call and ``output_gradients`` has shape ``(K, *output.shape)``. It
            returns either a pair ``(a, delta)`` of shapes ``(N, T, d_in)`` and ``(N, K, T,
            d_out)``, meaning the weight's rows are ``Σ_t delta aᵀ`` and the bias's ``Σ_t delta``
            (only for one weight ``(d_out, d_in)`` and an optional bias ``(d_out,)``), or a dict
            parameter name → per-sample gradients ``(N, K, *parameter.shape)``.
        parameters: The layer's parameter names, weight first; all its own parameters by default.

    Raises:
        TypeError: If ``module_type`` is not a subclass of :class:`torch.nn.Module`.

    Example:
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> def rows(module, inputs, output_gradients):
        ...     return inputs[0].unsqueeze(1), 2 * output_gradients.transpose(0, 1).unsqueeze(2)
        >>> natgrad.register_layer(Scaled, rows)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    register_kind(_RegisteredKind(jacobian, parameters), module_type)
