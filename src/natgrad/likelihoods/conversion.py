"""From a name or a torch loss to a likelihood."""

from __future__ import annotations

from torch import nn

from natgrad.likelihoods.base import Likelihood, Reduction
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.poisson import Poisson

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}


def as_likelihood(specification: str | Likelihood | nn.Module) -> Likelihood:
    """Return a likelihood from its name, a torch loss module, or itself.

    Args:
        specification: "categorical", "gaussian", "bernoulli" or "poisson" with their defaults; a
            :class:`Likelihood`, returned as it is; or a loss that :func:`from_loss` takes.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is something else.
    """
    if isinstance(specification, Likelihood):
        return specification
    if isinstance(specification, nn.Module):
        return from_loss(specification)
    if isinstance(specification, str):
        if specification.lower() not in LIKELIHOODS:
            raise ValueError(
                f"Unknown likelihood {specification!r}; the known ones are "
                f"{', '.join(LIKELIHOODS)}."
            )
        return LIKELIHOODS[specification.lower()]()
    raise TypeError(
        f"A likelihood is a name ({', '.join(LIKELIHOODS)}), a Likelihood or a torch loss module, "
        f"not {specification!r}."
    )


def from_loss(criterion: nn.Module) -> Likelihood:
    """Return the likelihood whose negative logarithm is the given torch loss.

    Args:
        criterion: ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss`` or
            ``nn.PoissonNLLLoss(log_input=True)``, with reduction "mean" or "sum".

    Returns:
        A likelihood with ``loss(output, target)`` equal to the mean-reduced criterion (up to
        PoissonNLLLoss's constants) and the criterion's ``reduction``. With reduction "mean",
        losses that also average over the outputs of a sample keep that factor: MSELoss gives
        Λ = (2/C) I.

    Raises:
        TypeError: If the criterion is of another type.
        ValueError: If it has reduction "none" or options with no likelihood behind them.
    """
    name = type(criterion).__name__
    reduction: Reduction = getattr(criterion, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name} needs reduction 'mean' or 'sum', not {reduction!r}.")
    if isinstance(criterion, nn.CrossEntropyLoss):
        return Categorical(
            ignore_index=criterion.ignore_index,
            class_weights=criterion.weight,
            label_smoothing=criterion.label_smoothing,
            reduction=reduction,
        )
    if isinstance(criterion, nn.MSELoss):
        return Gaussian(variance=0.5, reduce_outputs=reduction, reduction=reduction)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        if criterion.weight is not None or criterion.pos_weight is not None:
            raise ValueError("BCEWithLogitsLoss with weight or pos_weight is not a likelihood.")
        return Bernoulli(reduce_outputs=reduction, reduction=reduction)
    if isinstance(criterion, nn.PoissonNLLLoss):
        if not criterion.log_input:
            raise ValueError("PoissonNLLLoss needs log_input=True: the output is the log rate.")
        return Poisson(reduce_outputs=reduction, reduction=reduction)
    raise TypeError(
        "Likelihoods are known for CrossEntropyLoss, MSELoss, BCEWithLogitsLoss and "
        f"PoissonNLLLoss, not for {name}; pass a Likelihood instead."
    )
