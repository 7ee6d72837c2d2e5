"""Which parameters of a model are uncertain."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

__all__ = ["named_parameters"]


def named_parameters(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Return the names of the trainable parameters that a list of names stands for.

    Args:
        model: The model.
        names: Names of parameters, or of modules with all that they hold.

    Raises:
        ValueError: If a name is neither, or there is no trainable parameter under it.
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
