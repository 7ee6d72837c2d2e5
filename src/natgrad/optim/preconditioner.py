"""From gradients to natural gradients, by the curvature of the passes seen."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.arguments import check_damping, check_kind, check_parameters
from natgrad.capture import Capture
from natgrad.capture.blocks import find_blocks, names_by_reason
from natgrad.capture.hooks import forget_compiled, inside_backward, outside_graphs
from natgrad.capture.model_output import unwrap
from natgrad.curvature import Curvature, KroneckerFactors, Structure, as_structure
from natgrad.curvature.curvature import Estimate
from natgrad.distributed.replicas import Replicas
from natgrad.distributed.shards import (
    everyone_beside,
    is_sharded,
    left_whole,
    mesh_groups,
    sharded_like,
    whole,
)
from natgrad.fisher import FisherType, as_fisher_type
from natgrad.layouts import inner_product
from natgrad.likelihoods import LikelihoodLike, as_likelihood
from natgrad.operators import GradientSource
from natgrad.optim.audit import Trust
from natgrad.optim.checkpoints import CopiedByState
from natgrad.optim.fused.kronecker_gradients import FusedGradient
from natgrad.optim.fused.own_backward import OwnBackwards
from natgrad.optim.gradient_rows import GradientRows
from natgrad.optim.observer import ModelWatch, Observer
from natgrad.optim.options import Refresh
from natgrad.optim.step.measures import all_finite, on_host, scalar_checks
from natgrad.optim.zeroed_gradients import ZeroedGradients, as_check


class Preconditioner(CopiedByState):
    """Keeps a structure of the Fisher matrix up to date and turns gradients into natural ones.

    It watches the model through hooks (:class:`~natgrad.optim.observer.Observer`). A step is a
    transaction: what it changes of the curvature is taken back by reference if it is abandoned.

    Args:
        model: The model to watch.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        structure: A name in :data:`natgrad.curvature.STRUCTURES`, with its options for training, or
            a :class:`natgrad.curvature.Structure` with options of its own.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"``, ``"improved"`` or a
            :class:`natgrad.fisher.FisherType`.
        damping: λ, in the units of F.
        refresh: When curvature is updated, averaged and inverted. Structures that keep the rows of
            one batch take the default only.
        output: Picks the tensor the likelihood looks at out of the model's output.
        batch_dim: The dimension of that tensor, and of targets of as many dimensions, that holds
            the samples; by default the first, or the second where they turn out to lie there.
        seed: Seed of the sampled labels; the global random state is never used.
        excluded: Names of parameters that are left alone: no rows are formed for them.
        process_group: Processes that train replicas of the model, each on its share of the batch,
            with gradients averaged over them; by default those of a model in
            DistributedDataParallel, and no others. Curvature is that of the whole batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> preconditioner = natgrad.Preconditioner(model, structure="kfac", damping=1e-2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> cross_entropy(model(x), y).backward()
        >>> preconditioner.step()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodLike = "categorical",
        *,
        structure: str | Structure = "kfac",
        fisher: str | FisherType = "mc",
        damping: float = 1e-3,
        refresh: Refresh | None = None,
        output: Callable[[Any], Tensor] | None = None,
        batch_dim: int | None = None,
        seed: int = 0,
        excluded: Collection[str] = (),
        process_group: Any = None,
    ) -> None:
        check_damping(damping)
        refresh = Refresh() if refresh is None else refresh
        check_kind("refresh", refresh, Refresh)
        refresh = refresh.over(Refresh())
        structure = as_structure(structure, training=True)
        everywhere = refresh.sharing in ("inverses", "nothing", 1)
        if getattr(structure, "fused", False) and not everywhere:
            raise ValueError(
                "fused=True needs every inverse in the backward pass, and "
                f"Refresh(sharing={refresh.sharing!r}) leaves each with some processes: use "
                "sharing='inverses'"
            )
        if not structure.additive and not refresh.every_step:
            raise ValueError(
                f"structure {structure.name!r} keeps the rows of the present batch only, so it "
                "needs Refresh(factors=1, inverses=1, decay=0); 'kfac', 'unit_wise' and 'diagonal' "
                "can average over steps"
            )
        if refresh.stagger and structure.joint:
            raise ValueError(
                "stagger=True needs a structure made of independent layers, and "
                f"{structure.name!r} couples them"
            )
        likelihood, kind = as_likelihood(likelihood), as_fisher_type(fisher)
        self._mesh, self._everyone = mesh_groups(unwrap(model))
        _check_has_values(model)
        self.capture: Capture = Capture(
            model, likelihood.selection(output), excluded=excluded, batch_dim=batch_dim,
            shards=any(map(is_sharded, model.parameters())),
            sums_coupled=kind.independent and structure.additive and structure.by_layer,
            leaves_complex=True,
        )  # fmt: skip
        self.model: nn.Module = self.capture.model
        forget_compiled(self.model)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        layouts = {name: block.layout for name, block in self.capture.blocks.items()}
        self.curvature: Curvature = Curvature(structure, layouts, self.capture.layout)
        self.curvature.sharing = refresh.sharing
        self.curvature.rows_stay = structure.rows_stay
        self.excluded: frozenset[str] = frozenset(excluded)
        #: Parameters that are left alone, as their rows do not explain their gradients.
        self.trust: Trust = Trust(self.capture)
        self._saved: tuple[dict[str, Estimate], Tensor] | None = None
        self._with_update: dict[str, Estimate] | None = None
        self._updated = False  # Rows of the present step have been taken,
        self._joined = False  # and have become part of the average.
        #: Parameters whose gradients the user sets to zero entry by entry.
        self.zeroed = ZeroedGradients()
        self._warned = False
        self._sees = False  # Some step had a pass that was seen.
        #: When curvature is updated, averaged and inverted.
        self.refresh: Refresh = refresh
        #: λ, one value or one per block name.
        self.damping: float | dict[str, float] = damping
        self.observer: Observer = Observer(
            self.capture, likelihood, kind, refresh, self.curvature, seed
        )
        self.observer.before_change = self._open
        self.observer.forget_discarded = self._forget_discarded
        self.gradient_rows: GradientRows = GradientRows(self.observer)
        in_shards = self._mesh is not None and self._mesh is self._everyone
        self._in_pieces = self.capture.shards and not in_shards
        self._is_unit = hasattr(self.model, "unshard")
        #: Processes that have a share of every batch each, and take the same steps.
        self.replicas: Replicas
        self._share_with(Replicas.of(model, process_group or self._mesh))
        self.capture.on_forward = self._before_pass
        #: Called when the model has other parameters or blocks than before.
        self.on_change: Callable[[], None] = lambda: None
        #: Block name → what makes its natural gradient in the backward pass already.
        self.own_backward: OwnBackwards = OwnBackwards()
        try:
            self._plan_layers()
        except ValueError:
            self.capture.remove()  # Whoever holds the error holds the hooks.
            raise

    def _share_with(self, replicas: Replicas) -> None:
        if self._in_pieces and not replicas.are_alone:
            everyone = self._everyone or everyone_beside(self.model, replicas.group)
            replicas = Replicas(replicas.group, everyone=everyone)
        self.replicas = self.curvature.replicas = self.observer.replicas = replicas

    # Layers that come and go.

    def _before_pass(self) -> None:
        """Look at the model as a forward pass finds it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            real = ((n, p) for n, p in self.parameters.items() if not p.is_complex())
            check_parameters(dict([next(real)]), shards=True)
            replicas = self.replicas.found_around(self.model)
            if replicas is None:  # Nobody else makes this pass, and nobody averages its gradient.
                self.capture.recording = self.capture.watching = False
                return
            if replicas is not self.replicas:
                self._share_with(replicas)
            self.observer.last_pass = replicas.average_after(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            # Frozen as a whole, as a discriminator while the generator is trained: not its pass.
            self.capture.recording = self.capture.watching = False
            return
        if self.capture.shards:  # They lend other parameters for every pass.
            is_unit = hasattr(self.model, "unshard")
            if self.observer.model.sees_frozen() or is_unit is not self._is_unit:
                self.find_layers()
        elif self.observer.model.sees_change():
            self.find_layers()
        if self.observer.left_gradients and not inside_backward():
            if all(p.grad is None for p in self.parameters.values()):  # Reset by the model itself.
                self.discard()
        self.observer.begin_pass()
        if not self.capture.shards:
            self.zeroed.begin(self.parameters, self.capture.layout.offsets)

    def find_layers(self) -> None:
        """Take the model as it is now, with what is known of the layers that stay.

        Raises:
            ValueError: If it has no parameter left that a structure can cover, or is sharded.
        """
        present = left_whole(self.model)  # In a forward pass that has begun.
        self._is_unit = hasattr(self.model, "unshard")
        if any(hasattr(module, "unshard") for module in self.model.modules()):
            self._take_shards()
        self.parameters = dict(self.model.named_parameters())
        if self.capture.rescan(self.excluded | self.untrusted.keys()):
            layouts = {name: block.layout for name, block in self.capture.blocks.items()}
            staying = self.curvature.follow(layouts, self.capture.layout)
            if staying != set(self.curvature.parts):
                self.observer.start = self.observer.steps
            if self._saved is not None:
                before, random = self._saved
                kept = {
                    n: before[n] if n in staying & set(before) else Estimate()
                    for n in self.curvature.parts
                }
                self._saved = kept, random
            self.own_backward.remove()
            self._plan_layers()
        self.observer.model = ModelWatch(self.model)
        self.on_change()
        for unit in present:
            unit.unshard()

    def _take_shards(self) -> None:
        """Take shards that the model is in, perhaps since the optimizer was made."""
        mesh, self._everyone = mesh_groups(self.model)
        if mesh is not self._mesh:
            self.capture.shards, self._mesh = True, mesh
            self._in_pieces = mesh is not self._everyone
            self._share_with(Replicas.of(self.model, mesh))

    def _plan_layers(self) -> None:
        """Choose how each layer is preconditioned, and when."""
        structure, refresh = self.curvature.structure, self.refresh
        #: Names of the parameters that have rows.
        self.covered: set[str] = {n for b in self.curvature.blocks.values() for n in b.names}
        self.gradient_rows.find_layers()
        self._slots = self.curvature.staggered(refresh.inverses) if refresh.stagger else []
        if isinstance(structure, KroneckerFactors) and structure.fused:
            self._fuse(structure)
        self.gradient_rows.watch(self.own_backward)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.capture.layout.device

    @property
    def untrusted(self) -> dict[str, str]:
        """Parameter name → why its rows do not explain its gradient."""
        return self.trust.untrusted

    @property
    def keeps_shards(self) -> bool:
        """Whether gradients stay in shards, and are whole for the owners of layers alone."""
        coupled = self.curvature.structure.companion is not None or bool(self.own_backward)
        several = coupled or self._in_pieces
        return self.capture.shards and self.curvature.is_divided and not several

    # The step.

    def zeroed_flags(self) -> dict[str, Tensor]:
        """Return parameter name → 1.0 where entries of the gradient were set to zero.

        Where nothing is compared at this step there are none.
        """
        if self.capture.shards:
            return {}
        own = {name for one in self.own_backward.values() for name in one.names}
        names = [n for n in self.parameters if n in self.covered and n not in own]
        flags = self.zeroed.compared(self.parameters, names, self.replicas.are_alone)
        self.replicas.average(flags)
        return flags

    @outside_graphs
    def step(self) -> None:
        """Replace every covered ``.grad`` by its natural gradient.

        With a gradient that is not finite nothing is changed, curvature included.
        """
        new = self.audit()
        if new:
            warnings.warn(
                "Preconditioner leaves the plain gradients of these parameters: "
                f"{names_by_reason(new)}",
                stacklevel=2,
            )
        gradients = {
            name: p.grad if self.keeps_shards else whole(p.grad.to_dense())
            for name, p in self.parameters.items()
            if p.grad is not None and name in self.covered
        }
        flags = self.zeroed_flags()
        for carefully in (False, True):
            natural, failed = self.natural_gradient(gradients, carefully=carefully)
            if not self.curvature.is_divided:
                self.replicas.average(natural)
            natural = self.zeroed.held(natural, gradients, flags)
            checks = scalar_checks([*gradients.values(), *natural.values()])
            checks["failed"] = failed
            self.replicas.average(checks)
            found = on_host({**checks, **as_check(flags)})
            told = found.pop("zeroed", [])
            if not found.pop("failed"):
                break
        if not all_finite(found):
            self.skip()
            return
        self.zeroed.note(flags, told)
        for name, gradient in gradients.items():
            gradient.copy_(natural[name])
            parameter = self.parameters[name]  # Dense, also where it was sparse.
            parameter.grad = sharded_like(gradient, parameter)
        self.finish()

    def natural_gradient(
        self,
        gradients: dict[str, Tensor],
        *,
        backpropagated: bool = True,
        carefully: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Update and invert curvature if due, and precondition gradients.

        Nothing waits for the device: factorisations are taken to succeed and gradients to be what
        their rows sum to, and a flag on the device tells whether that was true. If it was not, the
        result means nothing, and the same call with ``carefully=True`` waits, retries and warns
        where needed. :meth:`finish` or :meth:`skip` must follow, depending on whether the result is
        used.

        Args:
            gradients: Parameter name → gradient. Missing ones count as zero.
            backpropagated: Whether they are what the backward pass left; other vectors are
                preconditioned as they are.
            carefully: Whether to wait for the outcome of every factorisation.

        Returns:
            Parameter name → natural gradient, for every covered parameter, and the flag.
        """
        complete = {
            name: gradients[name] if name in gradients else self._zeros_like(p)
            for name, p in self.parameters.items()
            if name in self.capture.layout.offsets
        }
        source = GradientSource(complete)
        with torch.no_grad():
            if carefully:
                self._repair()
                self._complete_source(source, backpropagated, by_rows=False)
                return self.curvature.natural_gradient(source), torch.tensor(0.0)
            with linalg.unawaited() as failures:
                self.update_curvature()
                self._invert()
                mismatches = self._complete_source(source, backpropagated, by_rows=True)
                natural = self.curvature.natural_gradient(source)
            return natural, _any([*self.observer.failures, *failures, *mismatches])

    def inner_product(self, natural: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        """Return ``⟨Δ, ∇L⟩``; estimated for layers whose ``.grad`` holds Δ already.

        Args:
            natural: Δ, parameter name → tensor; not empty.
            gradients: ``.grad`` of the same parameters.
        """
        if self.own_backward:
            return self.own_backward.inner_product(natural, gradients, self.replicas)
        return inner_product(natural, gradients)

    def _zeros_like(self, parameter: Tensor) -> Tensor:
        """Return the gradient of a parameter that has none."""
        if self.keeps_shards:
            return torch.zeros_like(parameter)
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)

    def update_curvature(self) -> None:
        """Let the rows of this step join the average; part of :meth:`natural_gradient`."""
        if self._updated:
            return
        self._updated = True
        self._open()
        self.observer.see_retained()
        self.observer.complete()
        if not self.observer.update_due:
            return
        self._joined = True
        if self.curvature.shared is not None:
            self.curvature.shared.own_reading = self.capture.sources.reading_data() or ()
        if self.observer.seen or not self.replicas.are_alone:
            self.curvature.join(self.refresh.decay)
            self._with_update = self.curvature.snapshot()
        else:
            self.warn_unseen()

    def keep_update(self) -> None:
        """Count what the averages are now as the update of this step."""
        if self._updated:
            self._with_update = self.curvature.snapshot()

    def pass_by(self) -> None:
        """Go on with this step without its rows."""
        self.skip()
        self._open()
        self._updated = True

    def audit(self) -> dict[str, str]:
        """Compare the gradients of the step with what the passes seen explain; mostly nothing.

        Parameters whose rows do not explain them, or that have none, are untrusted from now on.

        Returns:
            Those of them that had rows until now, which they lose, with the reasons.
        """
        reasons = self.blocks_without_rows()
        if reasons:
            self.trust.without_rows(reasons, self.covered)
        if self.observer.audit.active:
            found = self.observer.findings(self.own_backward.held)
            self.trust.without_explanation(found, self.covered)
        if not self.replicas.are_alone and self.observer.rows_due:
            self.trust.unite(self.replicas, self.device)
        untrusted = self.trust.untrusted.items()
        new = {n: why for n, why in untrusted if n not in self.capture.excluded}
        if new:
            self.find_layers()
        return new

    def blocks_without_rows(self) -> dict[str, str]:
        """Return block name → why the Fisher type has no rows for it."""
        sources = self.capture.sources
        if not self.observer.fisher.from_user_gradients:
            return sources.unavailable
        hints = {n: f"{why}: use fisher='exact' or 'mc'" for n, why in sources.inseparable.items()}
        return {**hints, **sources.unavailable}

    def drop_unusable(self) -> None:
        """Leave out statistics of this step that are not finite, waiting to see."""
        if self._saved is not None:
            self.curvature.restore_unusable(self._saved[0])

    def _invert(self) -> None:
        """Factorise what is due at this step, and let the other inverses follow an update."""
        step, interval = self.observer.steps - self.observer.start, self.refresh.inverses
        due: Collection[str] = ()
        if self._slots and step >= interval and not self.observer.renews:
            due = self._slots[step % interval]
        elif self.inverts:
            due = self.curvature.parts
        # Parts that are new, or back, are not left without an inverse until it is their turn.
        ready = {n for n, one in self.curvature.estimates.items() if one.average is not None}
        fresh = {n for n in ready - set(due) if self.curvature.estimates[n].inverse is None}
        follows = self._with_update is not None and self.curvature.structure.follows_updates
        if due or fresh or follows:
            reading = self.capture.sources.reading_data()
            if self.curvature.shared is not None:
                reading = self.curvature.shared.reading_data
            if reading is not None:  # A run that goes on may invert before it has seen rows.
                self.curvature.reads_data = reading
        if due or fresh:
            self.curvature.refresh(self.damping, [*due, *sorted(fresh)])
        if follows:
            self.curvature.follow_update(due)

    def _repair(self) -> None:
        """Leave out statistics that are not finite, and factorise again, waiting for it."""
        assert self._saved is not None
        self.curvature.rollback(self._with_update or self._saved[0])
        self.drop_unusable()
        self._invert()

    def _complete_source(
        self, source: GradientSource, backpropagated: bool, by_rows: bool
    ) -> list[Tensor]:
        """Say how a gradient came about; return flags for rows that do not sum to it."""
        if not backpropagated:
            return []
        mismatches: list[Tensor] = []
        if self.gradient_rows.layers and by_rows:
            source.rows, mismatches = self.gradient_rows.of_step(source.gradients)
        elif self.gradient_rows.layers:
            self.gradient_rows.rest()
        if self._joined and not self.curvature.additive:
            source.coordinates = self.observer.coordinates()
        if self.own_backward:
            source.natural = set(self.own_backward.active)
        return mismatches

    @property
    def inverts(self) -> bool:
        """Whether this step factorises all parts anew."""
        return self.observer.is_turn(self.refresh.inverses)

    def mean_eigenvalue(self) -> Tensor:
        """Return ``tr F/P`` with the rows of this step; NaN if it has none."""
        try:
            with linalg.unawaited():
                self.update_curvature()
                value = self.curvature.mean_eigenvalue()
        except linalg.FactorizationError:  # It comes again where the same is inverted.
            value = torch.full(
                (), torch.nan, dtype=torch.float64, device=self.curvature.layout.device
            )
        self.replicas.average({"mean_eigenvalue": value})
        return value

    def _open(self) -> None:
        """Begin the transaction, before anything changes."""
        if self._saved is None:
            self._saved = self.curvature.snapshot(), self.observer.generator.get_state()

    def finish(self) -> None:
        """End the step: keep what it did to the curvature, and count it."""
        self._close()
        self.observer.finish()

    def skip(self) -> None:
        """Abandon the step: take back what it did to the curvature."""
        if self._saved is not None:
            self.curvature.rollback(self._saved[0])
            self.observer.generator.set_state(self._saved[1])
        self._close()
        self.zeroed.due = True  # What was found is not noted.
        self.observer.forget()

    def discard(self) -> None:
        """Let gradients so far be reset: their passes are forgotten as soon as others come.

        If none come before the step, ``.grad`` is made of what they returned. Forward passes stay,
        as another loss may go back through them.
        """
        self.zeroed.reset()
        for one in self.own_backward.values():
            one.reset()
        seen = self.observer.seen
        if seen and all(one.recorded.cotangent is not None for one in seen):
            self.observer.discarded = True

    def _forget_discarded(self) -> None:
        """Take back what passes did whose gradients were reset."""
        passes = list(self.capture.passes)
        for one in self.observer.seen:
            one.recorded.dropped = one.cotangent
        self.skip()
        self.capture.passes.extend(passes)

    def _close(self) -> None:
        self._saved, self._with_update = None, None
        self._updated = self._joined = False
        for one in self.own_backward.values():
            one.reset()

    # What users may tell.

    def update_fisher(self, output: Any, target: Any = None) -> None:
        """Update curvature from a model output, before ``loss.backward()``.

        Needed only where the hooks cannot find the output, or where targets must be known (label
        smoothing together with class weights). Does nothing on steps without an update.

        Args:
            output: What the likelihood looks at, with its graph.
            target: The true target; gives ignored events and class weights.
        """
        self.observer.update_fisher(output, target)

    def loss(self, criterion: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """Return ``criterion(output, target)`` and update curvature with the true target.

        The weights or mask that the criterion multiplies by are seen in its gradient.
        """
        loss = criterion(output, target)
        self.observer.update_fisher(output, target, loss)
        return loss

    @property
    def is_blind(self) -> bool:
        """Whether there is no curvature so far, and no pass of this step shows any."""
        if not self._sees:  # Which all processes know alike, but not who keeps curvature.
            known = self.observer.knows_curvature
            if not known:
                self.observer.see_retained()
            self._sees = self.replicas.any(known or bool(self.observer.seen), self.device)
        return not self._sees

    def warn_unseen(self, meanwhile: str = "") -> None:
        """Say once that no pass was seen, though there are gradients.

        Args:
            meanwhile: What is done until one is.
        """
        if not self._warned and any(p.grad is not None for p in self.parameters.values()):
            self._warned = True
            warnings.warn(
                "natgrad saw no backward pass through the model's output, so its curvature was "
                f"not updated{meanwhile}: call the model itself (not its parts), pass "
                "output=lambda out: ... if the output is not the first tensor, or call "
                "update_fisher(output) before loss.backward() (natgrad.ResidualNGD is there for "
                "losses of derivatives of the network; a model that has run inside of a compiled "
                "function before the optimizer was made needs torch.compiler.reset() in between)",
                stacklevel=5,
            )

    # Layers that make their natural gradient themselves.

    def _fuse(self, structure: KroneckerFactors) -> None:
        """Let plain linear layers make their natural gradient in the backward pass."""
        for name, module in list(self.gradient_rows.layers.items()):
            if type(module) is nn.Linear:
                layout = self.curvature.blocks[name]
                inverse = functools.partial(self._inverse_of, name)
                self.own_backward[name] = FusedGradient(
                    module, layout, functools.partial(structure.takes_rows, layout), inverse
                )
                del self.gradient_rows.layers[name]

    def _inverse_of(self, name: str) -> Any:
        return self.curvature.estimates[name].inverse

    def measure_isotropy(self) -> tuple[float, float] | None:
        """Return α of the present curvature and its estimated deviation from isotropy.

        Call it after :meth:`natural_gradient`, with ``observer.isotropy_probe`` set before the
        passes of the step. None if no pass was seen.
        """
        probe = self.observer.isotropy_probe
        if probe is None:
            return None
        present = self.curvature.snapshot()  # Warm starts belong to the user's gradients.
        with torch.no_grad():
            probe.unite(self.replicas, self.device)
            found = probe.measure(
                lambda gradients: self.curvature.natural_gradient(GradientSource(gradients))
            )
        self.curvature.rollback(present)
        return found

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return curvature, step counter and the state of the generator."""
        self.observer.begin_anew()
        return {
            "version": 3,
            "structure": self.curvature.structure.name,
            "steps": self.observer.steps,
            "start": self.observer.start,
            "renews": self.observer.renews,
            "warmup": self.observer.warmup,
            "generator": self.observer.generator.get_state(),
            "likelihood": self.observer.likelihood.decision,
            "curvature": self.curvature.state_dict(),
            "resting": self.curvature.resting_state(),
            "untrusted": dict(self.untrusted),
            "zeroed": sorted(self.zeroed.names),
            "reads_data": sorted(self.curvature.reads_data) if self.observer.steps else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, in the types this preconditioner works in.

        Raises:
            ValueError: If it belongs to another structure or other layers; nothing is changed.
        """
        self.checked(state)()

    def checked(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Return what restores a state of :meth:`state_dict`, which is read but not taken yet.

        Raises:
            ValueError: If it belongs to another structure or other layers.
        """
        if state.get("version") != 3:
            raise ValueError(f"unknown version {state.get('version')!r} of a natgrad checkpoint")
        own = self.curvature.structure.name
        if state["structure"] != own:
            raise ValueError(
                f"the checkpoint holds structure {state['structure']!r}, but this one is {own!r}"
            )
        curvature, observer = self.curvature, self.observer
        untrusted, resting = dict(state.get("untrusted", {})), dict(state.get("resting", {}))
        if untrusted.keys() != self.untrusted.keys():
            blocks, _ = find_blocks(self.model, self.excluded | untrusted.keys())
            layouts = {name: block.layout for name, block in blocks.items()}
            curvature = Curvature(curvature.structure, layouts, self.capture.layout)
        estimates = curvature.restored(state["curvature"])
        likelihood = observer.given.decided(state.get("likelihood"))
        steps, warmup, random = state["steps"], state["warmup"], state["generator"].cpu()
        start, reading = state.get("start", 0), state.get("reads_data", ())
        renews = state.get("renews", False)
        known = any(entry["average"] is not None for entry in state["curvature"].values())
        zeroed = state.get("zeroed", ())

        def restore() -> None:
            self.trust.untrusted = untrusted
            self.zeroed.drop()
            self.zeroed = ZeroedGradients()
            self.zeroed.names.update(zeroed)
            if curvature is not self.curvature:
                self.find_layers()
            self.curvature.estimates, self.curvature.resting = estimates, resting
            self.curvature.reads_data = reading
            observer.steps, observer.warmup, observer.likelihood = steps, warmup, likelihood
            observer.start, observer.renews = start, renews
            observer.known_together = known
            # Generators of other kinds of devices have states of another size, and other numbers.
            if random.shape == observer.generator.get_state().shape:
                observer.generator.set_state(random)
            self._close()
            observer.forget()

        return restore


def _check_has_values(model: nn.Module) -> None:
    """Refuse parameters without values.

    Raises:
        ValueError: If one is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, without values: initialise or load the "
                "model first, and then hand it over"
            )


def _any(flags: list[Tensor]) -> Tensor:
    """Return 1 if any of some scalar flags is up, else 0, on their device."""
    if not flags:
        return torch.tensor(0.0)
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), flags[0].device)
    return torch.stack([flag.to(device) for flag in flags]).any().to(torch.float32)
