r"""Decentralised natural gradient descent with Kronecker factors.

Agent i has data and weights θ_i of its own. With a doubly stochastic matrix W of who talks to whom,

.. math::
    s_i &\leftarrow \sum_j W_{ij} (s_j + g_j - g_j^-), \\
    A_i &\leftarrow \sum_j W_{ij} A_j, \qquad B_i \leftarrow \sum_j W_{ij} B_j, \\
    \theta_i &\leftarrow \sum_j W_{ij}
        \bigl(\theta_j - \eta\, P_j (B_j \otimes A_j + \lambda I)^{-1} P_j s_j\bigr)

with the gradient g of the agent's own batch, g⁻ the one before, and P the projection on the tangent
space where weights lie on a manifold, to which the new weights are brought back. s tracks the
gradient of the mean loss: the mean of all s is that of all g. Nothing is ever sent to anybody but a
neighbour.

Source: Hu, Deng, Wu & Li, Decentralized Riemannian natural gradient methods with Kronecker-product
approximations (2023, arXiv 2303.09064). Mixing follows adding here, so that the complete graph with
``W = 1/N`` is K-FAC on the joint batch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from natgrad.decentralized.gossip import Gossip, Graph
from natgrad.decentralized.manifolds import MANIFOLDS, Manifold, projected, retracted
from natgrad.distributed.exchange import put_together, taken_apart
from natgrad.likelihoods import LikelihoodLike
from natgrad.optim.checkpoints import only_initialises
from natgrad.optim.method import Method
from natgrad.optim.methods import KFAC
from natgrad.optim.options import StepRule
from natgrad.optim.step.measures import all_finite, on_host, scalar_checks
from natgrad.optim.step.plan import rate_of


class DecentralizedKFAC(KFAC):
    """K-FAC by agents that talk to their neighbours only, each with data and weights of its own.

    Every agent is a process with a model that is *not* wrapped. Weights start where each agent's
    do; the same start saves the first rounds. Each step sends a neighbour the tracked gradient, the
    weights and, with an update of the curvature, the triangles of the factors.

    An agent whose gradient is not finite moves on with the gradient before. Parameters of the
    fallback take their first-order step from the agent's own gradient and are mixed as well.

    Args:
        model: The model of this agent.
        likelihood: As in :class:`natgrad.KFAC`.
        graph: Who talks to whom: ``"ring"``, ``"grid"``, ``"complete"``, or a doubly stochastic
            matrix; see :func:`natgrad.decentralized.mixing_matrix`.
        agents: The processes, a process group; all by default.
        manifolds: Name pattern of weights → ``"sphere"`` (norm 1) or ``"stiefel"`` (orthonormal
            columns, or rows where there are fewer); weights are brought there at once.
        **options: Options of :class:`natgrad.KFAC`; steps are η times the natural gradient, with
            momentum 0 by default.

    Attributes:
        gossip: Mixes tensors; ``gossip.spectral_gap`` tells how fast agents agree.

    Raises:
        ValueError: If the model is wrapped or sharded, an option is not for agents, or a pattern
            matches no weight.

    Example:
        >>> torch.distributed.init_process_group()
        >>> optimizer = natgrad.DecentralizedKFAC(model, graph="ring")
        >>> cross_entropy(model(x), y).backward()
        >>> optimizer.step()
    """

    method: ClassVar[Method] = replace(
        KFAC.method, lr=0.1, damping=1e-2, momentum=0.0, step_rule=StepRule()
    )

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodLike = "categorical",
        *,
        graph: Graph | Tensor = "ring",
        agents: Any = None,
        manifolds: Mapping[str, Manifold] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, likelihood, **options)
        try:
            self._check_agent()
            self.gossip: Gossip = Gossip(graph, agents)
            self._manifolds = self._found(manifolds or {})
        except ValueError:
            self.preconditioner.capture.remove()  # Whoever holds the error holds the hooks.
            raise
        with torch.no_grad():
            for name, manifold in self._manifolds.items():
                parameter = self.preconditioner.parameters[name]
                parameter.copy_(retracted(manifold, parameter))

    def _check_agent(self) -> None:
        if not self.preconditioner.replicas.are_alone:
            raise ValueError(
                "DecentralizedKFAC takes each agent's own model: do not wrap or shard it, and name "
                "the processes by agents="
            )
        if self.step_rule != StepRule() or self._relative_damping or self.levenberg_marquardt:
            raise ValueError(
                "agents decide about no length together, so DecentralizedKFAC takes a learning "
                "rate, momentum and a damping that are numbers, and StepRule() as it is"
            )

    def _found(self, manifolds: Mapping[str, Manifold]) -> dict[str, Manifold]:
        """Return weight → manifold of name patterns; what lies near none is a ValueError."""
        result: dict[str, Manifold] = {}
        for pattern, manifold in manifolds.items():
            found = [n for n in self._names.values() if fnmatch.fnmatchcase(n, pattern)]
            if not found or manifold not in MANIFOLDS:
                raise ValueError(
                    f"manifolds must map patterns of weights to one of {', '.join(MANIFOLDS)}, got "
                    f"{pattern!r}: {manifold!r}, which matches {found or 'no weight'}"
                )
            result.update(dict.fromkeys(found, manifold))
        for name, manifold in result.items():
            weight = self.preconditioner.parameters[name].detach()
            if manifold == "stiefel" and weight.dim() != 2:
                raise ValueError(
                    f"the weight {name!r} of shape {tuple(weight.shape)} is no matrix, whose "
                    "columns or rows could be orthonormal: give 'stiefel' to matrices"
                )
            if not bool(weight.any()):
                raise ValueError(
                    f"the weight {name!r} is zero, and no point of a {manifold} is near"
                )
        return result

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None and not self.preconditioner.observer.seen and only_initialises(self):
            self._initialise()
            return None
        loss, _ = self._evaluated(closure)
        preconditioner = self.preconditioner
        preconditioner.audit()
        gradients = self._gradients(preconditioned=True)
        is_due = preconditioner.observer.update_due
        checks = scalar_checks(gradients.values(), loss)
        whole = not checks or all_finite(on_host(checks))
        if not whole:  # The others go on, so that this one takes part.
            self._skip(outcome="the step goes on with the gradient before")
            preconditioner.pass_by()
        tracked = self._tracked(gradients if whole else {})
        self._set_damping()
        preconditioner.update_curvature()
        if is_due:
            self._mix_curvature()
        natural = self._natural(tracked)
        preconditioner.finish()
        self._move(natural)
        if whole:
            self._step_fallback()
        self._mix_weights()
        return loss

    def _tracked(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return s; without a gradient it is mixed only."""
        covered = [p for g in self._grouped().groups for p in self._grouped().members(g)]
        changed = []
        for p in covered:
            state = self.state[p]
            if "tracked_gradient" not in state:
                state["tracked_gradient"] = torch.zeros_like(p)
                state["last_gradient"] = torch.zeros_like(p)
            new = gradients.get(self._names[p], state["last_gradient"])
            changed.append(state["tracked_gradient"] + new - state["last_gradient"])
            state["last_gradient"] = new.clone()
        mixed = self.gossip.mixed(changed)
        for p, value in zip(covered, mixed, strict=True):
            self.state[p]["tracked_gradient"] = value
        return {self._names[p]: value for p, value in zip(covered, mixed, strict=True)}

    def _mix_curvature(self) -> None:
        """Mix the averages of the statistics with those of the neighbours."""
        curvature = self.preconditioner.curvature
        held = {n: e.average for n, e in curvature.estimates.items() if e.average is not None}
        outline, sums = taken_apart({name: one.sums() for name, one in held.items()})
        mixed = put_together(outline, self.gossip.mixed(sums))
        for name, total in mixed.items():
            part, present = curvature.parts[name], curvature.estimates[name]
            average = curvature.structure.united(part, total, [None], present.average)
            curvature.estimates[name] = replace(present, average=average)
        self.preconditioner.keep_update()

    def _natural(self, tracked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the natural gradients; of a stationary point on a manifold they vanish."""
        tracked = {name: self._tangent(name, value) for name, value in tracked.items()}
        for carefully in (False, True):
            natural, failed = self.preconditioner.natural_gradient(
                tracked, backpropagated=False, carefully=carefully
            )
            if not bool(failed):
                break
        return {name: self._tangent(name, natural[name]) for name in tracked}

    def _tangent(self, name: str, direction: Tensor) -> Tensor:
        manifold, point = self._manifolds.get(name), self.preconditioner.parameters[name]
        return direction if manifold is None else projected(manifold, point, direction)

    def _move(self, natural: Mapping[str, Tensor]) -> None:
        """Take the agent's own step."""
        grouped = self._grouped()
        for group in grouped.groups:
            rate, momentum = rate_of(group), group["momentum"]
            for p in grouped.members(group):
                name, state = self._names[p], self.state[p]
                step = natural[name].to(p.dtype)
                if momentum > 0:
                    old = state.get("momentum_buffer")
                    step = step if old is None else step + momentum * old
                    state["momentum_buffer"] = step
                p.mul_(1.0 - rate * group["weight_decay"]).sub_(step, alpha=rate)

    def _mix_weights(self) -> None:
        """Mix the weights with those of the neighbours."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        for p, value in zip(trained, self.gossip.mixed(trained), strict=True):
            manifold = self._manifolds.get(self._names[p])
            p.copy_(value if manifold is None else retracted(manifold, value))
