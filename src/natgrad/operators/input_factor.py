"""Kronecker products with the identity, ``I ⊗ A`` on the matrices of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.layouts import BlockLayout
from natgrad.operators.kronecker import KroneckerOperator
from natgrad.operators.operator import Operator


@dataclass(frozen=True, eq=False)
class InputFactorOperator(KroneckerOperator):
    """``I ⊗ A``: damping it is damping A, ``(I ⊗ A + λI)⁻¹ = I ⊗ (A + λI)⁻¹``, by Cholesky."""

    @classmethod
    def of(cls, layout: BlockLayout, inputs: Tensor) -> Self:
        """Return ``I ⊗ A``.

        Args:
            layout: Layout of the layer's block.
            inputs: A, ``(G, d, d)``, right in its lower triangles, or its diagonal ``(G, d)``.
        """
        return cls(layout, inputs, inputs.new_ones(layout.groups, layout.d_out))

    @classmethod
    def inverses(cls, operators: Sequence[Self], dampings: Sequence[float]) -> list[Operator]:
        """Return the inverses of several; factors of one shape are factorised together."""
        if min(dampings) == 0:
            return super().inverses(operators, dampings)
        shifted = [
            one.inputs + damping
            if one.inputs.dim() == 2
            else linalg.add_to_diagonal(one.inputs, damping)
            for one, damping in zip(operators, dampings, strict=True)
        ]
        dense = iter(linalg.map_stacked(linalg.inverse, [x for x in shifted if x.dim() == 3]))
        inverted = [next(dense) if x.dim() == 3 else x.reciprocal() for x in shifted]
        pairs = zip(operators, inverted, strict=True)
        return [replace(one, inputs=inverse, lower=False) for one, inverse in pairs]
