"""Any other module that owns parameters: rows by differentiating the module sample by sample."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    dense_layout,
    parameter_shapes,
)
from natgrad.capture.samples import SampleAxis
from natgrad.distributed.shards import whole
from natgrad.jacobians import DenseJacobian, LayerJacobian
from natgrad.layouts import BlockLayout

#: Largest number of parameters of a module of unknown kind that form one dense block.
DENSE_LIMIT = 1000

#: Up to which ratio the sides of stacked matrices are alike.
ALIKE = 8


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a tensor, tuple, list, mapping or dataclass-like."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from floating_tensors(item)


class NotRunAgain(ValueError):
    """A module computes something else when it runs again; the message says why."""


class GenericKind(LayerKind):
    """A module's own parameters as one dense block, or one block each where they are many.

    The module is run again on one sample at a time (batched by ``vmap`` where it allows), or on the
    whole batch where it couples samples, and the recorded output gradients are pulled back to its
    own parameters. What that does not explain is had at the parameters themselves (see
    :class:`natgrad.capture.row_check.RowCheck`).
    """

    own_layout: ClassVar[bool] = True

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        """Return all parameters the module owns directly."""
        own = dict(module.named_parameters(recurse=False))
        if sum(p.numel() for p in own.values()) > DENSE_LIMIT:
            return [(name,) for name in own]
        return [tuple(own)] if own else []

    def sample_dims(self, dims: int) -> range:
        """Return all: nothing is known of the module."""
        return range(dims)

    def cannot_rerun(self, module: nn.Module) -> str | None:
        """Return why a module cannot be run again for rows of its own parameters, or None."""
        if any(True for child in module.children() for _ in child.parameters()):
            return "holds layers of its own"
        return not_by_samples(module)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Record all inputs and every floating-point output."""
        outputs = tuple(floating_tensors(output))
        detached = _detach(args)
        return [LayerCall(module, "", detached, outputs, {"kwargs": _detach(kwargs)})]

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return a single row of all parameters, or the matrix of a large one."""
        return free_layout(qualified, parameter_shapes(module, names))

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form dense rows ``(N, K, P_l)``."""
        rows = [_pull_back_per_sample(*one, block.names, block.samples) for one in block.calls]
        return DenseJacobian(block.layout, functools.reduce(Tensor.add, rows))


def parameter_places(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return every place of some parameters in a model, shared ones several, → their name.

    (Told to find them itself, functional_call replaces the parameters of a module that occurs twice
    for good.)
    """
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{prefix}.{local}" if prefix else local: names[parameter]
        for prefix, module in model.named_modules()
        for local, parameter in module._parameters.items()
        if parameter in names
    }


def not_by_samples(module: nn.Module) -> str | None:
    """Return why a module does not give every sample an output of its own, or None."""
    for name, child in module.named_modules():
        inside = f" in {name!r}" if name else ""
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            return f"couples its samples by batch statistics{inside}"
        rate = getattr(child, "p", 0.0) if "Dropout" in type(child).__name__ else 0.0
        if isinstance(child, nn.RNNBase):
            rate = child.dropout
        if child.training and isinstance(rate, float) and rate > 0:
            return f"is random by dropout{inside}"
    return None


def parameters_by_samples(model: nn.Module, what: str, whose: str) -> dict[str, nn.Parameter]:
    """Return name → parameter of what is trained of a model.

    A ValueError, about something of a sample, says that there are none, or what couples samples.
    """
    reason = not_by_samples(model)
    if reason is not None:
        raise ValueError(
            f"the {what} of a {whose} must depend on that {whose} alone, but the model {reason}: "
            "call model.eval() first"
        )
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("the model has no trainable parameter")
    return found


def free_layout(qualified: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> BlockLayout:
    """Return the layout of parameters whose use is not known.

    Few entries are kept together, so that structures keep all products of theirs; a large tensor
    is a matrix of its first dimension by all others, a large vector one matrix per entry. Three
    dimensions of which the first is the least and the others are alike, as of stacked experts, are
    one matrix per entry of the first.
    """
    if sum(map(prod, shapes)) <= DENSE_LIMIT:
        return dense_layout(qualified, shapes)
    (shape,) = shapes
    if len(shape) == 3 and shape[0] <= min(shape) and max(shape[1:]) <= ALIKE * min(shape[1:]):
        return BlockLayout(qualified, shapes, *shape, True, False)
    long = [size for size in shape if size > 1]
    rows, columns = (1, 1) if len(long) == 1 else (long[0], prod(long[1:]))
    return BlockLayout(
        qualified, shapes, long[0] if len(long) == 1 else 1, rows, columns, True, False
    )


def _detach(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, value)


def _pull_back_per_sample(
    call: LayerCall, gradients: list[Tensor | None], names: tuple[str, ...], samples: int
) -> Tensor:
    """Return rows ``(N, K, P_l)`` by running the module again on one sample at a time."""
    module, axis = call.module, call.axis
    parameters = {name: whole(module.get_parameter(name).detach()) for name in names}
    buffers = {name: whole(buffer).clone() for name, buffer in module.named_buffers()}
    which = [i for i, g in enumerate(gradients) if g is not None]
    deltas = [_parted(g, axis, samples, 1) for g in gradients if g is not None]
    flat_inputs, spec = torch.utils._pytree.tree_flatten((call.inputs, call.options["kwargs"]))
    parted = [_parted(value, axis, samples) for value in flat_inputs]
    if any(delta is None for delta in deltas):
        raise ValueError(f"an output has no part for each of the {samples} samples")

    def outputs(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        remaining = iter(inputs)
        values = [
            value if part is None else next(remaining)
            for value, part in zip(flat_inputs, parted, strict=True)
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(values, spec)
        held = {name: buffer.clone() for name, buffer in buffers.items()}
        # Uses of the same parameters by layers inside are theirs to count.
        result = functional_call(module, {**parameters, **held}, args, kwargs, tie_weights=False)
        if any(one._version for one in held.values()):
            raise NotRunAgain("it changes its buffers")  # To others now than in the pass.
        tensors = tuple(floating_tensors(result))
        return tuple(tensors[i] for i in which)

    def rows(inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Tensor:
        pull = vjp(lambda p: outputs(p, inputs), parameters)[1]
        result = vmap(pull)(cotangents)[0]
        return torch.cat([result[name].reshape(result[name].shape[0], -1) for name in names], dim=1)

    inputs = tuple(part[0] for part in parted if part is not None)
    dims = tuple(part[1] for part in parted if part is not None)
    cotangents, cotangent_dims = zip(*cast("list[tuple[Tensor, int]]", deltas), strict=True)
    one_row = samples == 1 and len(cotangents[0]) == 1  # Which needs no batching.
    try:
        if not one_row:
            return vmap(rows, in_dims=(dims, cotangent_dims))(inputs, cotangents)
    except RuntimeError:  # Some kernels, and control flow that looks at data, cannot be batched.
        pass
    device = cotangents[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _random_state(device)
        found = torch.stack(
            [
                _rows_of_one(
                    outputs,
                    parameters,
                    tuple(v.select(d, n) for v, d in zip(inputs, dims, strict=True)),
                    tuple(g.select(d, n) for g, d in zip(cotangents, cotangent_dims, strict=True)),
                )
                for n in range(samples)
            ]
        )
        if not torch.equal(_random_state(device), before):
            raise NotRunAgain("it draws random numbers")  # Others now than in the pass.
    return found


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the random numbers of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _parted(value: Any, axis: SampleAxis, samples: int, lead: int = 0) -> tuple[Tensor, int] | None:
    """Return a tensor with a dimension of its own for the samples, and which that is.

    The samples lie where they do in the first output or, failing that, in the first dimension. A
    tensor that has no room for them there serves all of them: None.
    """
    if not isinstance(value, Tensor):
        return None
    for place in (axis, SampleAxis()):
        dim = lead + place.dim
        if value.dim() > dim and value.shape[dim] and value.shape[dim] % samples == 0:
            if place.outer:
                return value.unflatten(dim, (samples, -1)), dim
            return value.unflatten(dim, (-1, samples)), dim + 1
    return None


def _rows_of_one(
    outputs: Any,
    parameters: dict[str, Tensor],
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
) -> Tensor:
    """Return ``(K, P_l)`` for one sample with plain autograd."""
    with torch.enable_grad():
        leaves = {name: p.clone().requires_grad_(True) for name, p in parameters.items()}
        values = outputs(leaves, inputs)
        rows = []
        for direction in range(cotangents[0].shape[0]):
            grads = torch.autograd.grad(
                values,
                list(leaves.values()),
                [c[direction] for c in cotangents],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)
