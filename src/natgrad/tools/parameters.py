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
    """Return the tensors of a layout's parameters, by name.

    Raises:
        ValueError: If one does not fit, or is in shards.
    """
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


def block_layouts(model: nn.Module) -> dict[str, BlockLayout]:
    """Return block name → how its parameters are laid out."""
    with Capture(model) as capture:
        return {name: block.layout for name, block in capture.blocks.items()}


def weight_blocks(
    model: nn.Module, layers: Collection[str] | None = None
) -> dict[str, BlockLayout]:
    """Return the blocks with weight matrices, all of them or those of some names."""
    found = {n: b for n, b in block_layouts(model).items() if b.has_weight and b.d_out * b.d_in > 1}
    if layers is None:
        return found
    unknown = sorted(set(layers) - set(found))
    if unknown:
        raise ValueError(f"no weight matrices in layers {unknown}: there are some in {list(found)}")
    return {name: found[name] for name in found if name in set(layers)}


def places(layout: ParameterLayout, block: BlockLayout) -> Tensor:
    """Return where the entries of a block's matrices lie in the flat vector of all parameters.

    Its shape is ``(G, d_out, d_in + bias)``.
    """
    index = torch.arange(layout.numel, device=layout.device).unsqueeze(1)
    return block.matrix(layout.gather(block, index)[:, 0])
