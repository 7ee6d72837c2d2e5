"""Several outputs of one model, each with a likelihood of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.model_output import Selection
from natgrad.likelihoods.base import Likelihood


class Heads(Likelihood):
    """Independent likelihoods of several outputs: the Fisher matrix is the sum over the heads.

    ``F = Σ_h (1/count_h) Σ_n J_hᵀ Λ_h J_h``: every head counts its own samples or tokens, as in a
    sum of mean-reduced losses. A head without a gradient in a batch adds nothing. Factors of the
    losses in the sum (``0.5 * value_loss``) are no part of F, as those of a single loss are not:
    where they matter, give them by the likelihood (``Gaussian(variance)``).

    Args:
        heads: Key in the model's output → likelihood, a name or a torch loss. A key is that of a
            mapping, the name of an attribute, or the index in a tuple or list.

    Raises:
        ValueError: If there are no heads, or one has heads itself.

    Example:
        >>> optimizer = natgrad.KFAC(model, {"logits": "categorical", "value": "gaussian"})
    """

    def __init__(self, heads: Mapping[Any, Any]) -> None:
        if not heads:
            raise ValueError("Heads need at least one output with its likelihood.")
        from natgrad.likelihoods.conversion import as_likelihood  # It knows Heads, too.

        self.heads: dict[Any, Likelihood] = {key: as_likelihood(one) for key, one in heads.items()}
        if any(isinstance(one, Heads) for one in self.heads.values()):
            raise ValueError(
                "A head has one likelihood, not a mapping: pass output=lambda out: {...} to bring "
                "nested outputs into one mapping."
            )

    def __repr__(self) -> str:
        return f"Heads({self.heads!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heads) and self.heads == other.heads

    def __hash__(self) -> int:
        return hash(tuple(self.heads.items()))

    @property
    def decision(self) -> Any:
        """The decisions of the heads, in their order."""
        return [one.decision for one in self.heads.values()]

    @property
    def undecided(self) -> bool:
        """Whether any head is."""
        return any(one.undecided for one in self.heads.values())

    def decided(self, decision: Any) -> Likelihood:
        """Return the heads with decisions that were made before."""
        if decision is None:
            return self
        pairs = zip(self.heads.items(), decision, strict=True)
        return Heads({key: one.decided(made) for (key, one), made in pairs})

    def selection(self, output: Callable[[Any], Any] | None) -> Selection:
        """Return what picks the heads out of a model's output; see the base."""
        return Selection(tuple(self.heads), output)

    def of_shapes(self, shapes: Mapping[Any, torch.Size] | None) -> Likelihood:
        """Return the likelihood of the heads' outputs, flattened and laid side by side.

        Args:
            shapes: Key → shape ``(N, ...)``, in the order of the columns.
        """
        if shapes is None:
            return self
        return JoinedHeads([self.heads[key] for key in shapes], list(shapes.values()), list(shapes))

    def _unjoined(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "Likelihoods of several heads work with optimizers, fisher_matrix and Laplace only: "
            "for anything else pick one head by output=... and give its likelihood."
        )

    nll: Any = _unjoined
    gradient: Any = _unjoined
    output_hessian_root: Any = _unjoined
    sample: Any = _unjoined
    split_events: Any = _unjoined


class JoinedHeads(Likelihood):
    """The likelihood of heads laid side by side, ``(N, Σ C_h)``; a sample is one event.

    Its weights of entries hold what differs between the heads' own counts, so that :meth:`count`
    is N.
    Targets are given as a mapping or a tuple, one per head; None or a missing one where unknown.
    """

    def __init__(
        self, parts: Sequence[Likelihood], shapes: Sequence[torch.Size], keys: Sequence[Any]
    ) -> None:
        self.parts: Sequence[Likelihood] = parts
        self.shapes: Sequence[torch.Size] = shapes
        self.keys: Sequence[Any] = keys
        self.sizes: list[int] = [shape[1:].numel() for shape in shapes]

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Return the heads' outputs, or vectors like them with leading dimensions."""
        lead = flat.shape[:-2]
        split = flat.split(self.sizes, -1)
        return [
            one.reshape(*lead, -1, *shape[1:])
            for one, shape in zip(split, self.shapes, strict=True)
        ]

    def targets(self, target: Any) -> list[Any]:
        """Return the target of every head."""
        if target is None:
            return [None] * len(self.parts)
        if isinstance(target, Mapping):
            return [target.get(key) for key in self.keys]
        if isinstance(target, (tuple, list)) and len(target) == len(self.parts):
            return list(target)
        raise ValueError(
            f"Targets of heads are a mapping with keys {self.keys} or a tuple of "
            f"{len(self.parts)}, not a {type(target).__name__}."
        )

    def _each(self, output: Tensor, target: Any) -> list[tuple[Likelihood, Tensor, Any]]:
        return list(zip(self.parts, self.pieces(output), self.targets(target), strict=True))

    def _flat(self, vectors: Sequence[Tensor]) -> Tensor:
        """Lay vectors ``(K, N, ...)`` of every head side by side, ``(K, N, Σ C)``."""
        return torch.cat([_flattened(one) for one in vectors], -1)

    # -- counts and weights ------------------------------------------------------------------------

    def count(self, output: Tensor, target: Any = None) -> Tensor:
        """Return N; 0 if every event of every head is ignored."""
        counts = [part.count(z, y) for part, z, y in self._each(output, target)]
        return self._samples(output, torch.stack([one.double() for one in counts]).sum())

    def seen_count(self, output: Tensor, weights: Tensor, target: Any = None) -> Tensor:
        """Return N; see :meth:`count`."""
        return self._samples(output, weights.abs().sum())

    def _samples(self, output: Tensor, events: Tensor) -> Tensor:
        return torch.where(events > 0, float(len(output)), 0.0)

    def event_weights(self, output: Tensor, target: Any = None) -> Tensor:
        """Return the weights of entries, ``(N, 1, Σ C)``: the heads' own, times N/count."""
        shares = [
            self._share(part, z, part.event_weights(z, y), part.count(z, y))
            for part, z, y in self._each(output, target)
        ]
        return torch.cat(shares, 1).unsqueeze(1)

    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights read off every head's gradient, and c/N; see the base class.

        c is 1 for losses that are means, and the mean of what those heads show whose gradients
        show any: a sum over samples, or what a mean was multiplied by.
        """
        weights, factors, shown = [], [], []
        for (part, z, y), c in zip(self._each(output, target), self.pieces(cotangent), strict=True):
            own, scale = part.infer_event_weights(z, c, y)
            count = part.seen_count(z, own, y)
            weights.append(self._share(part, z, own, count))
            factors.append(scale.double() * count)
            unusual = (factors[-1] - 1.0).abs() >= 1e-4
            shown.append((unusual | part.shows_scale) & c.any() & (count > 0))
        joined = torch.cat(weights, 1).unsqueeze(1)
        factor, tells = torch.stack(factors), torch.stack(shown)
        mean = torch.where(tells, factor, 0.0).sum() / tells.sum()
        scale = torch.where(tells.any(), mean, 1.0) / max(1, len(output))
        return joined, scale.to(joined.dtype)

    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Return the heads as their own gradients show them; see the base."""
        found, said = {}, []
        each = zip(self.keys, self._each(output, target), self.pieces(cotangent), strict=True)
        for key, (part, z, y), c in each:
            found[key], own = part.seen_with(z, c, y)
            said += [f"head {key!r}: {sentence}" for sentence in own]
        return Heads(found), said

    def _share(self, part: Likelihood, z: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        factor = torch.where(count > 0, len(z) / count, 0)
        return (part.spread(weights, z) * factor).reshape(len(z), -1)

    def root_weights(self, weights: Tensor, vectors: int) -> Tensor:
        """Return the weights of the root vectors, head by head."""
        pieces = zip(self.parts, self.pieces(weights.squeeze(1)), strict=True)
        return torch.cat([part.split_events(own).flatten(1) for part, own in pieces], 1)

    # -- the distribution --------------------------------------------------------------------------

    def nll(self, output: Tensor, target: Any) -> Tensor:
        """Return the sum over heads of each sample's share in the mean loss, times N, ``(N,)``."""
        total = output.new_zeros(len(output))
        for part, z, y in self._each(output, target):
            weights = part.event_weights(z, y)
            values = part.nll(z, y).reshape(len(z), -1)
            if weights.dim() == 2:  # Weights of entries are part of nll already.
                values = values * weights
            total = total + values.sum(1) * len(z) / part.count(z, y)
        return total

    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Return the sum of the heads' mean losses; heads without a target have none."""
        each = [one for one in self._each(output, target) if one[2] is not None]
        return torch.stack([part.loss(z, y) for part, z, y in each]).sum()

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        """Return ``N ∂loss/∂z``."""
        return self._flat(
            [
                part.gradient(z, y).unsqueeze(0) * len(z) / part.count(z, y)
                for part, z, y in self._each(output, target)
            ]
        )[0]

    def output_hessian_root(self, output: Tensor, target: Any = None) -> Tensor:
        """Return the root of the joint output Hessian, ``(N, 1, Σ C, K)``."""
        return self.root_vectors(output, target).permute(1, 2, 0).unsqueeze(1)

    def root_vectors(self, output: Tensor, target: Any = None) -> Tensor:
        """Return the root vectors of every head, zero at the others."""
        columns = []
        for index, (part, z, y) in enumerate(self._each(output, target)):
            own = _flattened(part.root_vectors(z, y))
            if y is not None:
                own = own * (len(z) / part.count(z, y)).sqrt()
            before, after = sum(self.sizes[:index]), sum(self.sizes[index + 1 :])
            columns.append(torch.nn.functional.pad(own, (before, after)))
        return torch.cat(columns)

    def root_inverse_apply(self, output: Tensor, cotangent: Tensor, target: Any = None) -> Tensor:
        """Return coordinates in the root vectors, ``(N, K)``."""
        found = []
        for (part, z, y), c in zip(self._each(output, target), self.pieces(cotangent), strict=True):
            own = part.root_inverse_apply(z, c, y)
            found.append(own if y is None else own / (len(z) / part.count(z, y)).sqrt())
        return torch.cat(found, 1)

    def passing(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return what every head lets through."""
        pieces = zip(self.parts, self.pieces(output), self.pieces(cotangent), strict=True)
        return self._flat([part.passing(z, c).unsqueeze(0) for part, z, c in pieces])[0]

    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the sum of the heads' own bounds, of each the share of its count; see the base."""
        total = torch.zeros((), dtype=torch.float64, device=output.device)
        for part, z, c in zip(self.parts, self.pieces(output), self.pieces(cotangent), strict=True):
            own, factor = part.infer_event_weights(z, c)
            found = part.largest_decrement(z, c, own, factor)
            total = total + found * part.seen_count(z, own) / max(1, len(z))
        return total

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Any:
        """Draw a target for every head, independently."""
        return tuple(part.sample(z, generator) for part, z, _ in self._each(output, None))

    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Any = None,
    ) -> Tensor:
        """Return pseudo-gradients of labels drawn for every head, side by side."""
        return self._flat(
            [
                part.sampled_vectors(z, generator, samples, y)
                * (1.0 if y is None else (len(z) / part.count(z, y)).sqrt())
                for part, z, y in self._each(output, target)
            ]
        )


def _flattened(vectors: Tensor) -> Tensor:
    """Return vectors like outputs, ``(K, N, ...)`` or ``(K, N)``, as ``(K, N, C)``."""
    return vectors.flatten(2) if vectors.dim() > 2 else vectors.unsqueeze(-1)
