"""How the tools look at a model's parameters: by name, by block, and as places in one vector."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from natgrad.arguments import check_parameters
from natgrad.capture import Capture
from natgrad.capture.model_output import unwrap
from natgrad.layouts import BlockLayout, ParameterLayout


def values_of(
    layout: ParameterLayout, source: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a layout's parameters, by name; a ValueError if one does not fit."""
    model = unwrap(source) if isinstance(source, nn.Module) else None
    values = source if model is None else dict(model.named_parameters())
    assert isinstance(values, Mapping)
    for name in layout.names:
        shape = tuple(values[name].shape) if name in values else None
        if shape != layout.shapes[name]:
            raise ValueError(
                f"the Fisher matrix is about a parameter {name!r} of shape {layout.shapes[name]}, "
                f"but the model has {'none' if shape is None else f'one of shape {shape}'}: make "
                "the matrix of the same parameters"
            )
    found = {name: values[name] for name in layout.names}
    check_parameters(found)
    return found


def weight_blocks(
    model: nn.Module, layers: Collection[str] | None = None
) -> dict[str, BlockLayout]:
    """Return the blocks with weight matrices, all of them or those of some names."""
    with Capture(model) as capture:
        blocks = {name: block.layout for name, block in capture.blocks.items()}
    found = {name: block for name, block in blocks.items() if weight_names(block)}
    if layers is None:
        return found
    unknown = sorted(set(layers) - set(found))
    if unknown:
        raise ValueError(f"no weight matrices in layers {unknown}: there are some in {list(found)}")
    return {name: found[name] for name in found if name in set(layers)}


def weight_names(block: BlockLayout) -> tuple[str, ...]:
    """Return which parameters of a block are weights, not biases, norms or single numbers.

    A block without a matrix form may hold several, and what else its module has.
    """
    if not block.is_dense:
        return block.names[: int(block.has_weight and block.d_out * block.d_in > 1)]
    sizes = zip(block.names, block.shapes, block.sizes, strict=True)
    return tuple(name for name, shape, size in sizes if len(shape) > 1 and size > 1)


def has_units(block: BlockLayout) -> bool:
    """Return whether the rows of a block's matrices are output units, each with its bias.

    A single row of all parameters of a module is none, but that of a layer with one output is.
    """
    one = len(block.names) == 1 or block.has_bias
    return not block.is_dense or (one and block.shapes[0][0] == 1)


def weight_places(layout: ParameterLayout, block: BlockLayout) -> list[Tensor]:
    """Return where the weights of a block lie in the flat vector, ``(G, d_out, d_in)`` each.

    Weights without a matrix form are one matrix each, of their first dimension by all others.
    """
    if not block.is_dense:
        return [places(layout, block)[..., : block.d_in]]
    index = torch.arange(layout.numel, device=layout.device)
    found = layout.to_dict(index)
    return [found[name].flatten(1).unsqueeze(0) for name in weight_names(block)]


def places(layout: ParameterLayout, block: BlockLayout) -> Tensor:
    """Return where the entries of a block's matrices lie in the flat vector of all parameters.

    Its shape is ``(G, d_out, d_in + bias)``.
    """
    index = torch.arange(layout.numel, device=layout.device).unsqueeze(1)
    return block.matrix(layout.gather(block, index)[:, 0])
