"""The table of structures by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from natgrad.curvature.base import FisherMatrix
from natgrad.layouts import ParameterLayout

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = ["STRUCTURES", "make_structure", "register_structure"]

#: Name → class of every known structure.
STRUCTURES: dict[str, type[FisherMatrix]] = {}

_Structure = TypeVar("_Structure", bound=type[FisherMatrix])


def register_structure(cls: _Structure) -> _Structure:
    """Make a structure available under its ``structure`` name (a class decorator)."""
    STRUCTURES[cls.structure] = cls
    return cls


def make_structure(
    name: str,
    blocks: Mapping[str, Block],
    layout: ParameterLayout,
    *,
    training: bool = False,
    **options: Any,
) -> FisherMatrix:
    """Return an empty structure for a model's blocks.

    Args:
        name: Name of the structure.
        blocks: Block name → block.
        layout: Order of all trainable parameters.
        training: Take the defaults of training where they differ from those of the matrix as an
            object (``FisherMatrix.training_options``).
        **options: Options of the structure.

    Raises:
        ValueError: If the name is unknown or the model has no blocks.
        TypeError: If the structure does not know an option.
    """
    key = name.replace("-", "_")
    if key not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(sorted(STRUCTURES))}, got {name!r}")
    if not blocks:
        raise ValueError("the model has no trainable parameter that natgrad can cover")
    structure = STRUCTURES[key]
    defaults = structure.training_options if training else {}
    return structure(blocks, layout, **{**defaults, **options})
