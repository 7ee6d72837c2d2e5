"""From a name or a torch loss to a likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn import functional

from natgrad.likelihoods.base import Likelihood, Reduction
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.binary_probabilities import BinaryProbabilities
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.elementwise import ReduceOutputs
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.heads import Heads
from natgrad.likelihoods.huber import Huber
from natgrad.likelihoods.mean_and_scale import MeanAndScale
from natgrad.likelihoods.poisson import Poisson
from natgrad.likelihoods.poisson_rates import PoissonRates

#: What :func:`as_likelihood` takes.
LikelihoodLike: TypeAlias = str | Likelihood | nn.Module | Callable[..., Any] | Mapping[Any, Any]

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}


#: Reduction of KLDivLoss → what it divides by.
DIVISORS: dict[str, Literal["events", "samples", "entries"]] = {
    "mean": "entries",
    "batchmean": "samples",
    "sum": "events",
}

#: Functional losses → the modules they stand for.
FUNCTIONAL_LOSSES: dict[Callable[..., Any], type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.mse_loss: nn.MSELoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
}


def as_likelihood(specification: LikelihoodLike) -> Likelihood:
    """Return a likelihood from its name, a torch loss, a mapping of heads, or itself.

    Args:
        specification: "categorical", "gaussian", "bernoulli" or "poisson" with their defaults; a
            :class:`Likelihood`, returned as it is; a loss that :func:`from_loss` takes, or its
            function, e.g. ``torch.nn.functional.mse_loss``; or a mapping from the keys of a model's
            outputs to such, for :class:`Heads`.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is something else.
    """
    if isinstance(specification, Likelihood):
        return specification
    if isinstance(specification, nn.Module):
        return from_loss(specification)
    if isinstance(specification, Mapping):
        return Heads(specification)
    if isinstance(specification, str):
        if specification.lower() not in LIKELIHOODS:
            raise ValueError(
                f"Unknown likelihood {specification!r}; the known ones are "
                f"{', '.join(LIKELIHOODS)}."
            )
        return LIKELIHOODS[specification.lower()]()
    if callable(specification) and specification in FUNCTIONAL_LOSSES:
        return from_loss(FUNCTIONAL_LOSSES[specification]())
    raise TypeError(
        f"A likelihood is a name ({', '.join(LIKELIHOODS)}), a Likelihood, a torch loss or a "
        f"mapping from output keys to such, not {specification!r}."
    )


def from_loss(criterion: nn.Module) -> Likelihood:
    """Return the likelihood whose negative logarithm is the given torch loss.

    Args:
        criterion: ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.KLDivLoss``, ``nn.MSELoss``,
            ``nn.L1Loss``, ``nn.SmoothL1Loss``, ``nn.HuberLoss``, ``nn.BCEWithLogitsLoss``,
            ``nn.BCELoss``, ``nn.PoissonNLLLoss`` or ``nn.GaussianNLLLoss``, with reduction "mean"
            or "sum" (or "batchmean").

    Returns:
        A likelihood with ``loss(output, target)`` equal to the mean-reduced criterion (up to
        constants of PoissonNLLLoss and KLDivLoss) and the criterion's ``reduction``. With reduction
        "mean", losses that also average over the outputs of a sample keep that factor: MSELoss
        gives Λ = (2/C) I, and KLDivLoss divides by the number of classes. CrossEntropyLoss and
        NLLLoss have their classes along dimension 1, whatever the rank. NLLLoss and KLDivLoss take
        log-probabilities; Λ is that of their logits.

    Raises:
        TypeError: If the criterion is of another type.
        ValueError: If it has reduction "none" or options with no likelihood behind them.
    """
    name = type(criterion).__name__
    reduction: Reduction = getattr(criterion, "reduction", "mean")
    if isinstance(criterion, nn.KLDivLoss) and criterion.reduction in DIVISORS:
        return Categorical(
            reduction="sum" if criterion.reduction == "sum" else "mean",
            divisor=DIVISORS[criterion.reduction],
            log_target=criterion.log_target,
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name} needs reduction 'mean' or 'sum', not {reduction!r}.")
    if isinstance(criterion, nn.CrossEntropyLoss):
        return Categorical(
            ignore_index=criterion.ignore_index,
            class_weights=criterion.weight,
            label_smoothing=criterion.label_smoothing,
            class_dim=1,
            reduction=reduction,
        )
    if isinstance(criterion, nn.NLLLoss):
        return Categorical(
            criterion.ignore_index, criterion.weight, class_dim=1, reduction=reduction
        )
    averages: ReduceOutputs = "mean" if reduction == "mean" else None
    if isinstance(criterion, nn.MSELoss):
        return Gaussian(0.5, averages, reduction)
    if isinstance(criterion, nn.L1Loss):
        return Huber(0.0, 1.0, averages, reduction)
    if isinstance(criterion, nn.SmoothL1Loss):
        return Huber(criterion.beta, 1.0, averages, reduction)
    if isinstance(criterion, nn.HuberLoss):
        return Huber(criterion.delta, criterion.delta, averages, reduction)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        if criterion.weight is not None:
            raise ValueError("BCEWithLogitsLoss with weight is not a likelihood.")
        return Bernoulli(averages, reduction, criterion.pos_weight)
    if isinstance(criterion, nn.BCELoss):
        if criterion.weight is not None:
            raise ValueError("BCELoss with weight is not a likelihood.")
        return BinaryProbabilities(averages, reduction)
    if isinstance(criterion, nn.PoissonNLLLoss):
        rates = Poisson if criterion.log_input else PoissonRates
        return rates(averages, reduction)
    if isinstance(criterion, nn.GaussianNLLLoss):
        return MeanAndScale("variance", reduce_outputs=averages, reduction=reduction)
    raise TypeError(
        "Likelihoods are known for CrossEntropyLoss, NLLLoss, KLDivLoss, MSELoss, L1Loss, "
        "SmoothL1Loss, HuberLoss, BCELoss, BCEWithLogitsLoss, PoissonNLLLoss and GaussianNLLLoss, "
        f"not for {name}; pass a Likelihood instead."
    )
