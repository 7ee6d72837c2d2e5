"""From backward passes to natural gradients: when curvature is updated, refreshed and applied."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, ForwardPass
from natgrad.curvature import GradientSource, make_structure
from natgrad.curvature.base import RowReceiver, inner_product
from natgrad.curvature.partitioned import PartitionedFisher
from natgrad.fisher import FisherType, as_fisher_type, update_from_output
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.likelihoods import Likelihood, as_likelihood
from natgrad.optim.copying import CopiedByState
from natgrad.optim.fused_gradients import FusedGradient
from natgrad.optim.isotropic_rate import IsotropyProbe
from natgrad.optim.own_backward import OwnBackward
from natgrad.optim.quadratic_model import BatchFisher

__all__ = ["Preconditioner"]


class Preconditioner(CopiedByState):
    """Keeps a structure of the Fisher matrix up to date and turns gradients into natural ones.

    It watches the model through hooks. When the user's backward pass reaches the model's output
    and an update is due, the Fisher's vectors are pulled back through the same graph to the
    layers' outputs: no second forward pass, no parameter ``.grad`` touched. Ignored tokens and
    class weights are read off the gradient that arrives at the output.

    Args:
        model: The model to watch.
        structure: ``"full"``, ``"block_diagonal"``, ``"block_tridiagonal"``, ``"unit_wise"``,
            ``"diagonal"``, ``"kfac"``, ``"ekfac"``, ``"tkfac"``, ``"tekfac"``, ``"kpsvd"``,
            ``"two_level"``, ``"singd"``, ``"conjugate_gradient"`` or ``"thermodynamic"``.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        damping: λ, in the units of F.
        factor_interval: Steps between updates of the curvature.
        inverse_interval: Steps between factorisations.
        ema_decay: Decay of the exponential moving average over updates; 0 keeps the last batch
            alone. Structures that keep the rows of one batch (full, block_diagonal,
            block_tridiagonal) take 0 only, and intervals of 1.
        output: Picks the tensor the likelihood looks at out of the model's output.
        seed: Seed of the sampled labels.
        fused: Let the backward pass of linear layers with fewer rows than units make their natural
            gradient itself, which saves the plain weight-gradient product. Their ``.grad`` then
            *is* the natural gradient, by the inverses of the last step: gradient clipping bounds
            that, and second derivatives through these layers are not available. For ``"kfac"``
            with ``damping_rule="pi"``.
        stagger: Spread factorisations evenly over the steps of ``inverse_interval`` instead of
            factorising every layer at once, for structures made of independent layers.
        early_updates: Update and factorise also at steps 1, 2, 4, 8, … of the first interval, while
            the network changes fastest and the average holds little.
        **structure_options: Options of the structure.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> preconditioner = natgrad.Preconditioner(model, structure="kfac", damping=1e-2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss.backward(); preconditioner.step(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str = "kfac",
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        fisher: str | FisherType = "mc",
        mc_samples: int = 1,
        damping: float = 1e-3,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        ema_decay: float = 0.0,
        output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        fused: bool = False,
        stagger: bool = False,
        early_updates: bool = False,
        **structure_options: Any,
    ) -> None:
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be a finite number >= 0, got {damping}")
        if factor_interval < 1 or inverse_interval < 1:
            raise ValueError(
                "factor_interval and inverse_interval must be at least 1, got "
                f"{factor_interval} and {inverse_interval}"
            )
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        self.capture = Capture(model, output)
        self.model = self.capture.model
        self.likelihood = as_likelihood(likelihood)
        self.fisher = as_fisher_type(fisher, mc_samples)
        self.damping: float | Mapping[str, float] = damping
        self.factor_interval = factor_interval
        self.inverse_interval = inverse_interval
        self.early_updates = early_updates
        self.ema_decay = ema_decay
        self.structure = make_structure(
            structure, self.capture.blocks, self.capture.layout, training=True, **structure_options
        )
        if not self.structure.additive and (
            ema_decay > 0 or factor_interval > 1 or inverse_interval > 1
        ):
            raise ValueError(
                f"structure {structure!r} keeps the rows of the present batch only, so it needs "
                "ema_decay=0, factor_interval=1 and inverse_interval=1; 'kfac', 'unit_wise' and "
                "'diagonal' can average over steps"
            )
        device = self.capture.layout.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.parameters = dict(self.model.named_parameters())
        self.steps = 0
        self.capture.on_forward = self._on_forward
        self.capture.on_backward = self._on_backward
        self._saved: tuple[dict[str, Any], Tensor] | None = None
        self._updated = False
        self._finished: list[ForwardPass] = []
        self._row_candidates = self._find_row_candidates()
        #: Block name → what makes its natural gradient in the backward pass already.
        self.own_backward: dict[str, OwnBackward] = {}
        if fused:
            self._fuse()
        self._turns: list[list[str]] = []
        if stagger:
            if not isinstance(self.structure, PartitionedFisher):
                raise ValueError(
                    f"stagger=True needs a structure made of independent layers, and {structure!r} "
                    "couples them"
                )
            self._turns = self.structure.staggered(inverse_interval)
        self._warned = False
        #: Set while the learning rate 1/α is still to be measured.
        self.isotropy_probe: IsotropyProbe | None = None
        #: Says at which steps curvature is updated; None for every ``factor_interval`` steps.
        self.schedule: Callable[[int], bool] | None = None
        #: Steps still to come that update the curvature only.
        self.warmup = 0
        #: The rows of the batch itself are kept on every so many steps; 0 for never.
        self.batch_fisher_interval = 0
        #: The Fisher matrix of the present step's batch, where its rows are kept.
        self.batch_fisher: BatchFisher | None = None

    # Observing.

    def _update_due(self) -> bool:
        if self.schedule is not None and self.warmup == 0:
            return self.schedule(self.steps)
        return self.warmup > 0 or self._is_turn(self.factor_interval)

    def _is_turn(self, interval: int) -> bool:
        """Return whether something done at an interval is due at this step."""
        early = self.early_updates and self.steps < interval
        return self.steps % interval == 0 or (early and self.steps & (self.steps - 1) == 0)

    @property
    def keeps_batch_fisher(self) -> bool:
        """Whether this step keeps the rows of its batch."""
        interval = self.batch_fisher_interval
        return self.warmup == 0 and interval > 0 and (self.steps + 1) % interval == 0

    @property
    def saw_pass(self) -> bool:
        """Whether a backward pass reached the model's output in this step."""
        return bool(self._finished)

    def _rows_due(self) -> bool:
        return self._update_due() or self.keeps_batch_fisher

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing of the passes inside."""
        capture = self.capture
        kept = capture.on_forward, capture.recording, capture.watching
        capture.on_forward, capture.recording, capture.watching = None, False, False
        try:
            yield
        finally:
            capture.on_forward, capture.recording, capture.watching = kept

    def _on_forward(self) -> None:
        due = self._rows_due()
        own = self.fisher.from_user_gradients
        self.capture.recording = (due and not own) or self.isotropy_probe is not None
        if due and own:
            self.capture.watching = True
        else:
            self.capture.watching = frozenset(self._row_candidates.values()) or False

    def _on_backward(self, recorded: ForwardPass) -> None:
        """Update curvature at the start of the user's backward pass."""
        if recorded not in self._finished:
            self._finished.append(recorded)
            recorded_edges = any(call.edges for call in recorded.calls)
            if self.isotropy_probe is not None and recorded_edges:
                self._probe_isotropy(self.isotropy_probe, recorded)
            if self._rows_due() and recorded_edges and not self.fisher.from_user_gradients:
                self._pull_back(recorded)

    def _open_transaction(self) -> None:
        if self._saved is None:
            self._saved = self.structure.snapshot(), self.generator.get_state()

    def _begin_update(self) -> None:
        """Discount older curvature before the first update of a step."""
        if not self._updated:
            self._open_transaction()
            self.structure.discount(self.ema_decay)
            self._updated = True

    def _receiver(self) -> RowReceiver:
        """Return what takes the rows of a pass of this step, ready for them."""
        self._open_transaction()
        if self._update_due():
            self._begin_update()
        if not self.keeps_batch_fisher:
            return self.structure
        if self.batch_fisher is None:
            self.batch_fisher = BatchFisher(self.capture.layout)
        return self.batch_fisher.along(self.structure if self._update_due() else None)

    def _weigh(self, recorded: ForwardPass) -> tuple[Tensor, Tensor, Tensor]:
        """Return event weights, their count and the scale of the user's loss."""
        assert recorded.output is not None
        output, cotangent, target = recorded.output.detach(), recorded.cotangent, recorded.target
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            if cotangent is None:
                weights = self.likelihood.event_weights(output, target)
                return (
                    weights,
                    self.likelihood.count(output, target),
                    torch.ones_like(weights[0, 0]),
                )
            weights, scale = self.likelihood.infer_event_weights(output, cotangent, target)
            if target is not None:
                return weights, self.likelihood.count(output, target), scale
            # Without a target the count of all events, less those that are ignored.
            share = weights.sum() / weights.numel()
            return weights, self.likelihood.count(output) * share, scale

    def _pull_back(self, recorded: ForwardPass) -> None:
        weights, count, _ = self._weigh(recorded)
        if float(count) == 0:
            return
        assert recorded.output is not None
        update_from_output(
            self._receiver(),
            self.capture,
            self.likelihood,
            self.fisher,
            recorded.output,
            weights,
            count,
            generator=self.generator,
            target=recorded.target,
            cotangent=recorded.cotangent,
        )

    def _probe_isotropy(self, probe: IsotropyProbe, recorded: ForwardPass) -> None:
        weights, count, _ = self._weigh(recorded)
        if float(count) > 0:
            assert recorded.output is not None
            probe.observe(self.capture, self.likelihood, recorded.output, weights, float(count))

    def measure_isotropy(self) -> tuple[float, float] | None:
        """Return α of the present curvature and its estimated deviation from isotropy.

        Call it after :meth:`natural_gradient`, with ``isotropy_probe`` set before the passes of
        the step. None if no pass was seen.
        """
        if self.isotropy_probe is None:
            return None
        present = self.structure.snapshot()  # Warm starts belong to the user's gradients.
        with torch.no_grad():
            found = self.isotropy_probe.measure(
                lambda gradients: self.structure.precondition(GradientSource(gradients))
            )
        self.structure.rollback(present)
        return found

    def update_fisher(self, output: Tensor, target: Tensor | None = None) -> None:
        """Update curvature from a model output, before ``loss.backward()``.

        Needed only where the hooks cannot find the output, or where targets must be known (label
        smoothing together with class weights). Does nothing on steps without an update.

        Args:
            output: What the likelihood looks at, with its graph.
            target: The true target; gives ignored events and class weights.
        """
        if not self._rows_due() or self.capture.on_forward is None:
            return
        found = self.capture.find_pass(output)
        found.output, found.target = output, target
        if found not in self._finished:
            self._finished.append(found)
            if self.isotropy_probe is not None:
                self._probe_isotropy(self.isotropy_probe, found)
        if self.fisher.from_user_gradients:
            output.register_hook(_keep_cotangent(found))
        else:
            self._pull_back(found)

    def loss(
        self, criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor
    ) -> Tensor:
        """Return ``criterion(output, target)`` and update curvature with the true target."""
        self.update_fisher(output, target)
        return criterion(output, target)

    # Applying.

    def step(self) -> None:
        """Replace every covered ``.grad`` by its natural gradient.

        With a gradient that is not finite nothing is changed, curvature included.
        """
        gradients = {
            name: p.grad
            for name, p in self.parameters.items()
            if p.grad is not None and name not in self.capture.uncovered
        }
        if not gradients_are_finite(gradients.values()):
            self.skip()
            return
        natural = self.natural_gradient(gradients)
        if not gradients_are_finite(natural.values()):
            self.skip()
            return
        for name, gradient in gradients.items():
            gradient.copy_(natural[name])
        self.finish()

    def natural_gradient(
        self, gradients: dict[str, Tensor], *, backpropagated: bool = True
    ) -> dict[str, Tensor]:
        """Refresh curvature if due and precondition gradients.

        :meth:`finish` or :meth:`skip` must follow, depending on whether the result is used.

        Args:
            gradients: Parameter name → gradient. Missing ones count as zero.
            backpropagated: Whether they are what the backward pass left; other vectors are
                preconditioned as they are.

        Returns:
            Parameter name → natural gradient, for every covered parameter.
        """
        with torch.no_grad():
            self.update_curvature()
            self._refresh()
            complete = {
                name: gradients[name] if name in gradients else torch.zeros_like(p)
                for name, p in self.parameters.items()
                if name in self.capture.layout.offsets
            }
            source = GradientSource(complete)
            if backpropagated:
                source.rows, source.coordinates = self._rows(complete), self._coordinates()
                source.natural = {name for name, one in self.own_backward.items() if one.active}
            return self.structure.precondition(source)

    def _refresh(self) -> None:
        """Factorise what is due at this step."""
        if self._turns and self.steps >= self.inverse_interval:
            assert isinstance(self.structure, PartitionedFisher)
            self.structure.refresh(self.damping, self._turns[self.steps % self.inverse_interval])
        elif self._is_turn(self.inverse_interval):
            self.structure.refresh(self.damping)

    def inner_product(self, natural: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        """Return ``⟨Δ, ∇L⟩``; estimated for layers whose ``.grad`` holds Δ already."""
        own = [one for one in self.own_backward.values() if one.active]
        held = {name for one in own for name in one.names}
        rest = {name: value for name, value in natural.items() if name not in held}
        terms = [one.inner_product(natural) for one in own]
        if rest:
            terms.append(inner_product(rest, gradients))
        return torch.stack(terms).sum()

    def update_curvature(self) -> None:
        """Update curvature if due, without factorising it; part of :meth:`natural_gradient`."""
        with torch.no_grad():
            self._open_transaction()
            if self._rows_due():
                self._update_from_user_gradients()
            if self._update_due() and not self._updated and not self._finished:
                self._warn_unseen()

    def finish(self) -> None:
        """End the step: keep the updates of curvature and count it.

        Steps of the warm-up are not counted, so that the first one after it updates and factorises
        whatever the intervals.
        """
        if self.warmup > 0:
            self.warmup -= 1
        else:
            self.steps += 1
        self._close()

    def skip(self) -> None:
        """Abandon the step: take back this step's updates of curvature."""
        if self._saved is not None:
            self.structure.rollback(self._saved[0])
            self.generator.set_state(self._saved[1])
        self._close()

    def discard(self) -> None:
        """Forget backward passes that no step followed; forward passes still waiting stay."""
        for own in self.own_backward.values():
            own.reset()
        if not self._finished or any(p.cotangent is None for p in self._finished):
            return
        waiting = [p for p in self.capture.passes if p not in self._finished]
        self.skip()
        self.capture.passes.extend(waiting)

    def _close(self) -> None:
        if self.isotropy_probe is not None:
            self.isotropy_probe.clear()
        self._saved = None
        self._updated = False
        self._finished = []
        self.batch_fisher = None
        for own in self.own_backward.values():
            own.reset()
        self.capture.clear()

    def _update_from_user_gradients(self) -> None:
        if not self.fisher.from_user_gradients:
            return
        for recorded in self._finished:
            if recorded.cotangent is None or recorded.output is None:
                continue
            weights, count, scale = self._weigh(recorded)
            if float(count) == 0:
                continue
            silent = bool((weights == 0).any())
            jacobians = self.capture.user_jacobians(recorded, 1.0 / scale, silent)
            self._receiver().update(jacobians, count)

    def _coordinates(self) -> Tensor | None:
        """Return ``u`` with ``∇L = Jᵀu`` where the passes of this step made rows and gradient."""
        if not self._updated or self.structure.additive:
            return None
        found: list[Tensor] = []
        for recorded in self._finished:
            if recorded.output is None or recorded.cotangent is None:
                return None
            output = recorded.output.detach()
            weights, count, scale = self._weigh(recorded)
            if float(count) == 0:
                continue
            if self.fisher.from_user_gradients:
                found.append(scale.expand(output.shape[0], 1))
                continue
            coordinates = self.fisher.coordinates(
                self.likelihood, output, recorded.cotangent, weights
            )
            if coordinates is None:
                return None
            found.append(coordinates)
        return torch.cat(found) if found else None

    def _fuse(self) -> None:
        """Let plain linear layers make their natural gradient in the backward pass.

        Raises:
            ValueError: If the structure is not K-FAC with factored damping.
        """
        parts = getattr(self.structure, "parts", {})
        if self.structure.structure != "kfac" or any(
            p.damping_rule != "pi" for p in parts.values()
        ):
            raise ValueError(
                "fused=True needs structure 'kfac' with damping_rule='pi', whose inverses are "
                f"products of two matrices; got {self.structure.structure!r}"
            )
        for name, module in list(self._row_candidates.items()):
            if type(module) is nn.Linear:
                self.own_backward[name] = FusedGradient(module, parts[name])
                del self._row_candidates[name]

    def unfuse(self, names: Set[str]) -> None:
        """Let the layers of the named parameters make plain gradients."""
        for name, own in list(self.own_backward.items()):
            if not names.isdisjoint(own.names):
                own.remove()
                del self.own_backward[name]

    def _find_row_candidates(self) -> dict[str, nn.Module]:
        """Return the layers whose rows may be cheaper to precondition than their gradient."""
        result: dict[str, nn.Module] = {}
        parts = getattr(self.structure, "parts", {})
        for name, part in parts.items():
            uses = self.capture.blocks[name].uses if name in self.capture.blocks else ()
            if part.rows_are_cheaper(8) and len(uses) == 1:
                result[name] = uses[0].module
        return result

    def _rows(self, gradients: dict[str, Tensor]) -> Mapping[str, LayerJacobian] | None:
        """Return rows of the present gradient where they reproduce it and are cheaper.

        Whether ``.grad`` is (a multiple of) ``δᵀa`` is checked with a random vector, so penalties
        in the loss, gradient hooks, accumulation over batches or averaging over replicas are never
        lost: such layers take the route through the gradient.
        """
        if not self._row_candidates or len(self._finished) != 1:
            return None
        recorded = self._finished[0]
        jacobians = self.capture.user_jacobians(recorded)
        checked: list[tuple[str, LinearJacobian, Tensor]] = []
        for name in list(self._row_candidates):
            part = getattr(self.structure, "parts", {})[name]
            rows = jacobians.get(name)
            if not isinstance(rows, LinearJacobian):
                continue
            if not part.rows_are_cheaper(rows.samples * rows.positions):
                del self._row_candidates[name]  # Batches are larger than the layer.
                continue
            checked.append((name, rows, _compare(rows, gradients)))
        if not checked:
            return None
        shares = torch.stack([result for *_, result in checked]).tolist()
        kept: dict[str, LayerJacobian] = {}
        for (name, rows, _), (share, error) in zip(checked, shares, strict=True):
            if error <= ROW_TOLERANCE:
                if abs(share - 1.0) > ROW_TOLERANCE:
                    rows.output_gradients = rows.output_gradients * share
                kept[name] = rows
        return kept

    def _warn_unseen(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "natgrad saw no backward pass through the model's output, so its curvature was "
                "not updated: call the model itself (not its parts), pass output=lambda out: ... "
                "if the output is not the first tensor, or call update_fisher(output) before "
                "loss.backward()",
                stacklevel=4,
            )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return curvature, step counter and the state of the generator."""
        return {
            "version": 1,
            "structure": self.structure.structure,
            "steps": self.steps,
            "warmup": self.warmup,
            "generator": self.generator.get_state(),
            "curvature": self.structure.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: If it belongs to another structure or other layers.
        """
        if state.get("version") != 1:
            raise ValueError(f"unknown version {state.get('version')!r} of a natgrad checkpoint")
        if state["structure"] != self.structure.structure:
            raise ValueError(
                f"the checkpoint holds structure {state['structure']!r}, but this one is "
                f"{self.structure.structure!r}"
            )
        self.steps = state["steps"]
        self.warmup = state.get("warmup", 0)
        self.generator.set_state(state["generator"].cpu())
        self.structure.load_state_dict(state["curvature"], self.capture.layout.device)
        self._close()


#: Largest relative difference between ``.grad`` and ``δᵀa`` that counts as rounding.
ROW_TOLERANCE = 2e-5


@functools.lru_cache(maxsize=64)
def _probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed random vector."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator, dtype=dtype).to(device)


def _compare(rows: LinearJacobian, gradients: dict[str, Tensor]) -> Tensor:
    """Return ``(c, e)``: the best scalar with ``.grad ≈ c·δᵀa`` and the relative error left."""
    layout = rows.layout
    weight = gradients[layout.names[0]].reshape(layout.d_out, layout.d_in)
    inputs = rows.inputs.flatten(0, 2)
    delta = rows.output_gradients.flatten(0, 3)
    probe = _probe(layout.d_in, inputs.dtype, inputs.device)
    expected = delta.T @ (inputs @ probe)
    found = weight.to(inputs.dtype) @ probe
    if layout.has_bias:
        expected = expected + rows.bias_value * delta.sum(0)
        found = found + gradients[layout.names[1]]
    norm = expected.square().sum()
    share = (found * expected).sum() / norm
    error = (found - share * expected).norm() / found.norm()
    return torch.stack([share, error])


def _keep_cotangent(recorded: ForwardPass) -> Callable[[Tensor], None]:
    def keep(cotangent: Tensor) -> None:
        recorded.cotangent = cotangent.detach()

    return keep


def gradients_are_finite(gradients: Any) -> bool:
    """Return whether every gradient is finite; synchronises with the device once."""
    values = list(gradients)
    if not values:
        return True
    # A sum is finite only if every entry is, but for overflow, and costs one pass.
    sums = torch.stack([v.sum(dtype=torch.float32).to(values[0].device) for v in values])
    return bool(torch.isfinite(sums).all())
