"""The estimate of a Fisher matrix over batches: statistics, their average, and inverses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.sharing import SharedWork, Sharing, SummedRows
from natgrad.curvature.structure import Part, Structure
from natgrad.distributed import Replicas
from natgrad.distributed.replicas import WHOLE_BATCH, Place
from natgrad.jacobians import Draw, Jacobians, LinearJacobian
from natgrad.jacobians.collection import in_type
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.linalg import FactorizationError
from natgrad.operators import FisherMatrix, GradientSource, Operator
from natgrad.operators.block_diagonal import damping_of, inverses_together
from natgrad.records import Record
from natgrad.statistics import Statistics

Damping = float | Mapping[str, float]

#: Factorisations of up to so many parameters together are batched; larger ones go part by part, so
#: that no more than one is in the making at a time.
BATCHED_PARAMETERS = 2**15

#: Weight that an average keeps however long its part has been away, and that from which on its
#: inverse stays in use when the part is back.
LEAST_WEIGHT, LEAST_WEIGHT_IN_USE = 1e-6, 0.5


@dataclass(frozen=True)
class PositionsMean:
    """How many positions of samples batches have rows of, on average.

    Attributes:
        total: Their sum, decayed.
        batches: That of the batches.
    """

    total: Tensor | float = 0.0
    batches: float = 0.0

    def followed_by(self, positions: Tensor | float, decay: float) -> PositionsMean:
        """Return the mean with another batch."""
        return PositionsMean(self.total * decay + positions, self.batches * decay + 1.0)

    def value(self) -> Tensor:
        """Return the mean, at least 1."""
        mean = self.total / max(self.batches, 1e-300)
        return torch.as_tensor(mean, dtype=torch.float64).clamp(min=1.0)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of one part.

    Attributes:
        average: Statistics of all batches so far, decayed.
        batch: Statistics of the present step, not yet part of the average.
        inverse: The last inverse.
        damping: Damping of the last inverse.
        draws: Updates so far.
        missed: Count of the samples of the present step whose pass had no rows of the part.
        absent: Count of batches of a sum in which the part had no rows.
        summed: Rows of the present step that are sums over the samples of this process, to be
            those of all.
        passes: How many passes of the step there were.
        rejected: Whether rows of the present step were left out, as not finite.
        positions: How many positions of samples the present step has rows of, in all.
        samples: How many samples that are.
        silent: Further samples of its passes, none of which counts in this process.
        mean_positions: The average of that, over the batches of the average.
    """

    average: Statistics | None = None
    batch: Statistics | None = None
    inverse: Operator | None = None
    damping: float = 0.0
    draws: int = 0
    missed: Tensor | float = 0.0
    absent: Tensor | float = 0.0
    summed: tuple[SummedRows, ...] = ()
    passes: int = 0
    rejected: bool = False
    positions: float = 0.0
    samples: float = 0.0
    silent: float = 0.0
    mean_positions: PositionsMean = PositionsMean()  # noqa: RUF009, frozen


class Curvature:
    """Statistics of every part of a model's Fisher matrix, and what is made of them.

    The way of the data is always the same: :meth:`observe` turns rows into the statistics of the
    present step; :meth:`join` makes them part of the average; :meth:`matrix` reads the average as
    an operator, :meth:`refresh` inverts it; :meth:`natural_gradient` applies the inverse. State is
    one immutable :class:`Estimate` per part, so :meth:`snapshot` and :meth:`rollback` copy nothing.

    Args:
        structure: Which entries are kept.
        blocks: Block name → layout.
        layout: Order of all trainable parameters.

    Attributes:
        parts: The structure's parts, by name.
        estimates: What is known of each.
        shared: What of it belongs to other processes, too; None for nothing.
        place: Which samples of the present batch are this process's.
        sharing: What processes share of the work, where the structure is made for that; a number is
            the fraction of them that keeps what is known of a layer.
        reads_data: Names of the blocks whose inputs are data.
        data_damping: What their factors of inputs are damped by when they are inverted, in units of
            ``tr A/N`` for batches of N; see :class:`natgrad.RelativeDamping`.
        rows_stay: Whether rows stay with the processes that have made them, so that what is made of
            them must be asked for by all together; otherwise they are gathered.
    """

    def __init__(
        self, structure: Structure, blocks: Mapping[str, BlockLayout], layout: ParameterLayout
    ) -> None:
        if not blocks:
            raise ValueError("the model has no trainable parameter that natgrad can cover")
        self.structure: Structure = structure
        self.layout: ParameterLayout = layout
        self.blocks: dict[str, BlockLayout] = dict(blocks)
        self.parts: dict[str, Part] = structure.parts(blocks, layout)
        self.estimates: dict[str, Estimate] = {name: Estimate() for name in self.parts}
        #: What is known of parts that the model had and may have again, as of layers frozen now.
        self.resting: dict[str, dict[str, Any]] = {}
        self.shared: SharedWork | None = None
        self.place: Place = WHOLE_BATCH
        self.sharing: Sharing | float = "inverses"
        self.rows_stay: bool = False
        self.reads_data: Collection[str] = ()
        self.data_damping: float = 0.0
        self._warned: set[str] = set()
        self._direct = structure.solver == "direct"
        #: Whether rows may come in chunks.
        self.additive: bool = structure.additive
        #: Whether rows of different layers are never multiplied with each other.
        self.by_layer: bool = structure.by_layer

    @property
    def replicas(self) -> Replicas:
        """Processes that have a share of every batch each; by default none but this one."""
        return Replicas() if self.shared is None else self.shared.replicas

    @replicas.setter
    def replicas(self, replicas: Replicas) -> None:
        self.shared = None if replicas.are_alone else SharedWork(self, replicas)

    @property
    def is_divided(self) -> bool:
        """Whether each factorisation is made by one process, for all of them."""
        return self.shared is not None and self.shared.is_divided

    def follow(self, blocks: Mapping[str, BlockLayout], layout: ParameterLayout) -> set[str]:
        """Go on with other blocks, as where layers were frozen, unfrozen, moved or replaced.

        What is known of blocks that stay, or that were there before, stays. After many updates
        without them it weighs as little as a moving average would leave of it, and waits to be
        inverted anew.

        Returns:
            Names of the parts whose inverse stays in use.

        Raises:
            ValueError: If there are no blocks.
        """
        old, held = self.parts, self.estimates
        fresh = Curvature(self.structure, blocks, layout)
        staying = {n for n, p in fresh.parts.items() if n in old and old[n].is_like(p)}
        fresh.estimates.update({name: held[name] for name in staying})
        if self.additive:  # Rows of one batch are nothing to come back to.
            gone = old.keys() - staying - {self.structure.companion}
            rest = {name: {**_packed(old[name], held[name]), "weight": 1.0} for name in gone}
            self.resting.update(rest)
        for name, part in fresh.parts.items():
            entry = self.resting.get(name)
            if entry is not None and _form(part).items() <= entry.items():
                del self.resting[name]
                found = fresh._restored(part, entry)
                if entry["weight"] > LEAST_WEIGHT_IN_USE:
                    staying.add(name)
                elif found.average is not None:
                    average = found.average.scaled(entry["weight"])
                    found = replace(found, average=average, inverse=None)
                fresh.estimates[name] = found
        self.drop_sums()
        self.layout, self.blocks = layout, fresh.blocks
        self.parts, self.estimates = fresh.parts, fresh.estimates
        return staying

    # Rows to statistics.

    def observe(
        self, jacobians: Jacobians, count: Tensor | float, *, continued: bool = False
    ) -> None:
        """Add the rows of a batch to the statistics of the present step.

        Rows that are not finite are left out; inside :func:`natgrad.linalg.unawaited` nobody waits
        to see, and :meth:`drop_failed` leaves them out later.

        Args:
            jacobians: Rows with ``F = (1/count) Σ rows rowsᵀ``.
            count: The sum of event weights.
            continued: Whether they are a further chunk of directions of samples that an earlier
                call has counted.
        """
        weight = torch.as_tensor(count, dtype=torch.float64, device=self.layout.device)
        if continued:
            weight = torch.zeros_like(weight)
        for name, part in self.parts.items():
            present = self.estimates[name]
            rows = in_type(jacobians.of_blocks(part.blocks, part.layout), part.dtype)
            present = replace(present, passes=present.passes + (not continued))
            if not len(rows):
                if not continued:
                    self.estimates[name] = replace(present, missed=present.missed + weight)
                continue
            if continued and present.batch is None and not present.summed:
                continue  # What a left-out chunk began is left out whole.
            draws = present.draws + (not continued)
            if self.shared is not None and self.shared.are_summed(name, rows):
                chunk = sum(one.number == present.passes for one in present.summed)
                one = SummedRows(rows, weight, present.passes, chunk, Draw(draws), continued)
                present = replace(present, summed=(*present.summed, one), draws=draws)
                self._keep_if_finite(present, name, one.sums().isfinite().all())
                continue
            found = self.statistics(name, rows, weight, Draw(draws, self.place), continued)
            batch = found
            if present.batch is not None:
                join = present.batch.followed_by if continued else present.batch.joined
                batch = join(found)
            present = replace(present, batch=batch, draws=draws)
            if not continued:
                block = next(iter(rows.values()))
                each = block.positions if isinstance(block, LinearJacobian) else 1
                samples, positions = block.samples, block.samples * each
                present = replace(
                    present,
                    samples=present.samples + samples,
                    positions=present.positions + positions,
                )
            self._keep_if_finite(present, name, found.is_finite())
        jacobians.moments.clear()

    def statistics(
        self, name: str, rows: Jacobians, weight: Tensor, draw: Draw, continued: bool = False
    ) -> Statistics:
        """Return the statistics of a part's rows.

        Args:
            name: The part.
            rows: Its rows.
            weight: The sum of their event weights.
            draw: Which random subset of them is taken.
            continued: Whether they are a further chunk of samples that have been counted.
        """
        before, part = self.estimates[name].average, self.parts[name]
        return self.structure.statistics(
            part, rows, weight, previous=before, draw=draw, continued=continued
        )

    def _keep_if_finite(self, present: Estimate, name: str, finite: Tensor) -> None:
        """Keep an estimate with further rows if these are finite."""
        try:
            linalg.require(finite, "rows are NaN or infinite")
        except FactorizationError:
            present = replace(self.estimates[name], rejected=True)
        self.estimates[name] = present

    def pass_over(self, samples: int) -> None:
        """Note samples of a pass of which none counts here, though some do in other processes."""
        for name, present in self.estimates.items():
            self.estimates[name] = replace(
                present, silent=present.silent + samples, passes=present.passes + 1
            )

    # Statistics to their average.

    def drop_sums(self) -> None:
        """Forget sums over processes that are under way, as those of some passes of a step."""
        if self.shared is not None:
            self.shared.drop_sums()

    def join(self, decay: float = 1.0, *, counts_absent: bool = False) -> None:
        """Make the statistics of the present step part of the average.

        A part's mean is over all samples of the step, also those of another pass or process that
        had no rows of it.

        Args:
            decay: Weight of what was there before: 1 for a sum over batches, below 1 for a moving
                average, 0 to start afresh.
            counts_absent: Whether that holds of parts without any rows in the step, too, as in the
                Fisher matrix of a data set. By default such a part stays as it is.
        """
        for entry in self.resting.values():
            entry["weight"] = max(entry["weight"] * decay, LEAST_WEIGHT)
        missed = {name: one.missed for name, one in self.estimates.items()}
        positions: dict[str, Tensor | float] = {n: o.positions for n, o in self.estimates.items()}
        if self.shared is not None:
            missed, positions = self.shared.agree()
            self.shared.unite()
        for name, present in self.estimates.items():
            average, batch = present.average, present.batch
            present = replace(
                present, batch=None, summed=(), passes=0, missed=0.0, rejected=False,
                positions=0.0, samples=0.0, silent=0.0,
            )  # fmt: skip
            if batch is None:
                counts = counts_absent and not self.estimates[name].rejected
                count = present.absent + missed[name] if counts else present.absent
                self.estimates[name] = replace(present, absent=count)
                continue
            if isinstance(missed[name], Tensor):
                batch = batch.with_count(batch.count + missed[name])
            mean = present.mean_positions.followed_by(positions[name], decay)
            if average is not None:
                batch = average.followed_by(batch, decay)
            self.estimates[name] = replace(present, average=batch, mean_positions=mean)

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add the rows of a batch to a sum over batches."""
        self.observe(jacobians, count)
        self.join(counts_absent=True)

    def restore_unusable(self, before: Mapping[str, Estimate]) -> None:
        """Return the parts whose average is not finite to what they were before.

        Args:
            before: Estimates of a :meth:`snapshot`.
        """
        for name, present in self.estimates.items():
            average, old = present.average, before[name]
            if average is not None and average is not old.average:
                if not bool(average.is_finite()):
                    self.estimates[name] = replace(old, draws=present.draws)

    # The matrix.

    def operator(self, name: str) -> Operator:
        """Return the matrix of one part."""
        return self.read(name, self._settled(name))

    def read(self, name: str, average: Statistics | None) -> Operator:
        """Return what an average stands for, batches in which the part had no rows included."""
        return self.structure.operator(self.parts[name], self._over_all(name, average))

    def _settled(self, name: str) -> Statistics | None:
        """Return the average of a part, summed up."""
        present = self.estimates[name]
        average = present.average
        if average is not None:
            average = self.structure.settled(self.parts[name], average)
            self.estimates[name] = replace(present, average=average)
        return average

    def _over_all(self, name: str, average: Statistics | None) -> Statistics | None:
        """Return an average over batches in which the part had no rows, too."""
        absent = self.estimates[name].absent
        if average is not None and isinstance(absent, Tensor):
            return average.with_count(average.count + absent)
        return average

    def matrix(self) -> FisherMatrix:
        """Return the matrix of the whole model.

        Raises:
            ValueError: If this process does not have all of it.
        """
        if self.shared is not None and self.shared.is_spread:
            raise ValueError(
                f"the matrix is spread over processes by Refresh(sharing={self.sharing!r}), and is "
                "not whole in any of them: use sharing='inverses' to look at it"
            )
        beside = self.structure.companion
        operators = {name: self.operator(name) for name in self.parts if name != beside}
        companion = None if beside is None else self.estimates[beside].average
        return self.structure.matrix(self.layout, self.parts, operators, companion)

    def mean_eigenvalue(self) -> Tensor:
        """Return ``tr F/P``, a scalar in float64, over the parts that have a matrix by now."""
        traces, size = [], 0
        for name, present in self.estimates.items():
            if present.average is not None and name != self.structure.companion:
                average = self._over_all(name, self._settled(name))
                trace = self.structure.trace(self.parts[name], average)
                traces.append(trace.to(self.layout.device, torch.float64))
                size += self.parts[name].layout.numel
        if self.shared is not None and self.shared.is_spread:
            own = {"trace": torch.stack(traces).sum() if traces else None, "size": [size]}
            each = self.shared.grid.row.gathered(own, self.layout.device)
            traces = [one["trace"] for one in each if one["trace"] is not None]
            size = sum(one["size"][0] for one in each)
        if not traces:
            return torch.tensor(math.nan, dtype=torch.float64)
        return torch.stack(traces).sum() / size

    # Inverses.

    def refresh(self, damping: Damping, names: Collection[str] | None = None) -> None:
        """Invert; a part that cannot be keeps its last inverse, which one warning says by name.

        Args:
            damping: λ in the units of F, one value or one per block name.
            names: Parts to invert; all by default.
        """
        wanted = [
            name
            for name in (self.parts if names is None else names)
            if self.estimates[name].average is not None and name != self.structure.companion
        ]
        if not wanted:  # Which all processes that have the same parts know.
            return
        if self.shared is None:
            self._invert_here(wanted, damping)
            return
        shares = self.shared.shares_of(wanted)
        own = shares[self.shared.seat]
        before = {name: self.estimates[name].inverse for name in own}
        self._invert_here(own, damping)
        made = {name for name in own if self.estimates[name].inverse is not before.pop(name)}
        self.shared.take_inverses(shares, made, damping)

    def _invert_here(self, names: Sequence[str], damping: Damping) -> None:
        """Invert parts in this process, small ones together."""
        together: list[str] = []
        for name in names:
            small = self.parts[name].layout.numel <= BATCHED_PARAMETERS
            batched = small or self.layout.device.type != "cpu"
            if batched and self._direct:
                together.append(name)
            else:
                self._invert([name], damping)
        if together:
            self._invert(together, damping)

    def _invert(self, names: list[str], damping: Damping) -> None:
        """Invert parts together; one by one if that fails, to find out which it is."""
        dampings = [damping_of(name, damping) for name in names]
        estimates = [self.estimates[name] for name in names]
        try:
            parts, structure = [self.parts[name] for name in names], self.structure
            averages = structure.renewed(parts, [e.average for e in estimates], dampings)
            operators = [self.to_invert(n, a) for n, a in zip(names, averages, strict=True)]
            inner = [structure.inverse_damping(value) for value in dampings]
            if self._direct:
                inverses = inverses_together(operators, inner)
            else:
                inverses = [
                    one.inverse(value, structure.solver).continuing(old.inverse)
                    for one, value, old in zip(operators, inner, estimates, strict=True)
                ]
        except FactorizationError as error:
            if len(names) > 1:
                for name in names:
                    self._invert([name], damping)
                return
            if linalg.waits():
                self.warn_kept(names[0], error)
            else:
                linalg.note_failure()
            return
        for name, average, inverse, value in zip(names, averages, inverses, dampings, strict=True):
            self.estimates[name] = replace(
                self.estimates[name], average=average, inverse=inverse, damping=value
            )

    def to_invert(self, name: str, average: Statistics | None) -> Operator:
        """Return what an average stands for, its factor of inputs damped where these are data."""
        operator = self.read(name, average)
        if not self.data_damping or name not in self.reads_data or self.parts[name].block.one_hot:
            return operator
        samples = self.estimates[name].mean_positions.value()
        samples = samples.to(self.layout.device, non_blocking=True)
        share = self.data_damping * self.parts[name].block.d_augmented / samples
        return operator.with_damped_inputs(share)

    def warn_kept(self, name: str, error: FactorizationError) -> None:
        """Warn, once per part, that an old factorisation stays in use."""
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"the curvature of {name!r} could not be factorised ({error}); its last good "
                "factorisation stays in use",
                stacklevel=4,
            )

    def follow_update(self, factorised: Collection[str] = ()) -> None:
        """Invert what follows every update, with the damping of the last factorisation.

        Args:
            factorised: Parts that this step factorises anew, which is more.
        """
        for name, present in self.estimates.items():
            if present.inverse is not None and name not in factorised:
                inverse = self.to_invert(name, self._settled(name)).inverse(present.damping)
                self.estimates[name] = replace(self.estimates[name], inverse=inverse)

    def staggered(self, slots: int) -> list[list[str]]:
        """Return the parts in ``slots`` lists that cost about the same to factorise."""
        names = [name for name in self.parts if name != self.structure.companion]
        return self.balanced(names, slots)

    def balanced(
        self, names: Sequence[str], slots: int, held: Sequence[Sequence[str]] = ()
    ) -> list[list[str]]:
        """Return some parts in ``slots`` lists that cost about the same to factorise.

        The dearest parts come first, each into the list that is cheapest so far.

        Args:
            names: The parts.
            slots: How many lists there are.
            held: Parts that the lists begin with; none by default.
        """
        none = Workload(0, 1, {})

        def cost(name: str) -> float:
            return max(self.structure.cost(self.parts[name], none).refresh, 1.0)

        lists = [list(one) for one in held] or [[] for _ in range(slots)]
        costs, totals = {n: cost(n) for n in names}, [sum(map(cost, one)) for one in lists]
        for name in sorted(costs, key=lambda n: -costs[n]):
            cheapest = totals.index(min(totals))
            lists[cheapest].append(name)
            totals[cheapest] += costs[name]
        return lists

    # Directions.

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient by the last inverses, parameter name → tensor.

        Parts without an inverse yet return the gradient itself.
        """
        natural = self._by_parts(source)
        if self.structure.companion is None:
            return natural
        return self.structure.corrected(self.parts, self.estimates, source, natural, self._by_parts)

    def _by_parts(self, source: GradientSource) -> dict[str, Tensor]:
        # Parameters without entries are in no part.
        result = {n: g for n, g in source.gradients.items() if not g.numel()}
        if self.shared is not None:
            return result | self.shared.natural_gradient(source, self._of_parts)
        return result | self._of_parts(list(self.parts), source)

    def _of_parts(self, names: Sequence[str], source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of some parts."""
        result: dict[str, Tensor] = {}
        for name in names:
            inverse = self.estimates[name].inverse
            if name == self.structure.companion:
                continue
            if inverse is None or name in source.natural:
                result.update({n: source.gradients[n] for n in self.parts[name].layout.offsets})
            else:
                result.update(inverse.natural_gradient(source))
        return result

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return ``ΔᵀFΔ`` of a natural gradient, as nearly as can be told, but for its sign.

        Structures that hold the rows of the batch return the exact form ``‖JΔ‖²/count``; others
        ``⟨Δ, ∇L⟩ = Δᵀ(F̂ + λI)Δ``, which is known already.

        Args:
            direction: ``Δ = (F̂ + λI)⁻¹∇L``, parameter name → tensor.
            inner: ``⟨Δ, ∇L⟩``.
        """
        known = self.structure.quadratic(self.parts, self.estimates, direction, inner)
        if known is not None:
            return known
        total: Tensor | None = None
        count: Tensor | float = 0.0
        for present in self.estimates.values():
            found = None if present.inverse is None else present.inverse.row_products(direction)
            if found is None or (total is not None and found[0].shape != total.shape):
                return inner
            total, count = found[0] if total is None else total + found[0], found[1]
        return inner if total is None else total.square().sum() / count

    def costs(self, workload: Workload) -> dict[str, Cost]:
        """Return what each part costs."""
        return {name: self.structure.cost(part, workload) for name, part in self.parts.items()}

    # State.

    def snapshot(self) -> dict[str, Estimate]:
        """Return the present state by reference, for :meth:`rollback`; it costs no copy."""
        if self._direct:
            return dict(self.estimates)
        return {
            name: replace(e, inverse=None if e.inverse is None else e.inverse.frozen())
            for name, e in self.estimates.items()
        }

    def rollback(self, saved: Mapping[str, Estimate]) -> None:
        """Return to a snapshot."""
        self.estimates = dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return part name → averages and inverses, as tensors and plain values.

        Where memory is shared all processes must ask for it, as it is gathered.
        """
        names = list(self.parts) if self.shared is None else self.shared.own_parts()
        found = {name: _packed(self.parts[name], self.estimates[name]) for name in names}
        if self.shared is not None:
            found = self.shared.of_all(found)
        return {name: found[name] for name in self.parts}

    def resting_state(self) -> dict[str, dict[str, Any]]:
        """Return what is known of parts that the model had, likewise."""
        found = {n: entry for n, entry in self.resting.items() if entry["average"] is not None}
        if self.shared is not None:
            found = self.shared.of_all(found)
        return {name: found.get(name, entry) for name, entry in self.resting.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`restored`."""
        self.estimates = self.restored(state)

    def restored(self, state: Mapping[str, Any]) -> dict[str, Estimate]:
        """Return the estimates that :meth:`state_dict` described; nothing is changed yet.

        They are on the device of the parameters, and in the types this estimate itself works in.

        Raises:
            ValueError: If the state has other parts than this structure, or parts of other sizes.
        """
        if set(state) != set(self.parts):
            differing = sorted(set(state) ^ set(self.parts))
            raise ValueError(
                f"the checkpoint's curvature has other layers than the model: {differing}"
            )
        found = {name: self._restored(self.parts[name], entry) for name, entry in state.items()}
        if self.shared is not None:
            for name in found.keys() - self.shared.own_parts():
                found[name] = Estimate(draws=found[name].draws)
        return found

    def _restored(self, part: Part, entry: Mapping[str, Any]) -> Estimate:
        form = _form(part)
        own, matrices = form["sizes"], form["matrices"]
        if entry.get("sizes", own) != own:
            raise ValueError(
                f"the checkpoint's curvature of {part.name!r} is of parameters {entry['sizes']}, "
                f"and this model's are {own}"
            )
        if entry.get("matrices", matrices) != matrices:
            raise ValueError(
                f"the checkpoint's curvature of {part.name!r} is of another kind of layer, with "
                "parameters of the same shapes: load it into the model that it was saved with"
            )
        device, layout = self.layout.device, self.structure.vector_layout(part)
        average, inverse = (
            None
            if entry[key] is None
            else self.structure.cast(part, Record.from_state(entry[key], device, layout))
            for key in ("average", "inverse")
        )
        self.structure.check_restored(part, average)
        mean = PositionsMean(*entry.get("positions", ()))
        return Estimate(
            average, None, inverse, entry["damping"], entry["draws"], mean_positions=mean
        )


def _packed(part: Part, estimate: Estimate) -> dict[str, Any]:
    """Return what is known of a part as tensors and plain values."""
    average, inverse = (
        None if one is None else one.for_checkpoint()
        for one in (estimate.average, estimate.inverse)
    )
    return {
        "average": None if average is None else average.state_dict(),
        "inverse": None if inverse is None else inverse.state_dict(),
        "damping": estimate.damping,
        "draws": estimate.draws,
        "positions": (estimate.mean_positions.total, estimate.mean_positions.batches),
        **_form(part),
    }


def _form(part: Part) -> dict[str, Any]:
    """Return what statistics of a part are of: the parameters' shapes, and the matrices they are.

    A matrix that is multiplied from the other side has the same shape.
    """
    blocks = part.blocks.values()
    pairs = (pair for one in blocks for pair in zip(one.names, one.shapes, strict=True))
    matrices = [
        [one.groups, one.d_out, one.d_in, one.transposed, one.kernel, one.one_hot] for one in blocks
    ]
    return {"sizes": {name: list(shape) for name, shape in pairs}, "matrices": matrices}
