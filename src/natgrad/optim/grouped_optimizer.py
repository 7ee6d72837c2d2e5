"""Parameter groups that follow the model, and the first-order fallback of what has no rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module, Parameter

from natgrad.capture.blocks import names_by_reason
from natgrad.distributed.shards import whole
from natgrad.optim.checkpoints import CheckpointedOptimizer
from natgrad.optim.eager import plain_step
from natgrad.optim.options import Fallback
from natgrad.optim.parameter_groups import check_group, make_fallback, members, split_groups
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.step.damping import LevenbergMarquardt, RelativeDamping

#: AdamW's rates of vectors and of matrices that turn out to have no rows, or not those of their
#: gradient, beside others that have. Its own, 1e-3, moves a parameter by 0.1 in 100 steps at most.
VECTOR_RATE, MATRIX_RATE = 1e-2, 3e-3


class GroupedOptimizer(CheckpointedOptimizer):
    """Knows which parameters are preconditioned, and trains the others by a first-order rule.

    Args:
        preconditioner: Says which parameters have rows, and when that changes.
        defaults: Options of a preconditioned group.
        params: Groups as the user gave them.
        fallback: Optimizer of parameters that are not preconditioned.

    Raises:
        ValueError: If a group is wrong.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        defaults: dict[str, Any],
        params: list[dict[str, Any]],
        fallback: Literal["adamw", "sgd"] | Fallback,
    ) -> None:
        self.preconditioner: Preconditioner = preconditioner
        self.model: Module = preconditioner.model
        self._names = {p: n for n, p in preconditioner.parameters.items()}
        uncovered = preconditioner.capture.uncovered
        groups, first_order = split_groups(self.model, defaults, uncovered, params)
        rules = (LevenbergMarquardt, RelativeDamping)
        if any(isinstance(group.get("damping"), rules) for group in groups):
            raise ValueError(
                "the damping of a parameter group must be a number: a rule, given as the "
                "optimizer's damping, is that of all groups together"
            )
        chosen = fallback if isinstance(fallback, Fallback) else Fallback(fallback)
        self.fallback_name = chosen.name
        self._usual_rates = chosen == Fallback("adamw")
        self._fallback = make_fallback(chosen, first_order or [{"params": []}])
        if first_order:
            groups += self._fallback.param_groups
        #: Parameters that joined a group by themselves, and those of natural groups without rows.
        self._joined: set[Tensor] = set()
        self._left_out: set[str] = set()
        self._shadowed: set[Tensor] = set()
        #: Whether the fallback trains all parameters, as no curvature is known.
        self._is_blind = False
        self._constructed = False
        super().__init__(groups, defaults)
        self._constructed, self._groups_made = True, len(self.param_groups)
        self._told = set(uncovered)
        self._link_fallback()
        preconditioner.on_change = self._follow_model
        if uncovered:
            self._tell_first_order(uncovered)

    def _gradients(self, preconditioned: bool) -> dict[str, Tensor]:
        """Return parameter name → ``.grad`` of the preconditioned or of all other parameters.

        Of complex ones, which are among the others, absolute values.
        """
        preconditioner, found = self.preconditioner, {}
        gathers = preconditioner.capture.shards
        if gathers and preconditioned:
            gathers = not preconditioner.keeps_shards
        elif gathers:
            gathers = preconditioner.replicas.are_alone  # As in tensor parallelism.
        for group in self.param_groups:
            for p in group["params"]:
                name = self._names[p]
                natural = group["preconditioned"] and name not in self._left_out
                if natural is preconditioned and p.grad is not None and p.requires_grad:
                    if p.grad.is_sparse:
                        p.grad = p.grad.to_dense()
                    gradient = whole(p.grad) if gathers else p.grad
                    found[name] = gradient.abs() if gradient.is_complex() else gradient
        return found

    def _link_fallback(self) -> None:
        """Let the fallback work on its own groups, and on parameters of others without rows."""
        natural = [group for group in self.param_groups if group["preconditioned"]]
        before = self._shadowed
        covered = set() if self._is_blind else self.preconditioner.covered
        self._left_out = {self._names[p] for g in natural for p in g["params"]} - covered
        self._shadows = []
        for group in natural:
            own = [p for p in group["params"] if p.numel() and p.requires_grad]
            own = [p for p in own if self._names[p] in self._left_out]
            for is_vector in (True, False):
                part = [p for p in own if (p.dim() <= 1) is is_vector]
                rate = self._shadow_rate(is_vector)
                shadow = {**self._fallback.defaults, "params": part, "first_lr": rate}
                if group["weight_decay"] == 0 < self.defaults["weight_decay"]:
                    shadow["weight_decay"] = 0.0
                self._shadows += [(shadow, group)] if part else []
        self._shadowed = {p for shadow, _ in self._shadows for p in shadow["params"]}
        for parameter in before ^ self._shadowed:  # One rule's momentum is not the other's.
            self.state.pop(parameter, None)
        first_order = [group for group in self.param_groups if not group["preconditioned"]]
        self._fallback.param_groups = first_order + [shadow for shadow, _ in self._shadows]
        self._fallback.state = self.state

    def _shadow_rate(self, is_vector: bool) -> float:
        """Return the fallback's rate of parameters of natural groups without rows."""
        if self._usual_rates and not self._is_blind:
            return VECTOR_RATE if is_vector else MATRIX_RATE
        rate: float = self._fallback.defaults["lr"]
        return rate

    def _lend(self, is_blind: bool) -> None:
        """Let the fallback train all parameters while no curvature is known."""
        if is_blind:
            self.preconditioner.warn_unseen(
                f", and {self.fallback_name} trains all parameters until it is"
            )
        if is_blind != self._is_blind:
            self._is_blind = is_blind
            self._link_fallback()

    def _step_fallback(self) -> None:
        """Let the fallback train what is not preconditioned, at rates that follow their groups'."""
        if not any(group["params"] for group in self._fallback.param_groups):
            return
        for shadow, group in self._shadows:
            relative = float(group["lr"]) / group["first_lr"] if group["first_lr"] else 1.0
            shadow["lr"] = shadow["first_lr"] * relative
        plain_step(self._fallback)  # Hooks are of this step.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model, as of a layer that is trained from now on.

        Args:
            param_group: What a group of ``params`` may be: a dict with ``"params"`` (a parameter,
                parameters, pairs of names and parameters, or name patterns) or ``"modules"``, and
                options. Parameters that had joined another group by themselves leave it.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it holds something else than parameters of the model, parameters of
                another group, or an option that is unknown or out of range.
        """
        if not self._constructed:
            super().add_param_group(param_group)
            param_group.setdefault("first_lr", float(param_group["lr"]))
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group).__name__}")
        self.preconditioner.parameters = dict(self.model.named_parameters())
        self._names.update({p: n for n, p in self.preconditioner.parameters.items()})
        chosen = members(self.model, param_group)
        options = {k: v for k, v in param_group.items() if k not in ("params", "modules")}
        check_group({**options, "params": []}, self.defaults)
        moving = {self.preconditioner.parameters[name] for name in chosen} & self._joined
        for group in self.param_groups:
            kept = [p for p in group["params"] if p not in moving]
            group["params"], group["param_names"] = kept, [self._names[p] for p in kept]
        self._joined -= moving
        found = [self.preconditioner.parameters[name] for name in chosen]
        if not options.get("preconditioned", True):
            options = {**self._fallback.defaults, **options, "preconditioned": False}
            self.preconditioner.excluded |= set(chosen)
        super().add_param_group({**options, "params": found, "param_names": chosen})
        self.param_groups[-1].setdefault("first_lr", float(self.param_groups[-1]["lr"]))
        param_group.update(self.param_groups[-1])
        self.preconditioner.find_layers()

    def regroup(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take the parameter groups of a state dict, by the names of their parameters."""
        present, preconditioner = self.preconditioner.parameters, self.preconditioner
        self.param_groups: list[dict[str, Any]] = [
            {**group, "params": [present[name] for name in group["param_names"]]}
            for group in groups
        ]
        first_order = [g["param_names"] for g in self.param_groups if not g["preconditioned"]]
        left = preconditioner.covered & {name for names in first_order for name in names}
        if left:
            preconditioner.excluded |= left
            preconditioner.find_layers()
        self._link_fallback()

    def _follow_model(self) -> None:
        """Take up parameters that are trainable now, and those that replaced others."""
        present = self.preconditioner.parameters
        names = {p: n for n, p in present.items()}
        self._names = {**self._names, **names}
        for group in self.param_groups:  # A parameter of the same name takes an old one's place.
            pairs = [(p, present.get(self._names[p], p)) for p in group["params"]]
            for old, new in pairs:
                if new is not old:
                    self.state.pop(old, None)
            group["params"] = [new for _, new in pairs]
        held = {p for group in self.param_groups for p in group["params"]}
        joining = [p for p in names if p.requires_grad and p not in held]
        if joining:
            made = self.param_groups[: self._groups_made]  # The last of these held all the rest.
            home = ([g for g in made if g["preconditioned"]] or made)[-1]
            home["params"] += joining
            home["param_names"] += [names[p] for p in joining]
            self._joined.update(joining)
            listed = ", ".join(names[p] for p in joining)
            warnings.warn(
                f"{type(self).__name__} trains from now on, with the options it was made with, "
                f"parameters that were frozen or absent before: {listed} (add_param_group gives "
                "them options of their own)",
                stacklevel=2,
            )
        self._link_fallback()
        reasons = {**self.preconditioner.capture.uncovered, **self.preconditioner.untrusted}
        new = {n: reasons[n] for n in self._left_out if n in reasons and n not in self._told}
        if new:
            self._told.update(new)
            self._tell_first_order(new)

    def _tell_first_order(self, reasons: Mapping[str, str]) -> None:
        warnings.warn(
            f"{type(self).__name__} trains these parameters by {self.fallback_name}: "
            f"{names_by_reason(reasons)}",
            stacklevel=4,
        )

    def _carrier(self) -> Tensor:
        p: Parameter
        for group in self.param_groups:  # The fallback looks whether a parameter has state.
            for p in group["params"] if group["preconditioned"] else ():
                if p.requires_grad and self._names[p] not in self._left_out:
                    return p
        return super()._carrier()
