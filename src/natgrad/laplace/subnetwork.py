"""Which parameters of a model are uncertain."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.operators.operator import VectorLayout


def largest_entries(scores: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return masks of the entries with the largest scores, a subnetwork for ``parameters=``.

    Args:
        scores: Parameter name → a score for each of its entries. The sizes of the parameters give
            the subnetwork of largest magnitudes, the variances of a diagonal posterior that of
            Daxberger et al., random numbers a random one.
        number: How many entries.

    Returns:
        Parameter name → mask, for the parameters of which some entries are among them.

    Raises:
        ValueError: If there are no so many entries, or scores are NaN.

    Source: Daxberger et al., Bayesian deep learning via subnetwork inference (2021).

    Example:
        >>> coarse = natgrad.Laplace(model, loader, "categorical", "diagonal")
        >>> variances = coarse.matrix.layout.to_dict(coarse.covariance.diagonal())
        >>> masks = natgrad.laplace.largest_entries(variances, 20)
        >>> posterior = natgrad.Laplace(model, loader, "categorical", "full", parameters=masks)
    """
    check_integer("number", number)
    entries = sum(values.numel() for values in scores.values())
    if number > entries:
        raise ValueError(f"number must be at most that of all entries, {entries}, got {number}")
    flat = torch.cat([values.detach().reshape(-1) for values in scores.values()])
    if bool(flat.isnan().any()):
        raise ValueError("scores must be numbers, and some of them are NaN")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(number).indices] = True
    pieces = chosen.split([values.numel() for values in scores.values()])
    masks = {n: m.view_as(v) for (n, v), m in zip(scores.items(), pieces, strict=True)}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


def checked_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of a subnetwork: not empty, and each of a trainable parameter."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, mask in masks.items():
        if name not in trainable or mask.shape != trainable[name].shape:
            shape = tuple(trainable[name].shape) if name in trainable else "none"
            raise ValueError(
                f"parameters has a mask of shape {tuple(mask.shape)} for {name!r}, whose shape as "
                f"a trainable parameter is {shape}"
            )
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError(
                f"the mask for {name!r} must be of type bool and true somewhere: leave out "
                "parameters that are certain"
            )
    if not masks:
        raise ValueError("parameters must be 'all', 'last_layer' or at least one name")
    return {name: mask.to(trainable[name].device) for name, mask in masks.items()}


def uncertain_entries(masks: Mapping[str, Tensor] | None, layout: VectorLayout) -> Tensor | None:
    """Return which entries of some parameters are uncertain, ``(P',)``; None for all."""
    if masks is None:
        return None
    mask = torch.cat([masks[name].reshape(-1) for name in layout.names])
    return None if bool(mask.all()) else mask.nonzero()[:, 0]


def named_parameters(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Return the trainable parameters that names stand for, of parameters or of whole modules.

    A name that is neither, or that no trainable parameter is under, is a ValueError.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    found: set[str] = set()
    for name in names:
        own = {one for one in trainable if one == name or one.startswith(f"{name}.")}
        if not own:
            raise ValueError(
                f"parameters names {name!r}, and there is no trainable parameter or module with "
                f"some of that name: there are {sorted(trainable)}"
            )
        found |= own
    if not found:
        raise ValueError("parameters must be 'all', 'last_layer' or at least one name")
    return frozenset(found)
