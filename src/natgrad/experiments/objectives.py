"""What is trained for: a loss over a batch, the likelihood behind it, and a metric beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.capture.evaluation import call_model
from natgrad.capture.model_output import require_output
from natgrad.experiments.factories import described, find, located
from natgrad.likelihoods import Bernoulli, Categorical, Likelihood, as_likelihood

Encoding = Callable[[Tensor, int], Tensor]
"""(labels (N,), classes) → targets."""


class ObjectiveError(ValueError):
    """A loss, likelihood or metric that cannot be told or used; the message says why."""


@dataclass(frozen=True)
class Metric:
    """A number beside the loss, the mean of a function over a batch; NaN without one."""

    name: str
    function: Callable[[Tensor, Any], float] | None

    def __call__(self, outputs: Tensor, targets: Any) -> float:
        """Return the metric of a batch; NaN without one."""
        return float("nan") if self.function is None else float(self.function(outputs, targets))


def accuracy(
    outputs: Tensor, targets: Tensor, class_dim: int = 1, ignore_index: int = -100
) -> float:
    """Return the fraction of predictions whose largest output is at their label.

    Outputs are (N, C), or have more dimensions with the classes in `class_dim`. Targets are labels,
    `ignore_index` where there is none, or class probabilities in the outputs' shape.
    """
    labels = targets if targets.dim() < outputs.dim() else targets.argmax(class_dim)
    right = outputs.argmax(class_dim) == labels
    return right[labels != ignore_index].float().mean().item()


def _binary_accuracy(outputs: Tensor, targets: Tensor) -> float:
    return ((outputs > 0) == (targets > 0.5)).float().mean().item()


def _mean_absolute_error(outputs: Tensor, targets: Tensor) -> float:
    return (outputs - targets).abs().mean().item()


ACCURACY = Metric("accuracy", accuracy)
NO_METRIC = Metric("none", None)
METRICS = ("accuracy", "mean_absolute_error", "none")
"""The metrics by name; others are named as ``package.module:function``."""


@dataclass(frozen=True)
class Objective:
    """A loss over a batch, and what natural gradient methods need to know of it.

    `function` maps outputs (N, C) and targets to a mean over the N samples; None stands for a model
    whose output holds its loss. `encode` makes targets of labels (N,) and the number of classes.
    """

    title: str
    likelihood: str | Likelihood
    function: Callable[[Tensor, Any], Tensor] | None
    encode: Encoding = lambda labels, classes: labels
    metric: Metric = ACCURACY

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar, from outputs and targets."""
        assert self.function is not None
        return self.function(outputs, targets)

    def forward(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Call a model, and return the outputs that the likelihood is about and the loss."""
        made = call_model(model, inputs)
        outputs = require_output(made, None)
        if self.function is not None:
            return outputs, self.function(outputs, targets)
        loss = _own_loss(made)
        assert loss is not None
        return outputs, loss


def _own_loss(made: Any) -> Tensor | None:
    """Return the loss that a model's output holds, as an entry or attribute of that name."""
    loss = made.get("loss") if isinstance(made, Mapping) else getattr(made, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over samples of ½‖f − y‖²."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


OBJECTIVES: dict[str, Objective] = {
    "mse": Objective("half squared error on one-hot targets", "gaussian", squared_error, _one_hot),
    "cross_entropy": Objective("cross-entropy", "categorical", F.cross_entropy),
}
"""The losses of the built-in networks by name."""


def choose_objective(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss: Any = None,
    likelihood: str | None = None,
    metric: str | None = None,
) -> Objective:
    """Return the objective of a user's model, as far as it can be told from a first batch.

    The loss is a loss module, a function of outputs and targets, a likelihood, or the name of a
    torch loss or likelihood; None takes the loss that the model computes itself, or cross-entropy
    where the targets are class labels. The likelihood is by default that of the loss. The metric is
    one of `METRICS` or ``package.module:function``, by default accuracy where there are classes.
    One forward pass may change the model.

    Raises `ObjectiveError` if the model does not take the batch, or loss or likelihood cannot be
    told, and `FactoryError` if the metric cannot be imported.
    """
    inputs, targets = batch
    try:
        made = call_model(model, inputs)
        outputs = require_output(made, None)
    except Exception as error:  # a user's model may raise anything
        raise ObjectiveError(f"The model fails on the first batch: {located(error)}.") from error
    own = loss is None and _own_loss(made) is not None
    if loss is None and not own:
        if not _are_labels(targets, outputs):
            raise ObjectiveError(
                f"The loss cannot be told from outputs {_shape(outputs)} and targets "
                f"{_shape(targets)}: let the factory return (model, loss), or give --loss."
            )
        loss = Categorical() if _classes_are_last(targets, outputs) else nn.CrossEntropyLoss()
    if isinstance(loss, str):
        loss = find_loss(loss)
    if likelihood is None and own:
        if not _are_labels(targets, outputs):
            raise ObjectiveError(
                "The model computes its own loss, and the likelihood behind it cannot be told from "
                f"labels {_shape(targets)}: give --likelihood."
            )
        likelihood = "categorical"
    try:
        behind = as_likelihood(loss if likelihood is None else likelihood)
    except (TypeError, ValueError) as error:
        told = f"{described(error)}."
        if likelihood is None:
            told = (
                f"The likelihood behind the loss cannot be told: give --likelihood ({told[:-1]})."
            )
        raise ObjectiveError(told) from error
    function = None if own else loss.loss if isinstance(loss, Likelihood) else loss
    title = "the model's own" if own else _title(loss)
    objective = Objective(title, behind, function)
    try:
        value = objective.forward(model, inputs, targets)[1]
    except Exception as error:
        raise ObjectiveError(
            f"The loss, {title}, fails on outputs {_shape(outputs)} and targets {_shape(targets)}: "
            f"{described(error)}."
        ) from error
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        raise ObjectiveError(f"The loss, {title}, must be one number that depends on the model.")
    if not value.isfinite():
        raise ObjectiveError(f"The loss, {title}, is {value.item()} on the first batch.")
    chosen = choose_metric(metric, behind, outputs, targets, own)
    try:
        chosen(outputs.detach(), targets)
    except Exception as error:
        raise ObjectiveError(
            f"The metric {chosen.name} fails on the first batch: {described(error)}."
        ) from error
    return Objective(title, behind, function, metric=chosen)


def choose_metric(
    name: str | None, likelihood: Likelihood, outputs: Tensor, targets: Any, own_loss: bool
) -> Metric:
    """Return a metric by name; without one accuracy, where it is clear what that is."""
    if name is not None and ":" in name:
        return Metric(name.partition(":")[2], find(name))
    if name == "mean_absolute_error":
        return Metric(name, _mean_absolute_error)
    if name == "none":
        return NO_METRIC
    if name is not None and name != "accuracy":
        raise ObjectiveError(
            f"Unknown metric {name!r}: choose one of {', '.join(METRICS)}, or name a function "
            "package.module:function of outputs and targets."
        )
    if isinstance(likelihood, Bernoulli):
        return Metric("accuracy", _binary_accuracy)
    if name is None and (own_loss and outputs.dim() > 2 or not isinstance(likelihood, Categorical)):
        return NO_METRIC  # Language models shift their labels: only they know by how much.
    dim = getattr(likelihood, "class_dim", None)
    dim = dim if dim is not None else 2 if outputs.dim() == 3 else 1
    ignored = getattr(likelihood, "ignore_index", -100)
    return Metric("accuracy", lambda outputs, targets: accuracy(outputs, targets, dim, ignored))


def find_loss(name: str) -> nn.Module | Likelihood:
    """Return a torch loss or a likelihood by a name such as mse, MSELoss, mse_loss or gaussian.

    An ObjectiveError says that there is none.
    """
    with contextlib.suppress(ValueError):
        return as_likelihood(name)
    losses = {_plain(key): made for key, made in vars(nn).items() if key.endswith("Loss")}
    with contextlib.suppress(KeyError, TypeError):  # None of the name, or one that takes arguments.
        made: nn.Module = losses[_plain(name)]()
        return made
    raise ObjectiveError(
        f"Unknown loss {name!r}: give a loss of torch, such as cross_entropy, mse or "
        "bce_with_logits, or categorical, gaussian, bernoulli or poisson."
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("loss")


def _are_labels(targets: Any, outputs: Tensor) -> bool:
    """Whether targets are class indices, one for every prediction of several classes."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return False
    return (
        outputs.dim() >= 2 and targets.dim() == outputs.dim() - 1 and len(targets) == len(outputs)
    )


def _classes_are_last(targets: Tensor, outputs: Tensor) -> bool:
    """Whether outputs are (N, T, C) for labels (N, T); torch's loss takes (N, C, T) only."""
    of_torch = outputs.shape[:1] + outputs.shape[2:]
    return outputs.dim() == 3 and outputs.shape[:2] == targets.shape != of_torch


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"


def _title(loss: Any) -> str:
    if isinstance(loss, (nn.Module, Likelihood)):
        return repr(loss)
    return getattr(loss, "__name__", type(loss).__name__)
