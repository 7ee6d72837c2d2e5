"""Averages of the weights that an optimizer passes through, to evaluate and to keep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from natgrad.arguments import check_integer, check_range
from natgrad.capture.model_output import unwrap
from natgrad.optim.checkpoints import CopiedByState


@dataclass
class _Mean:
    """The average of one tensor of the model.

    Attributes:
        tensor: The tensor; another parameter under its name is averaged anew.
        value: Its average, in float32 at least.
        count: Steps averaged.
    """

    tensor: Tensor
    value: Tensor
    count: int = 0


class WeightAverage(CopiedByState):
    r"""The average of a model's weights over the steps of any optimizer, updated by itself.

    With ``decay`` :math:`\beta` it is exponential and free of bias from the first step on, without
    it uniform, over all steps after ``start``:

    .. math::
        \bar\theta_n = \frac{\sum_{s=1}^n \beta^{n-s} \theta_s}{\sum_{s=1}^n \beta^{n-s}}, \qquad
        \bar\theta_n = \frac{1}{n} \sum_{s=1}^n \theta_s

    It holds the parameters that the optimizer trains, those that join later from then on, and the
    floating-point buffers of the model: running statistics of batch norms belong to the weights.
    What is half precision is averaged in float32. Steps that a natgrad optimizer skips do not
    count. Give every optimizer its own if several train one model. Replicas average the same
    weights, and each its own running statistics.

    :class:`torch.optim.swa_utils.AveragedModel` averages a copy of the model. Here the values of
    the model itself are exchanged, so that compiled and distributed models evaluate as they train.

    Args:
        optimizer: The optimizer itself, not what a framework wraps it in.
        model: The model; needed where the optimizer does not know it, as those of torch.
        decay: β, or None for the uniform average. About ``1 - 1/n`` forgets after n steps.
        start: Steps before the first one that counts; needed without ``decay``.

    Raises:
        TypeError: If ``optimizer`` is no optimizer, or the wrapper of one.
        ValueError: If an option is out of range or neither is given, or if the optimizer trains
            parameters that are none of the model's.

    Source: Polyak & Juditsky, Acceleration of stochastic approximation by averaging (1992);
    Izmailov et al., Averaging weights leads to wider optima and better generalization (2018).

    Example:
        >>> average = natgrad.WeightAverage(optimizer, decay=0.99)
        >>> train(model)
        >>> with average.applied():
        ...     evaluate(model)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        decay: float | None = None,
        start: int | None = None,
    ) -> None:
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise TypeError(
                "WeightAverage takes an optimizer of torch or natgrad itself, not what a framework "
                f"wraps it in: got {type(optimizer).__name__}"
            )
        model = getattr(optimizer, "model", None) if model is None else model
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{type(optimizer).__name__} does not know its model, whose buffers belong to the "
                "average: give it, as WeightAverage(optimizer, model, ...)"
            )
        if decay is None and start is None:
            raise ValueError(
                "WeightAverage needs decay= (exponential) or start= (uniform over all steps after "
                "that many)"
            )
        if decay is not None:
            check_range("decay", decay, below=1.0)
        if start is not None:
            check_integer("start", start, 0)
        self.optimizer: torch.optim.Optimizer = optimizer
        self.model: nn.Module = unwrap(model)
        self.decay: float | None = decay
        self.start: int = start or 0
        #: Steps of the optimizer that were seen, skipped ones apart.
        self.steps: int = 0
        self._means: dict[str, _Mean] = {}
        self._skipped = self._skips()
        strange = self._trained() - set(self.model.parameters())
        if strange:
            raise ValueError(
                f"the optimizer trains {len(strange)} parameters that the model does not have: "
                "give WeightAverage the model that the optimizer trains"
            )
        self._follow()
        self._hook = optimizer.register_step_post_hook(self._observe)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Exchange the model's values for their averages, and set them back at the end.

        Inside, the model evaluates, and ``model.state_dict()`` saves, the average; parameters stay
        the same objects. At the end every parameter and buffer is bit for bit what it was, also
        after an exception. What has no average yet, as everything before ``start``, stays as it is.

        Yields:
            The model.

        Raises:
            RuntimeError: If the optimizer takes a step inside.
        """
        self._follow()
        means = {name: mean for name, mean in self._means.items() if mean.count}
        held = [mean.tensor for mean in means.values()]
        held += [b for b in self.model.buffers() if not b.is_floating_point()]
        before = [tensor.detach().clone() for tensor in held]
        guard = self.optimizer.register_step_pre_hook(_refuse)
        try:
            _copy(held[: len(means)], [mean.value for mean in means.values()])
            yield self.model
        finally:
            guard.remove()
            _copy(held, before)

    def update_statistics(
        self, loader: Iterable[Any], device: int | torch.device | None = None
    ) -> None:
        """Measure the statistics of batch norms anew, under the average weights.

        Averages of running statistics are close to them where weights hardly differ over the
        average; after a long uniform one they are not. It takes a pass over the data.

        Args:
            loader: Yields inputs, or tuples that begin with them; see
                :func:`torch.optim.swa_utils.update_bn`.
            device: Where inputs are moved to.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        with self.applied():
            try:
                update_bn(loader, self.model, device)
            finally:
                for module, mode in modes:
                    module.training = mode
            for name, buffer in self.model.named_buffers():
                if name in self._means and self._means[name].count:
                    self._means[name].value.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name, how many steps each is over, and the steps seen."""
        return {
            "steps": self.steps,
            "counts": {name: mean.count for name, mean in self._means.items()},
            "averages": {name: mean.value.clone() for name, mean in self._means.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; averages then continue to the last bit.

        Raises:
            ValueError: If it is something else or of another model; nothing is changed.
        """
        if not {"steps", "counts", "averages"} <= set(state_dict):
            raise ValueError("this is no state dict of a WeightAverage")
        counts, averages = state_dict["counts"], state_dict["averages"]
        current = self._current()
        for name, value in averages.items():
            if name not in current or current[name].shape != value.shape:
                found = tuple(current[name].shape) if name in current else "nothing"
                raise ValueError(
                    f"the averages are of another model: {name!r} of shape {tuple(value.shape)} "
                    f"meets {found} here"
                )
        self.steps, self._skipped, self._means = state_dict["steps"], self._skips(), {}
        self._follow()
        for name, value in averages.items():
            self._means[name].value.copy_(value)
            self._means[name].count = counts[name]

    def remove(self) -> None:
        """Average no further steps; the average stays."""
        self._hook.remove()

    def _trained(self) -> set[Tensor]:
        return {p for group in self.optimizer.param_groups for p in group["params"]}

    def _current(self) -> dict[str, Tensor]:
        """Return what is averaged, by name."""
        trained = self._trained()
        found: dict[str, Tensor] = dict(self.model.named_buffers())
        found = {name: buffer for name, buffer in found.items() if buffer.is_floating_point()}
        found.update({n: p for n, p in self.model.named_parameters() if p in trained})
        return {name: tensor for name, tensor in found.items() if not is_lazy(tensor)}

    def _follow(self) -> None:
        """Have a mean for everything that is averaged now; those of other tensors begin anew."""
        found = {}
        for name, tensor in self._current().items():
            mean = self._means.get(name)
            # Modules may make their buffers anew at every pass, but not parameters.
            same = mean is not None and (
                mean.tensor is tensor or not isinstance(tensor, nn.Parameter)
            )
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            if mean is None or not same or mean.value.shape != tensor.shape:
                mean = _Mean(tensor, tensor.detach().to(dtype, copy=True))
            mean.tensor, mean.value = tensor, mean.value.to(tensor.device, dtype)
            found[name] = mean
        self._means = found

    def _skips(self) -> int:
        return int(getattr(self.optimizer, "_skipped", 0))

    @torch.no_grad()
    def _observe(self, *_: Any) -> None:
        """Take the weights after a step into the average."""
        before, self._skipped = self._skipped, self._skips()
        if self._skipped != before:
            return
        self.steps += 1
        if self.steps <= self.start:
            return
        self._follow()
        alike: defaultdict[int, list[_Mean]] = defaultdict(list)
        for mean in self._means.values():
            mean.count += 1
            alike[mean.count].append(mean)
        for count, means in alike.items():
            values = [mean.value for mean in means]
            now = [mean.tensor.detach().to(mean.value.dtype) for mean in means]
            torch._foreach_lerp_(values, now, self._weight(count))

    def _weight(self, count: int) -> float:
        """Return the weight of the newest of some steps."""
        if self.decay is None:
            return 1.0 / count
        return (1.0 - self.decay) / (1.0 - self.decay**count)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "step() was called inside `with average.applied()`, whose end would undo it: leave the "
        "block first"
    )


@torch.no_grad()
def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(tensors, values)
