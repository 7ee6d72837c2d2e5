"""The optimizer every natural-gradient method shares."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from natgrad.curvature.base import inner_product
from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.isotropic_rate import IsotropyProbe, is_isotropic
from natgrad.optim.preconditioner import Preconditioner, gradients_are_finite
from natgrad.optim.summary import Summary, summarize

__all__ = ["NaturalGradient", "check_range"]

Fallback = Literal["adamw", "sgd"]


class NaturalGradient(torch.optim.Optimizer):
    r"""Natural gradient descent with any structure of the Fisher matrix.

    .. math::
        m \leftarrow \mu m + (\hat F + \lambda I)^{-1} \nabla L, \qquad
        \theta \leftarrow (1 - \eta w) \theta - \eta m

    A step whose gradient is not finite is skipped: parameters, momentum and curvature stay as they
    were. Parameters no layer kind covers are trained by a first-order fallback and reported once,
    by name.

    Args:
        model: The model to train (not its parameters: curvature comes from its layers).
        structure: Name of the structure.
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, ``"poisson"``, a
            :class:`natgrad.Likelihood`, or a torch loss module such as ``nn.MSELoss()``.
        lr: Learning rate η. ``"isotropic"`` takes 1/α, with α measured on the first batch (see
            :func:`natgrad.ntk.isotropy`): the rate at which a wide network fits the batch in one
            step of the squared loss. The groups' ``lr`` is then 1, in units of 1/α, so that
            schedulers work as factors.
        damping: λ, in the units of F.
        momentum: μ.
        weight_decay: Decoupled weight decay w.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        factor_interval: Steps between updates of the curvature.
        inverse_interval: Steps between factorisations.
        ema_decay: Decay of the moving average of the curvature.
        kl_clip: Bound on ``η² ΔᵀFΔ``, twice the change (Kullback-Leibler divergence) of the
            output distribution that the curvature predicts for a step; larger steps are scaled
            down to it, before momentum. None for no bound.
        fallback: Optimizer of uncovered parameters, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        fallback_lr: Its learning rate; 1e-3 for AdamW and 1e-2 for SGD by default.
        params: Parameter groups with options of their own, as a list of dicts. A group says what
            it holds by ``"modules"`` (a list of modules), ``"params"`` (a name pattern such as
            ``"encoder.*"``, a list of patterns, or a list of parameters) and may set ``lr``,
            ``momentum``, ``weight_decay``, ``damping`` and ``preconditioned=False`` (train it by
            the fallback). All other parameters form the last group.
        output: Picks the tensor the likelihood looks at out of the model's output.
        seed: Seed of the sampled labels; the global random state is never used.
        **structure_options: Options of the structure.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If an argument is out of range or a group matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"],
        damping: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        mc_samples: int = 1,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        ema_decay: float = 0.0,
        kl_clip: float | None = None,
        fallback: Fallback = "adamw",
        fallback_lr: float | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        **structure_options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes the model itself, not its parameters: got "
                f"{type(model).__name__}"
            )
        measured = is_isotropic(lr)
        lr = 1.0 if isinstance(lr, str) else lr
        check_range("lr", lr)
        check_range("momentum", momentum, below=1.0)
        check_range("weight_decay", weight_decay)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip)
        self.preconditioner = Preconditioner(
            model,
            structure,
            likelihood,
            fisher=fisher,
            mc_samples=mc_samples,
            damping=damping,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            ema_decay=ema_decay,
            output=output,
            seed=seed,
            **structure_options,
        )
        self.model = self.preconditioner.model
        self._names = {p: n for n, p in self.preconditioner.parameters.items()}
        if fallback not in ("adamw", "sgd"):
            raise ValueError(f"fallback must be 'adamw' or 'sgd', got {fallback!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "kl_clip": kl_clip,
            "preconditioned": True,
            # What lr is multiplied by; None until it is measured.
            "unit": None if measured else 1.0,
        }
        covered = self.preconditioner.capture.uncovered
        groups, first_order = _split_groups(self.model, defaults, covered, params)
        self._fallback: torch.optim.Optimizer | None = None
        if first_order:
            self._fallback = _make_fallback(fallback, fallback_lr, first_order)
            groups += self._fallback.param_groups
        super().__init__(groups, defaults)
        self._link_fallback()
        self._set_damping()
        self._skipped = 0
        if measured:
            self.preconditioner.isotropy_probe = IsotropyProbe(seed)
        if covered:
            reasons = "; ".join(f"{name} ({why})" for name, why in covered.items())
            warnings.warn(
                f"{type(self).__name__} trains these parameters by {fallback}: {reasons}",
                stacklevel=3,
            )

    # Convenience routes to the curvature.

    def loss(
        self, criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor
    ) -> Tensor:
        """Return ``criterion(output, target)`` and let curvature see the true target.

        The plain loop needs this only where targets cannot be read off the loss gradient: label
        smoothing together with class weights.
        """
        return self.preconditioner.loss(criterion, output, target)

    def update_fisher(self, output: Tensor, target: Tensor | None = None) -> None:
        """Update curvature from ``output`` now, before ``loss.backward()``.

        The plain loop needs this only where the hooks cannot see the model's output.
        """
        self.preconditioner.update_fisher(output, target)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients; a backward pass that no step followed leaves curvature too."""
        super().zero_grad(set_to_none)
        self.preconditioner.discard()

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model, backpropagates and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = {
            self._names[p]: p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        self._set_damping()
        covered = {n: g for n, g in present.items() if n not in self._first_order_names}
        rest = [g for n, g in present.items() if n in self._first_order_names]
        natural = self.preconditioner.natural_gradient(covered)
        natural = {n: natural[n] for n in covered}
        _average_over_replicas(natural)
        quadratic = self._check(natural, covered, rest, loss)
        if quadratic is None:
            self._skip()
            return loss
        if self.preconditioner.isotropy_probe is not None:
            self._set_unit()
        self.preconditioner.finish()
        for group in self.param_groups:
            if group["preconditioned"]:
                self._update_group(group, natural, quadratic)
        if self._fallback is not None:
            self._fallback.step()
        return loss

    def _check(
        self,
        natural: dict[str, Tensor],
        gradients: dict[str, Tensor],
        rest: list[Tensor],
        loss: float | Tensor | None,
    ) -> float | None:
        """Return ``ΔᵀFΔ``, or None if anything about the step is not finite.

        One inner product passes over gradients and natural gradients alike; it is the only place
        where a step waits for the device.
        """
        values = [torch.as_tensor(0.0)] if not natural else [inner_product(natural, gradients)]
        if any(g["preconditioned"] and g["kl_clip"] is not None for g in self.param_groups):
            if natural:
                quadratic = self.preconditioner.structure.quadratic(natural, values[0])
                _average_over_replicas({"quadratic": quadratic})
                values.append(quadratic)
        numbers = torch.stack([v.double() for v in values]).tolist()
        finite = all(math.isfinite(v) for v in numbers) and gradients_are_finite(rest)
        if not finite or (loss is not None and not math.isfinite(float(loss))):
            return None
        return abs(numbers[-1])

    def _set_unit(self) -> None:
        """Measure α and take 1/α as the unit of the learning rates."""
        measured = self.preconditioner.measure_isotropy()
        alpha, deviation = measured if measured is not None else (float("nan"), 0.0)
        value = {"alpha": torch.tensor(alpha, dtype=torch.float64)}
        _average_over_replicas(value)
        alpha = float(value["alpha"])
        if not 0 < alpha < float("inf"):
            self.preconditioner.skip()
            raise ValueError(
                f"lr='isotropic' found α = {alpha:.3g} on the first batch, which gives no learning "
                "rate: give lr as a number (natgrad.ntk.isotropy(model, x, structure) tells more)"
            )
        if deviation > 0.5:
            warnings.warn(
                f"the coefficients of {self.preconditioner.structure.structure!r} deviate by about "
                f"{100 * deviation:.0f} % from α times the identity, so lr = 1/α = {1 / alpha:.3g} "
                "is not backed by theory: natgrad.ntk.isotropy(model, x, structure) tells which "
                "layer breaks the condition",
                stacklevel=3,
            )
        self.preconditioner.isotropy_probe = None
        for group in self.param_groups:
            if group["preconditioned"]:
                group["unit"] = 1.0 / alpha

    def _update_group(
        self, group: dict[str, Any], natural: dict[str, Tensor], quadratic: float
    ) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        names = [self._names[p] for p in parameters]
        directions = [natural[n].to(p.dtype) for n, p in zip(names, parameters, strict=True)]
        lr, momentum = group["lr"] * group["unit"], group["momentum"]
        scale = 1.0
        if group["kl_clip"] is not None and quadratic > 0:
            scale = min(1.0, (group["kl_clip"] / (quadratic * lr**2)) ** 0.5) if lr else 1.0
        if momentum > 0:
            buffers = []
            for p in parameters:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, directions, alpha=scale)
            directions, scale = buffers, 1.0
        if group["weight_decay"] > 0:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-lr * scale)

    def _skip(self) -> None:
        self.preconditioner.skip()
        self._skipped += 1
        if self._skipped == 1:
            warnings.warn(
                f"{type(self).__name__} skipped a step because its loss or gradient was NaN or "
                "infinite; parameters and state are unchanged",
                stacklevel=3,
            )

    def _set_damping(self) -> None:
        """Collect each block's damping from its parameter group."""
        by_parameter: dict[str, float] = {}
        for group in self.param_groups:
            if group["preconditioned"]:
                by_parameter.update(
                    dict.fromkeys((self._names[p] for p in group["params"]), group["damping"])
                )
        blocks = self.preconditioner.structure.blocks
        self.preconditioner.damping = {
            name: by_parameter.get(block.names[0], self.defaults["damping"])
            for name, block in blocks.items()
        }

    # State.

    def _link_fallback(self) -> None:
        """Let the fallback work on this optimizer's groups and state."""
        groups = [g for g in self.param_groups if not g["preconditioned"]]
        self._first_order_names = {self._names[p] for g in groups for p in g["params"]}
        if self._fallback is not None:
            self._fallback.param_groups = groups
            self._fallback.state = self.state

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, groups, curvature and random state, as tensors and plain values.

        It loads with ``torch.load(..., weights_only=True)``, and a resumed run continues exactly
        as an uninterrupted one.
        """
        return {**super().state_dict(), "natgrad": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: If it comes from another structure, model or library.
        """
        if "natgrad" not in state_dict:
            raise ValueError(
                "this state dict has no natgrad curvature: it was not saved by a natgrad optimizer"
            )
        plain = {key: value for key, value in state_dict.items() if key != "natgrad"}
        super().load_state_dict(plain)
        self.preconditioner.load_state_dict(state_dict["natgrad"])
        self._link_fallback()
        self._set_damping()
        pending = any(g["unit"] is None for g in self.param_groups if g["preconditioned"])
        self.preconditioner.isotropy_probe = IsotropyProbe() if pending else None

    def summary(self, samples: int = 128) -> Summary:
        """Return, layer by layer, what is preconditioned, its factors, memory and cost.

        Args:
            samples: Batch size the costs are stated for.
        """
        return summarize(self.preconditioner, samples)


def check_range(name: str, value: float, below: float = float("inf")) -> None:
    """Raise a ValueError unless ``0 <= value < below``."""
    if not 0 <= value < below:
        bound = "a finite number >= 0" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {bound}, got {value}")


def _average_over_replicas(values: dict[str, Tensor]) -> None:
    """Average natural gradients over data-parallel processes, so that replicas stay equal."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    world = distributed.get_world_size()
    if world == 1:
        return
    for value in values.values():
        distributed.all_reduce(value)
        value.div_(world)


def _split_groups(
    model: nn.Module,
    defaults: dict[str, Any],
    uncovered: dict[str, str],
    params: Iterable[dict[str, Any]] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return preconditioned and first-order groups that hold every trainable parameter once."""
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    taken: set[str] = set()
    groups: list[dict[str, Any]] = []
    first_order: list[dict[str, Any]] = []

    def add(chosen: list[str], options: dict[str, Any]) -> None:
        preconditioned = options.get("preconditioned", True)
        covered = [n for n in chosen if preconditioned and n not in uncovered]
        rest = [n for n in chosen if n not in covered]
        taken.update(chosen)
        if covered:
            groups.append({**options, "params": [names[n] for n in covered]})
        if rest:
            keep = {} if preconditioned else options
            plain = {k: v for k, v in keep.items() if k in ("lr", "weight_decay", "momentum")}
            first_order.append({**plain, "params": [names[n] for n in rest]})

    known = {*defaults, "params", "modules"} - {"unit"}
    for group in params or []:
        unknown = set(group) - known
        if unknown:
            raise ValueError(
                f"unknown option {sorted(unknown)[0]!r} in a parameter group; known: "
                f"{', '.join(sorted(known))}"
            )
        chosen = [n for n in _members(model, names, group) if n not in taken]
        if not chosen:
            raise ValueError(f"the parameter group {_describe(group)} matches no parameter")
        add(chosen, {k: v for k, v in group.items() if k not in ("params", "modules")})
    rest = [n for n in names if n not in taken]
    if rest:
        add(rest, {})
    if not groups and not first_order:
        raise ValueError("the model has no trainable parameters")
    return groups, first_order


def _members(model: nn.Module, names: dict[str, nn.Parameter], group: dict[str, Any]) -> list[str]:
    if ("params" in group) == ("modules" in group):
        raise ValueError("a parameter group needs either 'params' or 'modules'")
    wanted: set[int] = set()
    patterns: list[str] = []
    if "modules" in group:
        for module in group["modules"]:
            wanted.update(id(p) for p in module.parameters())
    elif isinstance(group["params"], str):
        patterns = [group["params"]]
    else:
        for item in group["params"]:
            if isinstance(item, str):
                patterns.append(item)
            else:
                wanted.add(id(item))
    return [
        n
        for n, p in names.items()
        if id(p) in wanted or any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)
    ]


def _describe(group: dict[str, Any]) -> str:
    chosen = group.get("params", group.get("modules"))
    return repr(chosen) if isinstance(chosen, str) else f"of {len(list(chosen or []))} entries"


def _make_fallback(
    name: Fallback, lr: float | None, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        plain = [{k: v for k, v in g.items() if k != "momentum"} for g in groups]
        optimizer = torch.optim.AdamW(plain, lr=1e-3 if lr is None else lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-2 if lr is None else lr, momentum=0.9)
    for group in optimizer.param_groups:
        group["preconditioned"] = False
    return optimizer
