"""Any other module that owns parameters: rows by differentiating the module sample by sample."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

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
from natgrad.jacobians import DenseJacobian, LayerJacobian
from natgrad.layouts import BlockLayout

__all__ = ["GenericKind", "floating_tensors"]


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


class GenericKind(LayerKind):
    """A module's own parameters as one dense block.

    The module is run again on one sample at a time (batched by ``vmap`` where it allows) and the
    recorded output gradients are pulled back to its own parameters. Exact for every module that
    treats samples independently and deterministically.
    """

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        """Return all parameters the module owns directly, as one block."""
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        return [names] if names else []

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse modules whose samples are coupled or random."""
        for name, child in module.named_modules():
            inside = f" in {name!r}" if name else ""
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
                return f"batch statistics{inside} couple its samples in training mode"
            rate = getattr(child, "p", 0.0) if "Dropout" in type(child).__name__ else 0.0
            if isinstance(child, nn.RNNBase):
                rate = child.dropout
            if child.training and isinstance(rate, float) and rate > 0:
                return f"dropout{inside} makes its output random in training mode"
        return None

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
        """Return a single row of all parameters."""
        return dense_layout(qualified, parameter_shapes(module, names))

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form dense rows ``(N, K, P_l)``."""
        rows = [_pull_back_per_sample(*one, block.names, block.samples) for one in block.calls]
        return DenseJacobian(block.layout, functools.reduce(Tensor.add, rows))


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detach(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_detach(item) for item in value)
    return value


def _batch_dims(module: nn.Module) -> tuple[int, int]:
    """Return the batch dimensions of the first input and of further tensors (RNN states)."""
    if isinstance(module, nn.RNNBase):
        return (0 if module.batch_first else 1), 1
    return 0, 0


def _pull_back_per_sample(
    call: LayerCall, gradients: list[Tensor | None], names: tuple[str, ...], samples: int
) -> Tensor:
    module = call.module
    parameters = {name: module.get_parameter(name).detach() for name in names}
    present = [(i, g) for i, g in enumerate(gradients) if g is not None]
    which = [i for i, _ in present]
    deltas = [g for _, g in present]
    first_dim, other_dim = _batch_dims(module)
    out_dims = [first_dim if i == 0 else other_dim for i in which]

    flat_inputs, spec = torch.utils._pytree.tree_flatten((call.inputs, call.options["kwargs"]))
    in_dims: list[int | None] = []
    for position, value in enumerate(flat_inputs):
        dim = first_dim if position == 0 else other_dim
        batched = isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == samples
        in_dims.append(dim if batched else None)
    batched_inputs = [v for v, d in zip(flat_inputs, in_dims, strict=True) if d is not None]
    batched_dims = [d for d in in_dims if d is not None]

    def outputs(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        remaining = iter(inputs)
        values = [
            v if d is None else next(remaining).unsqueeze(d)
            for v, d in zip(flat_inputs, in_dims, strict=True)
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(values, spec)
        # Uses of the same parameters by layers inside are theirs to count.
        result = functional_call(module, parameters, args, kwargs, tie_weights=False)
        tensors = tuple(floating_tensors(result))
        return tuple(tensors[i].squeeze(d) for i, d in zip(which, out_dims, strict=True))

    def rows(inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Tensor:
        pull = vjp(lambda p: outputs(p, inputs), parameters)[1]
        result = vmap(pull)(cotangents)[0]
        return torch.cat([result[name].reshape(result[name].shape[0], -1) for name in names], dim=1)

    inputs = tuple(batched_inputs)
    cotangents = tuple(deltas)
    cotangent_dims = tuple(d + 1 for d in out_dims)
    try:
        return vmap(rows, in_dims=(tuple(batched_dims), cotangent_dims))(inputs, cotangents)
    except RuntimeError:
        # Some kernels (recurrent cells, custom functions) have no batching rule.
        return torch.stack(
            [
                _rows_of_one(
                    outputs,
                    parameters,
                    tuple(v.select(d, n) for v, d in zip(inputs, batched_dims, strict=True)),
                    tuple(g.select(d, n) for g, d in zip(cotangents, cotangent_dims, strict=True)),
                )
                for n in range(samples)
            ]
        )


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
