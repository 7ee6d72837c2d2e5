r"""The learning rate 1/α of isotropic natural gradients, measured on the first batch.

The coefficients of a step in function space are :math:`M = \hat J \hat F^{-1} \hat J^\top / N`, and
α is their mean over the output directions that the likelihood sees. With random signs z,
``E[zᵀMz] = tr M``; where ``M = αΠ`` every draw gives α exactly. A draw costs one pull-back of one
vector per sample and one preconditioned gradient, whatever the structure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.distributed import Replicas
from natgrad.distributed.replicas import WHOLE_BATCH, Place, PlacedGenerator, drawn
from natgrad.fisher import ExactFisher
from natgrad.jacobians import Jacobians
from natgrad.jacobians.collection import in_type
from natgrad.layouts import inner_product
from natgrad.likelihoods import Likelihood

#: Draws of random signs.
DRAWS = 8


class IsotropyProbe:
    """Collects random combinations of the exact Fisher's rows while a step's passes go by.

    Args:
        seed: Seed of the signs; the global random state is not used.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = PlacedGenerator()
        self._generator.manual_seed(seed)
        self.clear()

    def clear(self) -> None:
        """Forget what was collected."""
        self._gradients: list[dict[str, Tensor]] = []
        self._norms = [0.0] * DRAWS
        self._rows = 0.0
        self._count = 0.0

    def observe(
        self, capture: Capture, likelihood: Likelihood, output: Tensor, weights: Tensor,
        count: float, place: Place = WHOLE_BATCH,
    ) -> None:  # fmt: skip
        """Draw signs for the rows of one forward pass and pull them back."""
        self._generator.place = place
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            vectors = ExactFisher().vectors(likelihood, output.detach(), weights)
            roots = vectors.flatten(2).transpose(0, 1)  # (N, K, C)
            shape = (DRAWS, *roots.shape[:2])
            numbers = drawn(
                Tensor.uniform_,
                shape,
                self._generator,
                dim=1,
                dtype=roots.dtype,
                device=roots.device,
            )
            signs = torch.where(numbers < 0.5, -torch.ones_like(numbers), 1.0)
            # Π_n = S_n⁺S_n projects on what the likelihood sees.
            working = roots.float() if roots.dtype.itemsize < 4 else roots
            seen = working @ torch.linalg.pinv(working)
            norms = torch.einsum("dnk,nkj,dnj->d", signs.to(seen), seen, signs.to(seen))
            mixed = torch.einsum("dnk,nkc->dnc", signs, roots)
        rows = capture.pull_back(output, mixed.reshape(DRAWS, *output.shape))
        rows = in_type(rows, rows.layout.dtype)
        for draw in range(DRAWS):
            self._add(draw, rows)
            self._norms[draw] += float(norms[draw])
        self._rows += float(seen.diagonal(dim1=1, dim2=2).sum())
        self._count += count

    def _add(self, draw: int, rows: Jacobians) -> None:
        only = torch.zeros(rows.samples, DRAWS, device=rows.layout.device, dtype=rows.layout.dtype)
        only[:, draw] = 1.0
        found = rows.layout.to_dict(rows.rmatvec(only))
        if draw == len(self._gradients):
            self._gradients.append(found)
        else:
            previous = self._gradients[draw]
            self._gradients[draw] = {n: previous[n] + value for n, value in found.items()}

    def unite(self, replicas: Replicas, device: torch.device) -> None:
        """Make what was collected that of all processes."""
        own = {
            "gradients": self._gradients or None,
            "norms": torch.tensor(self._norms, dtype=torch.float64, device=device),
            "rows": torch.tensor(self._rows, dtype=torch.float64, device=device),
            "count": torch.tensor(self._count, dtype=torch.float64, device=device),
        }
        total = replicas.summed(own, device)
        self._gradients, self._norms = total["gradients"] or [], total["norms"].tolist()
        self._rows, self._count = float(total["rows"]), float(total["count"])

    def measure(
        self, precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> tuple[float, float] | None:
        """Return α and an estimate of the deviation from isotropy; None if nothing was seen.

        The values of different draws scatter by ``√(2/R)`` times the deviation, for R rows.
        """
        if not self._gradients or self._count == 0:
            return None
        values = []
        for gradient, norm in zip(self._gradients, self._norms, strict=True):
            natural = precondition(gradient)
            product = float(inner_product(natural, gradient))
            values.append(product / (self._count * norm))
        alpha = statistics.fmean(values)
        spread = statistics.stdev(values) / abs(alpha) if alpha else float("inf")
        return alpha, spread * (self._rows / 2.0) ** 0.5


def is_isotropic(lr: Any) -> bool:
    """Return whether a learning rate is the word that asks for 1/α; another is a ValueError."""
    if isinstance(lr, str) and lr != "isotropic":
        raise ValueError(f"lr must be a number or 'isotropic', got {lr!r}")
    return isinstance(lr, str)
