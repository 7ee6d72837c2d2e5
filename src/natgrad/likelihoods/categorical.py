"""Categorical likelihood: softmax cross-entropy, with masks, class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad.distributed.replicas import drawn
from natgrad.likelihoods.base import (
    FOREIGN,
    Likelihood,
    Reduction,
    full_precision,
    positive_ratio,
    root_floor,
)
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.binary_probabilities import hard_labels, shows_overlaps
from natgrad.likelihoods.class_probabilities import (
    ClassProbabilities,
    hold_class_probabilities,
)
from natgrad.likelihoods.elementwise import Elementwise
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.mean_and_scale import FORMS, MeanAndScale
from natgrad.linalg import constant

#: What is said of a single class.
ONE_CLASS = (
    "the output holds a single class, which is certain, so that the Fisher matrix of {name!r} is "
    "zero and that of {found!r} is taken: say what the numbers mean by likelihood='bernoulli', "
    "'gaussian' or 'poisson', or by the loss"
)

#: What is said where another likelihood is taken instead.
TAKEN = (
    "the gradient of the loss does not sum to zero over the classes, so it is no loss of {name!r} "
    "(but perhaps a contrastive, an adversarial or a residual one), and the Fisher matrix of "
    "{found!r} is taken{why}: say what the output means by likelihood=..., or train losses made of "
    "residuals by ResidualNGD"
)

#: Share of a gradient that no labels explain, from which on it is none of classes.
UNEXPLAINED = 0.5

#: Relative difference of gradients at single outputs up to which a loss is linear in these.
LINEAR = 1e-3

#: Share of outputs whose labels must be 0 or 1 for a gradient to be that of binary labels.
BINARY = 0.9


@dataclass(frozen=True, repr=False)
class Categorical(Likelihood):
    """y ~ softmax(z): nll = −log p_y, Λ = diag(p) − p pᵀ, as in ``F.cross_entropy``.

    An event is one prediction: one sample of an output (N, C), one token of (N, T, C), one pixel of
    (N, C, H, W). Targets are class indices of the output's shape without the class dimension, or
    class probabilities of the output's shape. The weight of an event with label y is
    ``(1 − s) ω_y + s · mean(ω)`` for class weights ω and label smoothing s, and 0 where y is
    ignored; :meth:`count` is the divisor of the mean-reduced cross-entropy, Σ ω_y over the events
    that are not ignored (the number of events for class probabilities).

    Outputs may also be log-probabilities, as ``F.nll_loss`` and ``F.kl_div`` take them: softmax
    leaves them as they are, so Λ is that of the logits they came from. Where an optimizer sees in
    the gradient that they are probabilities, it takes
    :class:`natgrad.likelihoods.ClassProbabilities`.

    Args:
        ignore_index: Label of the events to leave out, default -100.
        class_weights: C non-negative numbers, or None (default) for ones; kept as a tuple.
        label_smoothing: s in [0, 1], default 0.
        class_dim: Dimension of the output that holds the C classes. None (default) means 1 for
            outputs of rank 2, the last for rank 3 (sequences), and 1 for rank 4 and more (images);
            ``nn.CrossEntropyLoss()`` is ``Categorical(class_dim=1)``, whatever the rank.
        reduction: How the user's loss reduces over events, "mean" (default) or "sum".
        divisor: What :meth:`count` counts: "events" (default), "samples" or "entries" of the
            output, as ``nn.KLDivLoss`` does with reduction "batchmean" and "mean".
        log_target: Whether targets are the logarithms of class probabilities, default False.

    Raises:
        ValueError: If an option is out of range.

    Source: Martens, New insights and perspectives on the natural gradient method (2020), §9; the
    square root Λ = S Sᵀ with S = diag(√p) − p √pᵀ.
    """

    shows_scale: ClassVar[bool] = True

    ignore_index: int = -100
    class_weights: Sequence[float] | Tensor | None = None
    label_smoothing: float = 0.0
    class_dim: int | None = None
    reduction: Reduction = "mean"
    divisor: Literal["events", "samples", "entries"] = "events"
    log_target: bool = False

    def __post_init__(self) -> None:
        self._check_reduction()
        if self.divisor not in ("events", "samples", "entries"):
            raise ValueError(
                f"divisor must be 'events', 'samples' or 'entries' but is {self.divisor!r}."
            )
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1] but is {self.label_smoothing}.")
        if self.class_dim == 0:
            raise ValueError("class_dim must not be 0, the dimension of the samples.")
        if self.class_weights is not None:
            weights = torch.as_tensor(self.class_weights, dtype=torch.float64, device="cpu")
            if weights.dim() != 1 or not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError("class_weights must be a list of finite non-negative numbers.")
            object.__setattr__(self, "class_weights", tuple(weights.tolist()))

    # -- what the likelihood defines -------------------------------------------------------------

    @full_precision
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return −log p_y (its weighted mean over the smoothed labels), of the target's shape.

        Events of weight 0, ignored ones among them, get 0.
        """
        log_p = self.split_events(output).log_softmax(-1)
        if self.label_smoothing == 0 and not target.is_floating_point():
            labels, _ = self._labels(output, target)
            values = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        else:
            mixture = self._mixture(output, target)
            mass = mixture.sum(-1)
            values = -(mixture * log_p).sum(-1) / torch.where(mass > 0, mass, 1)
        values = torch.where(self.event_weights(output, target) > 0, values, 0)
        return values.reshape(self._target_shape(output))

    @full_precision
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``w p − q`` with the weighted, smoothed labels q; see the base class."""
        mixture = self._mixture(output, target)
        p = self._probabilities(output)
        weights = mixture.sum(-1, keepdim=True)
        if target.is_floating_point() or self.label_smoothing > 0:
            rest = weights - mixture
        else:
            rest = weights * (mixture == 0)
        return self.merge_events(p * rest - mixture * _complements(p), output)

    @full_precision
    def output_hessian(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return ``w (diag(p) − p pᵀ)``, (N, E, C, C); rows sum to 0 also for saturated p."""
        p = self._probabilities(output)
        hessian = -p.unsqueeze(-1) * p.unsqueeze(-2)
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        diagonal.zero_()
        diagonal.copy_(-hessian.sum(-1))
        if target is None:
            return hessian
        return self.event_weights(output, target)[..., None, None] * hessian

    @full_precision
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return S with column c equal to √(w p_c) (e_c − p), (N, E, C, C).

        Probabilities below the dtype's eps² are raised to it under the square root, so that S stays
        invertible on vectors that sum to 0.
        """
        p = self._probabilities(output)
        columns = (-p).repeat(p.shape[-1], 1, 1, 1)  # (C, N, E, C), each one in one piece.
        columns.diagonal(dim1=0, dim2=3).copy_(_complements(p))
        columns.mul_(self._column_scale(p, output, target).permute(2, 0, 1).unsqueeze(-1))
        return columns.permute(1, 2, 3, 0)

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw class indices of the output's shape without the class dimension; see the base."""
        p = self._probabilities(output.detach())
        return _draw(p, generator).reshape(self._target_shape(output))

    @full_precision
    def event_weights(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the event weights, (N, E): 0 where ignored; all 1 without a target (default)."""
        if target is None:
            return super().event_weights(output)
        if target.is_floating_point():
            return self._mixture(output, target).sum(-1)
        labels, kept = self._labels(output, target)
        return self._label_weights(output, labels) * kept

    @full_precision
    def count(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return what ``F.cross_entropy(reduction="mean")`` divides by, a scalar tensor."""
        if self.divisor != "events":
            self._check_class_dim(output)
            return output.new_full((), len(output) if self.divisor == "samples" else output.numel())
        if target is None or target.is_floating_point():
            return super().event_weights(output).sum()
        labels, kept = self._labels(output, target)
        omega = self._omega(output)
        return (kept if omega is None else omega[labels] * kept).sum().to(output.dtype)

    # -- faster or safer than the base class -------------------------------------------------------

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return ``r_c / √(w p_c)``, (N, E·C), which solves S u = r as Σ r = 0; see the base.

        At log-probabilities r need not sum to 0: of it counts what they let through, r − p Σ r.
        """
        self._check_cotangent(output, cotangent)
        p = self._probabilities(output)
        scale = self._column_scale(p, output, target)
        events = self._at_logits(output, p, self.split_events(cotangent.to(output.dtype)))
        return torch.where(scale > 0, events / scale, 0).flatten(1)

    @full_precision
    def passing(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return ``r − p Σ r`` at log-probabilities, else r; see the base class."""
        p = self._probabilities(output)
        events = self._at_logits(output, p, self.split_events(cotangent.to(output.dtype)))
        return self.merge_events(events, output)

    @full_precision
    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return √w (p − e_ŷ) with ŷ ~ p, ``(samples, *output.shape)``; see the base class."""
        p = self._probabilities(output.detach()).expand(samples, -1, -1, -1)
        labels = _draw(p, generator)
        vectors = p.scatter(-1, labels.unsqueeze(-1), -_complements_at(p, labels).unsqueeze(-1))
        weights = self.event_weights(output, target).unsqueeze(-1) / samples
        return self.merge_events(vectors * weights.sqrt(), output)

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read labels, ignored events and the loss scale off the cotangent; see the base class.

        An event whose cotangent is exactly zero, though its probabilities are not saturated, was
        ignored. The label is the most negative entry. With label smoothing, or if the cotangent is
        not that of hard labels, the scale follows ``reduction``.
        """
        self._check_cotangent(output, cotangent)
        self._check_class_dim(output, cotangent)
        if target is not None:
            return super().infer_event_weights(output, self.passing(output, cotangent), target)
        if self.class_weights is not None and self.label_smoothing > 0:
            raise ValueError(
                "Class weights together with label smoothing cannot be read off the gradient of "
                "the loss: call loss = optimizer.loss(criterion, output, target), which tells the "
                "target."
            )
        smallest = min(torch.finfo(cotangent.dtype).tiny, 1.2e-7)
        p = self._probabilities(output)
        residual = self._at_logits(output, p, self.split_events(cotangent.to(output.dtype)))
        active = (residual != 0).any(-1)
        labels = torch.where(active, residual.argmin(-1), p.argmax(-1))
        weights = self._label_weights(output, labels)
        omega = self._omega(output)
        count_weights = torch.ones_like(weights) if omega is None else omega[labels]
        other, at = _complements_at(p, labels), labels.unsqueeze(-1)

        usual = self._usual_scale(self._seen_count(output, count_weights * active))
        at_label = -residual.gather(-1, at).squeeze(-1)
        scale = positive_ratio(at_label.sum(), (weights * other * active).sum(), usual)
        error = (scale * weights * active).unsqueeze(-1) * p
        error.scatter_(-1, at, -(scale * weights * other * active).unsqueeze(-1))
        error = (error - residual).abs().sum()
        hard = (error <= 0.05 * residual.abs().sum()) & (self.label_smoothing == 0)
        expected = torch.where(hard, scale, usual).nan_to_num(posinf=1.0)
        kept = active | (expected * other <= smallest)
        usual = self._usual_scale(self._seen_count(output, count_weights * kept))
        return weights * kept, torch.where(hard & active.any(), scale, usual)

    @full_precision
    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return ``c² Σ w min(Σ (p − q)²/p, 2 KL(q‖p))`` with the labels q; see the base class."""
        output = output.double()
        p = self._probabilities(output)
        events = self._at_logits(output, p, self.split_events(cotangent.double()))
        share = (scale * weights).unsqueeze(-1)
        residual = torch.where(share > 0, events / share, 0.0)
        labels = (p - residual).clamp(0.0, 1.0)
        log_p = self.split_events(output).log_softmax(-1)
        deviance = 2 * (torch.xlogy(labels, labels) - labels * log_p).sum(-1)
        pearson = (residual.square() / p.clamp_min(root_floor(p.dtype))).sum(-1)
        return scale.double().square() * (weights * torch.minimum(pearson, deviance)).sum()

    @property
    def decision(self) -> Any:
        """The dimension of the classes."""
        return self.class_dim

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        if isinstance(decision, str):
            return Gaussian(reduction=self.reduction).decided(decision)
        if isinstance(decision, (tuple, list)):
            if decision[0] == "logits":
                return Bernoulli(reduction=self.reduction).decided(decision)
            if decision[0] in FORMS:
                return MeanAndScale(keys=None, reduction=self.reduction).decided(decision)
            return ClassProbabilities(self).decided(decision)
        return self if decision is None else replace(self, class_dim=decision)

    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Take the classes along the dimension that the gradient shows; see the base class.

        A criterion is often applied to ``output.flatten(0, 1)``. Outputs may turn out to be
        probabilities of which the loss takes the logarithm. Where the gradient is none of classes,
        or there is one class only, the plain likelihood makes room for that of binary labels, if it
        shows such, and else for squared errors, which measure how far outputs move. Say so, and if
        class weights meet class probabilities, whose weights only the target tells. Single numbers
        ``(N,)`` are one class each, unless the gradient is that of one sample's classes.
        """
        numbers = output.dim() == 1 and self._is_plain and bool(cotangent.any())
        if numbers and not self._is_of_one_sample(output, cotangent):
            output, cotangent = output.unsqueeze(1), cotangent.unsqueeze(1)
        return self._seen_with(output, cotangent, target)

    @full_precision
    def _seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any
    ) -> tuple[Likelihood, list[str]]:
        shown = self._misfit(output, cotangent)
        if shown is not None:
            return replace(self, class_dim=shown[1]).seen_with(output, cotangent, target)
        if output.shape[self._class_dim(output)] == 1:
            if not bool(cotangent.any()):
                return self, []
            found = self._instead(output, cotangent)
            return found, [ONE_CLASS.format(name=self, found=found)]
        if cotangent.dtype == torch.float16:  # What vanishes in it is missing in the sum.
            return self, []
        said = []
        events = self.split_events(cotangent.to(output.dtype))
        eps, size = torch.finfo(cotangent.dtype).eps, events.abs().sum()
        sums = events.sum(-1).abs().sum()
        if hold_class_probabilities(self.split_events(output)):
            # Where the loss takes another softmax the sum is rounding. Where it takes logarithms it
            # is so small only while all classes are alike.
            p = self.split_events(output)
            alike = ((p * p.shape[-1] - 1).abs() < 1e-3).all() & (size > 0)
            if bool((sums > max(1e-4, 2 * eps) * size) | alike):
                return ClassProbabilities(self), []
        foreign = sums > max(0.01, 2 * eps) * size
        if bool(foreign & ~_is_normalized(output, [self._class_dim(output)])):
            # Channel by channel: beside all others in a sample, a class of a softmax is a function
            # of its output and its label, too.
            overlaps = output.dim() > 3 and shows_overlaps(output, cotangent)
            unexplained = self._unexplained(output, events) > UNEXPLAINED
            if self._is_plain and (overlaps or unexplained):
                found = self._instead(output, cotangent)
                moves = ", which measures how far outputs move"
                why = moves if isinstance(found, Gaussian) else ""
                return found, [TAKEN.format(name=self, found=found, why=why)]
            fault = "does not sum to zero over the classes"
            said.append(FOREIGN.format(fault=fault, name=self))
        elif self.class_weights is not None and self.label_smoothing == 0 and target is None:
            weights, scale = self.infer_event_weights(output, cotangent)
            labels = torch.where(weights > 0, events.argmin(-1), self.ignore_index)
            hard = scale * self.gradient(output, labels.reshape(self._target_shape(output)))
            rest = self._at_logits(output, self._probabilities(output), events)
            rest = rest - self.split_events(hard)
            if bool(rest.abs().sum() > 0.05 * events.abs().sum()):
                said.append(
                    "class weights of targets that are class probabilities cannot be read off the "
                    "gradient of the loss: call loss = optimizer.loss(criterion, output, target), "
                    "which tells the target"
                )
        return self, said

    @property
    def _is_plain(self) -> bool:
        """Whether it is what the name stands for, so that no one has said more."""
        return replace(self, class_dim=None, reduction="mean") == Categorical()

    def _is_of_one_sample(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether a gradient at ``(C,)`` is ``c(p − y)`` for the most part, y one label."""
        output, cotangent = output.double(), cotangent.double()
        rest = torch.ones_like(output, dtype=torch.bool)
        rest[cotangent.abs().argmax()] = False
        p, events = output.softmax(0)[rest], cotangent[rest]
        scale = (p * events).sum() / p.square().sum()
        unexplained = (events - scale * p).square().sum() > UNEXPLAINED * events.square().sum()
        return bool(_sums_to_zero(cotangent, [0]) & ~unexplained)

    def _unexplained(self, output: Tensor, events: Tensor) -> float:
        """Return the share of a gradient's square that is not of the likeliest labels."""
        p = self._probabilities(output)
        hard = p - torch.zeros_like(p).scatter_(-1, events.argmin(-1, keepdim=True), 1)
        scale = (events * hard).sum() / hard.square().sum().clamp_min(torch.finfo(p.dtype).tiny)
        return float((events - scale * hard).square().sum() / events.square().sum())

    def _instead(self, output: Tensor, cotangent: Tensor) -> Likelihood:
        """Return the likelihood that a gradient which is none of classes is taken to be of.

        A loss that is linear in the outputs, as the mean of log-densities or of scores, looks like
        that of binary labels where their probabilities are 0 or 1: these have to differ.
        """
        halves = MeanAndScale.shown_by(output, cotangent, self.reduction)
        if halves is not None:
            return halves
        if shows_overlaps(output, cotangent):  # Their sizes are those of means over outputs.
            return Bernoulli("mean", self.reduction)
        share, sure, _ = hard_labels(output, cotangent, logits=True)
        sure = sure & (cotangent.max() - cotangent.min() > LINEAR * cotangent.abs().max())
        found: Elementwise = Gaussian(reduction=self.reduction)
        if bool(sure & (share > BINARY)):
            found = Bernoulli(reduction=self.reduction)
        decided, _ = found.seen_with(output, cotangent)
        # Losses of images are means over pixels. Of embeddings the size of a gradient says little.
        if output.dim() > 2 or not isinstance(decided, Gaussian):
            return decided
        return decided if decided.is_shown(output, cotangent) else found.decided("sum")

    # -- layout ------------------------------------------------------------------------------------

    def split_events(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the output's shape as (N, E, C), classes last."""
        moved = tensor.movedim(self._class_dim(tensor), -1)
        return moved.reshape(len(moved), -1, moved.shape[-1])

    def merge_events(self, events: Tensor, output: Tensor) -> Tensor:
        """Undo :meth:`split_events`: ``(..., N, E, C)`` becomes ``(..., *output.shape)``."""
        lead, dim = events.shape[:-3], self._class_dim(output)
        shape = self._target_shape(output)
        return events.reshape(*lead, *shape, events.shape[-1]).movedim(-1, len(lead) + dim)

    def _class_dim(self, output: Tensor) -> int:
        if self.class_dim is None:
            return 2 if output.dim() == 3 else 1
        dim = self.class_dim + (output.dim() if self.class_dim < 0 else 0)
        if not 0 < dim < output.dim():
            raise ValueError(
                f"class_dim={self.class_dim} is not a class dimension of an output of shape "
                f"{tuple(output.shape)}."
            )
        return dim

    def _target_shape(self, output: Tensor) -> tuple[int, ...]:
        dim = self._class_dim(output)
        return (*output.shape[:dim], *output.shape[dim + 1 :])

    # -- helpers -----------------------------------------------------------------------------------

    def _omega(self, output: Tensor) -> Tensor | None:
        """Return the class weights as a tensor, (C,), or None if there are none."""
        if self.class_weights is None:
            return None
        classes = output.shape[self._class_dim(output)]
        if len(self.class_weights) != classes:
            raise ValueError(
                f"There are {len(self.class_weights)} class_weights but {classes} classes along "
                f"dimension {self._class_dim(output)} of the output."
            )
        return constant(self.class_weights, output)

    def _label_weights(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return (1 − s) ω_y + s mean(ω) for labels of any shape."""
        omega = self._omega(output)
        if omega is None:
            return torch.ones_like(labels, dtype=output.dtype)
        return torch.lerp(omega, omega.mean(), self.label_smoothing)[labels]

    def _labels(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels with 0 for ignored ones, and a mask of those kept, both (N, E)."""
        shape = self._target_shape(output)
        if target.dtype == torch.bool or target.is_complex():
            raise TypeError(f"Categorical needs integer class labels, not {target.dtype}.")
        if tuple(target.shape) != shape:
            raise ValueError(
                f"Categorical needs class labels of shape {shape} for an output of shape "
                f"{tuple(output.shape)} with classes along dimension {self._class_dim(output)}, "
                f"but got {tuple(target.shape)}."
            )
        labels = target.reshape(len(output), -1).long()
        kept = labels != self.ignore_index
        labels = torch.where(kept, labels, 0)
        classes = output.shape[self._class_dim(output)]
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(
                f"Class labels must be in 0..{classes - 1} or ignore_index={self.ignore_index}, "
                f"but range from {int(labels.min())} to {int(labels.max())}."
            )
        return labels, kept

    def _mixture(self, output: Tensor, target: Tensor) -> Tensor:
        """Return q with ``w · nll = −Σ_c q_c log p_c``, (N, E, C)."""
        classes = output.shape[self._class_dim(output)]
        if target.is_floating_point():
            if target.shape != output.shape:
                raise ValueError(
                    "Categorical needs class probabilities of the output's shape "
                    f"{tuple(output.shape)} but got {tuple(target.shape)}."
                )
            given = self.split_events(target.to(output.dtype))
            mixture, kept = given.exp() if self.log_target else given, None
            if mixture.device.type == "cpu" and bool((mixture < 0).any()):
                raise ValueError(
                    "Categorical needs class probabilities, which are not negative: targets that "
                    "are real numbers take likelihood='gaussian'."
                )
        else:
            labels, kept = self._labels(output, target)
            mixture = output.new_zeros(*labels.shape, classes)
            mixture.scatter_(-1, labels.unsqueeze(-1), 1)
        if self.label_smoothing > 0:
            mixture = (1 - self.label_smoothing) * mixture + self.label_smoothing / classes
        omega = self._omega(output)
        mixture = mixture if omega is None else mixture * omega
        return mixture if kept is None else mixture * kept.unsqueeze(-1)

    def _probabilities(self, output: Tensor) -> Tensor:
        """Return p, (N, E, C)."""
        return self.split_events(output).softmax(-1)

    def _column_scale(self, p: Tensor, output: Tensor, target: Tensor | None) -> Tensor:
        """Return √(w p_c), (N, E, C), with p kept above the floor."""
        p = p.clamp_min(root_floor(p.dtype))
        if target is not None:
            p = p * self.event_weights(output, target).unsqueeze(-1)
        return p.sqrt()

    def _seen_count(self, output: Tensor, weights: Tensor) -> Tensor:
        """Return what the loss divides by, by the weights of the events that are not ignored."""
        return weights.sum() if self.divisor == "events" else self.count(output)

    def _at_logits(self, output: Tensor, p: Tensor, events: Tensor) -> Tensor:
        """Return the gradient at the logits from that at their log-probabilities, (N, E, C)."""
        normalized = _is_normalized(output, [self._class_dim(output)])
        total = torch.where(normalized, events.sum(-1, keepdim=True), 0)
        return torch.addcmul(events, p, total, value=-1)

    def _check_class_dim(self, output: Tensor, cotangent: Tensor | None = None) -> None:
        """Raise if the classes lie along another dimension than they are taken to.

        Softmax gradients sum to 0 over the classes, and log-probabilities are normalised over
        them. The check synchronises with the device, so it is made only where the class dimension
        is in doubt, for outputs of rank 3 and more.
        """
        shown = self._misfit(output, cotangent)
        if shown is not None:
            what, dim = shown
            raise ValueError(
                f"The {what} over dimension {dim} of the output of shape {tuple(output.shape)}, "
                f"not over dimension {self._class_dim(output)}: pass "
                f"likelihood=Categorical(class_dim={dim})."
            )

    def _misfit(self, output: Tensor, cotangent: Tensor | None) -> tuple[str, int] | None:
        """Return what shows the classes along another dimension, and which; None if nothing."""
        if output.dim() < 3:
            return None
        dims = range(1, output.dim())
        signs = {"output holds log-probabilities": partial(_is_normalized, output, dims)}
        if cotangent is not None:
            sums = partial(_sums_to_zero, cotangent.to(output.dtype), dims)
            signs = {"loss gradient sums to zero": sums, **signs}
        for what, shown in signs.items():
            fitting = [dim for dim, fits in zip(dims, shown().tolist(), strict=True) if fits]
            if self._class_dim(output) in fitting:
                return None
            if fitting:
                return what, fitting[0]
        return None


def _is_normalized(output: Tensor, dims: Iterable[int]) -> Tensor:
    """Return whether the output is logarithms of probabilities along each of some dimensions."""
    exponentials = output.exp()
    return torch.stack([(exponentials.sum(dim) - 1).abs().mean() < 0.01 for dim in dims])


def _sums_to_zero(cotangent: Tensor, dims: Iterable[int]) -> Tensor:
    """Return whether a gradient sums to zero along each of some dimensions."""
    limit = 0.02 * cotangent.abs().sum()
    return torch.stack([cotangent.sum(dim).abs().sum() <= limit for dim in dims])


def _complements(p: Tensor) -> Tensor:
    """Return 1 − p to full relative accuracy, ``(N, E, C)``."""
    largest = p.argmax(-1)
    others = _complements_at(p, largest).unsqueeze(-1)
    return (1 - p).scatter_(-1, largest.unsqueeze(-1), others)


def _complements_at(p: Tensor, labels: Tensor) -> Tensor:
    """Return 1 − p of some labels to full relative accuracy, ``(..., N, E)``."""
    return p.scatter(-1, labels.unsqueeze(-1), 0).sum(-1)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index from probabilities ``(..., N, E, C)``, one number in [0, 1) for each.

    Of no probability are indices at which the distribution function does not rise.
    """
    *shape, classes = p.shape
    distribution = p.cumsum(-1)
    number = drawn(
        Tensor.uniform_, shape, generator, dim=len(shape) - 2, dtype=p.dtype, device=p.device
    )
    reached = distribution[..., -1:] * (1 - number).unsqueeze(-1)
    # Where probabilities are not finite there is none that is reached.
    return torch.searchsorted(distribution, reached).squeeze(-1).clamp_max(classes - 1)
