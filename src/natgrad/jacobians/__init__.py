r"""Layer Jacobians: the rows every curvature structure and every kernel is made of.

For one layer with inputs ``a`` of shape ``(N, T, G, d_in)`` and output gradients ``δ`` of shape
``(N, K, T, G, d_out)`` the Jacobian row of sample ``n`` and pulled-back vector ``k`` is

.. math:: M_{nk} = \sum_t \delta_{nkt} \, a_{nt}^\top
          \in \mathbb{R}^{G \times d_{out} \times d_{in}}

with ``T`` shared positions (pixels of a convolution, tokens of a sequence, calls of a reused
layer) and ``G`` groups. Rows are indexed by ``n * K + k``. They stay factored: nothing of size
``N·K × P`` is built except by :meth:`LayerJacobian.to_dense` and, in bounded chunks, where forming
per-sample gradients costs fewer operations than the ``T × T`` products.
"""

from natgrad.jacobians.collection import Jacobians
from natgrad.jacobians.dense import DenseJacobian
from natgrad.jacobians.embedding import EmbeddingJacobian
from natgrad.jacobians.layer import CHUNK_ELEMENTS, KroneckerSums, LayerJacobian, WeightSharing
from natgrad.jacobians.linear import LinearJacobian
from natgrad.jacobians.positions import FIRST_DRAW, Draw
from natgrad.jacobians.stacked import StackedJacobian
from natgrad.jacobians.tied import SumJacobian

__all__ = [
    "CHUNK_ELEMENTS",
    "FIRST_DRAW",
    "DenseJacobian",
    "Draw",
    "EmbeddingJacobian",
    "Jacobians",
    "KroneckerSums",
    "LayerJacobian",
    "LinearJacobian",
    "StackedJacobian",
    "SumJacobian",
    "WeightSharing",
]
