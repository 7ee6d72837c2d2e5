"""How a layer's parameters are laid out: as flat vectors outside, as matrices inside.

Every structure works on *blocks*. A block is the trainable part of one layer, usually its weight
and bias, seen as ``groups`` matrices of shape ``(d_out, d_in + 1)``: the weight of each output
unit, with its bias in the last column. Norm layers are ``d`` groups of one unit with one input;
a depthwise convolution has one group per channel; a lone bias has ``d_in = 0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from natgrad.arguments import check_parameters
from natgrad.distributed.shards import own_shard, shard_count

#: From which ratio on outputs are many beside inputs.
MANY_OUTPUTS = 8


@dataclass(frozen=True)
class BlockLayout:
    """The correspondence between a block's flat vector and its matrices.

    The flat vector is the concatenation of the flattened parameters in the order of ``names``
    (weight before bias). The matrix form is ``(groups, d_out, d_in + has_bias)``.

    Attributes:
        names: Qualified parameter names, weight first.
        shapes: Their shapes.
        groups: Number of independent matrices ``G``.
        d_out: Rows of each matrix (output units per group).
        d_in: Columns of each matrix without the bias column.
        has_weight: Whether the block holds a weight.
        has_bias: Whether the block holds a bias.
        transposed: The weight is stored as ``(G, d_in, d_out)`` (embeddings, transposed
            convolutions).
        kernel: Of a transposed weight, how many entries of a kernel belong to each input: it is
            stored as ``(G, d_in/kernel, d_out, kernel)``.
        one_hot: Inputs are one-hot, so that their second moment is diagonal.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: int
    d_out: int
    d_in: int
    has_weight: bool = True
    has_bias: bool = True
    transposed: bool = False
    one_hot: bool = False
    kernel: int = 1

    @cached_property
    def numel(self) -> int:
        """Number of parameters in the block, ``P_l``."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter, in the order of ``names``."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def is_dense(self) -> bool:
        """Whether the matrix is one row of all parameters."""
        return self.groups == self.d_out == 1 and self.d_augmented == self.numel

    @property
    def d_augmented(self) -> int:
        """Columns of each matrix, the bias column included."""
        return self.d_in + int(self.has_bias)

    def large_factors(self, max_factor_size: int | None) -> tuple[bool, bool]:
        """Return whether the Kronecker factors of inputs and of outputs are too large to be dense.

        Args:
            max_factor_size: Larger factors are. So are those of outputs beyond an eighth of it
                that are more than eight times as many as the inputs, as of a vocabulary or an
                adapter: they would cost more than all else, and the second moment
                ``E[diag p − ppᵀ]`` of many classes is nearly diagonal. None for no limit.
        """
        if max_factor_size is None:
            return False, False
        many = self.d_out > MANY_OUTPUTS * self.d_augmented
        limit = max_factor_size / MANY_OUTPUTS if many else max_factor_size
        return self.d_augmented > max_factor_size, self.d_out > limit

    def matrix(self, flat: Tensor) -> Tensor:
        """Turn flat vectors ``(..., P_l)`` into matrices ``(..., G, d_out, d_in + bias)``."""
        lead = flat.shape[:-1]
        parts: list[Tensor] = []
        weight_size = self.groups * self.d_out * self.d_in
        if self.has_weight:
            weight = flat[..., :weight_size]
            if self.transposed:
                shape = (self.groups, self.d_in // self.kernel, self.d_out, self.kernel)
                parts.append(weight.reshape(*lead, *shape).transpose(-3, -2).flatten(-2))
            else:
                parts.append(weight.reshape(*lead, self.groups, self.d_out, self.d_in))
        if self.has_bias:
            bias = flat[..., weight_size:] if self.has_weight else flat
            parts.append(bias.reshape(*lead, self.groups, self.d_out, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def flat(self, matrix: Tensor) -> Tensor:
        """Turn matrices ``(..., G, d_out, d_in + bias)`` into flat vectors ``(..., P_l)``."""
        lead = matrix.shape[:-3]
        if not self.has_bias:
            return self._stored(matrix).reshape(*lead, -1)
        if not self.has_weight:
            return matrix.reshape(*lead, -1)
        weight = self._stored(matrix[..., : self.d_in])
        return torch.cat(
            [weight.reshape(*lead, -1), matrix[..., self.d_in].reshape(*lead, -1)], dim=-1
        )

    def _stored(self, weight: Tensor) -> Tensor:
        """Return weights ``(..., G, d_out, d_in)`` in the order they are stored in."""
        if not self.transposed:
            return weight
        channels: Tensor = weight.unflatten(-1, (self.d_in // self.kernel, self.kernel))
        return channels.transpose(-3, -2)

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """Concatenate one tensor per parameter into the block's flat vector ``(P_l,)``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def scatter(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector ``(P_l,)`` into one tensor per parameter, each in its shape."""
        pieces = flat.split(list(self.sizes))
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def to_flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the block's entries of a mapping name → tensor into ``(P_l,)``."""
        return self.gather([tensors[name] for name in self.names])

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector ``(P_l,)`` into a dict name → tensor."""
        return dict(zip(self.names, self.scatter(flat), strict=True))


def inner_product(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Return ``Σ ⟨left, right⟩`` over the names of ``left``; NaN or infinite if any entry is.

    Of tensors in shards it is what has that as its mean over processes.
    """
    terms = []
    for name, value in left.items():
        one, other = own_shard(value).reshape(-1), own_shard(right[name]).reshape(-1)
        terms.append(torch.dot(one, other.to(one.dtype)) * shard_count(value))
    return torch.stack(terms).sum()


class HasParameters(Protocol):
    """Anything that holds some of the parameters, each as a whole: a block or a part."""

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified parameter names."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their numbers of entries."""


class ParameterLayout:
    """The order of all trainable parameters in one flat vector.

    It is the order of :func:`torch.nn.utils.parameters_to_vector` over the trainable entries of
    ``model.named_parameters()``; parameters that occur under several names occur once.

    Attributes:
        names: Qualified parameter names in order.
        shapes: Their shapes, by name.
        offsets: Where each starts in the flat vector, by name.
        numel: Length ``P`` of the flat vector.
        dtype: Dtype curvature is computed in: the parameters' own, at least float32.
        device: Device of the first parameter.
        dtypes: The parameters' own dtypes, by name.
    """

    def __init__(
        self,
        parameters: dict[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.dtype = dtype
        self.dtypes: dict[str, torch.dtype] = dict(dtypes or dict.fromkeys(parameters, dtype))
        self.device: torch.device = device or torch.device("cpu")
        self.names: tuple[str, ...] = tuple(parameters)
        self.shapes: dict[str, tuple[int, ...]] = dict(parameters)
        self.offsets: dict[str, int] = {}
        offset = 0
        for name, shape in parameters.items():
            self.offsets[name] = offset
            offset += prod(shape)
        self.numel = offset

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter, in the order of ``names``."""
        return tuple(prod(self.shapes[name]) for name in self.names)

    @classmethod
    def of(
        cls, model: torch.nn.Module, shards: bool = False, leaves_complex: bool = False
    ) -> ParameterLayout:
        """Return the layout of a model's trainable parameters.

        Args:
            model: The model.
            shards: Whether its parameters may be spread over processes.
            leaves_complex: Whether complex parameters are left out where there are real ones.

        Raises:
            ValueError: If one is complex or sharded.
        """
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if leaves_complex:
            real = {n: p for n, p in parameters.items() if not p.is_complex()}
            parameters = real or parameters
        check_parameters(parameters, shards)
        dtype = torch.float32
        for parameter in parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        device = next((p.device for p in parameters.values()), None)
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        return cls(shapes, dtype, device, {n: p.dtype for n, p in parameters.items()})

    def subset(self, names: Iterable[str]) -> ParameterLayout:
        """Return the layout of some of the parameters, in the same order."""
        wanted = set(names)
        shapes = {n: self.shapes[n] for n in self.names if n in wanted}
        return ParameterLayout(shapes, self.dtype, self.device, self.dtypes)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in the layout's dtype and device."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def slices(self, block: HasParameters) -> list[slice]:
        """Return where a block's parameters lie in the flat vector."""
        return [
            slice(self.offsets[name], self.offsets[name] + size)
            for name, size in zip(block.names, block.sizes, strict=True)
        ]

    def gather(self, block: HasParameters, columns: Tensor) -> Tensor:
        """Take a block's rows ``(P_l, k)`` out of ``(P, k)``."""
        pieces = [columns[s] for s in self.slices(block)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def scatter(self, block: HasParameters, values: Tensor, columns: Tensor) -> None:
        """Write a block's rows ``(P_l, k)`` into ``(P, k)`` in place."""
        for s, piece in zip(self.slices(block), values.split(list(block.sizes)), strict=True):
            columns[s] = piece

    def add(self, block: HasParameters, values: Tensor, columns: Tensor) -> None:
        """Add a block's rows ``(P_l, ...)`` to those of ``(P, ...)`` in place."""
        for s, piece in zip(self.slices(block), values.split(list(block.sizes)), strict=True):
            columns[s] += piece

    def to_column(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate a mapping name → tensor into ``(P, 1)``, zero where a name is missing."""
        pieces = [
            tensors[name].reshape(-1).to(self.dtype) if name in tensors else self.zeros(prod(shape))
            for name, shape in self.shapes.items()
        ]
        return torch.cat(pieces).unsqueeze(1)

    def to_flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate a dict name → tensor into one flat vector ``(P,)``.

        Raises:
            ValueError: If a name is missing, unknown, or has the wrong shape.
        """
        unknown = set(tensors) - set(self.names)
        missing = [name for name in self.names if name not in tensors]
        if unknown or missing:
            raise ValueError(
                f"the dict must have exactly the trainable parameters as keys; "
                f"missing: {missing or 'none'}, unknown: {sorted(unknown) or 'none'}"
            )
        for name in self.names:
            if tuple(tensors[name].shape) != self.shapes[name]:
                raise ValueError(
                    f"entry {name!r} has shape {tuple(tensors[name].shape)}, but the parameter "
                    f"has shape {self.shapes[name]}"
                )
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector ``(P,)`` into a dict name → tensor."""
        return {
            name: flat[self.offsets[name] : self.offsets[name] + prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }
