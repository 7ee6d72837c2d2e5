"""Which passes of a model are seen, and when their rows are pulled back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.capture import Capture, ForwardPass
from natgrad.capture.forward_pass import LayerGradients
from natgrad.capture.hooks import outside_graphs, own_backward
from natgrad.capture.model_output import Selection
from natgrad.curvature import Curvature
from natgrad.distributed import Replicas
from natgrad.distributed.replicas import PlacedGenerator
from natgrad.distributed.shards import whole_parameters
from natgrad.fisher import FisherType, RowReceiver, draw_in_step, update_from_output
from natgrad.likelihoods import Likelihood
from natgrad.optim.audit import Findings, GradientAudit
from natgrad.optim.options import Refresh
from natgrad.optim.step.isotropic_rate import IsotropyProbe
from natgrad.optim.step.quadratic_model import BatchFisher, RowReceivers

_NOTHING = torch.empty(0)

#: Steps after which rows and gradients are checked again, if nothing calls for it before.
CHECK_INTERVAL = 1000


@dataclass(frozen=True, eq=False)
class SeenPass:
    """A forward pass whose output the user's backward pass has reached.

    Attributes:
        recorded: What the capture recorded.
        weights: Event weights, ``(N, E)`` or ``(N, E, C)``; this and all that follows on steps
            that take rows.
        count: What a mean-reduced loss divides by.
        scale: Scale of the user's loss.
        is_empty: Whether no event counts.
        partial: Samples of which some event does not, ``(N,)``; None for none in all processes.
        cotangent: Gradient at the output by all backward passes that ``.grad`` is of.
        asked: Whether no gradient was left in ``.grad`` so far: all were asked for by
            ``torch.autograd.grad``, or a loss was told.
        told: Whether the user told of the pass.
        gradients: What backward passes brought to the layers' outputs.
    """

    recorded: ForwardPass
    weights: Tensor = _NOTHING
    count: Tensor = _NOTHING
    scale: Tensor = _NOTHING
    is_empty: bool = False
    partial: Tensor | None = None
    cotangent: Tensor | None = None
    asked: bool = False
    told: bool = False
    gradients: LayerGradients | None = None


class Observer:
    """Watches a model's passes and hands the Fisher's rows to whoever is due for them.

    When the user's backward pass reaches the model's output and an update is due, the Fisher's
    vectors are pulled back through the same graph to the layers' outputs: no second forward pass,
    no parameter ``.grad`` touched. Ignored tokens and class weights are read off the gradient that
    arrives at the output.

    Args:
        capture: The hooks on the model.
        likelihood: What the output means.
        fisher: Which vectors are pulled back.
        refresh: When.
        curvature: Receives the rows of steps with an update.
        seed: Seed of sampled labels.

    Attributes:
        model: Sees changes of the model itself.
        steps: Steps taken.
        warmup: Steps still to come that update the curvature only.
        seen: Passes of the present step.
        failures: Whether rows taken so far were not finite: scalars on the device.
        schedule: Says at which steps curvature is updated; None for every ``refresh.factors``.
        row_modules: Layers whose own gradients are recorded at every step.
        probe_layer: Block whose own gradients are recorded where the batch's rows are kept.
        isotropy_probe: Set while the learning rate 1/α is still to be measured.
        wants_batch_fisher: Says at which steps, counted from where intervals are, the rows of the
            batch itself are kept.
        exact_batch_fisher: Whether they must be those of every sample, whatever that costs.
        batch_fisher: The Fisher matrix of the present step's batch, where its rows are kept.
        audit: Compares the step's gradients with what the passes explain, on the first step and
            wherever rows are checked.
    """

    def __init__(
        self,
        capture: Capture,
        likelihood: Likelihood,
        fisher: FisherType,
        refresh: Refresh,
        curvature: Curvature,
        seed: int,
    ) -> None:
        self.capture: Capture = capture
        self.likelihood: Likelihood = likelihood
        self.fisher: FisherType = fisher
        #: The likelihood as it was given, before any loss was seen.
        self.given = likelihood
        self.refresh: Refresh = refresh
        self.curvature: Curvature = curvature
        self.generator: PlacedGenerator = PlacedGenerator(capture.layout.device)
        self.generator.manual_seed(seed)
        #: Processes that have a share of every batch each.
        self.replicas: Replicas = Replicas()
        self.model: ModelWatch = ModelWatch(capture.model)
        self.steps: int = 0
        self.warmup: int = refresh.warmup
        #: The step from which intervals are counted: when layers were last new, or back.
        self.start = 0
        #: Whether this step updates and inverts the curvature, whatever its turn.
        self.renews = False
        self.schedule: Callable[[int], bool] | None = None
        self.row_modules: frozenset[nn.Module] = frozenset()
        self.probe_layer: str | None = None
        self.isotropy_probe: IsotropyProbe | None = None
        self.wants_batch_fisher: Callable[[int], bool] = lambda step: False
        self.exact_batch_fisher = True
        self.batch_fisher: BatchFisher | None = None
        self.seen: list[SeenPass] = []
        self.failures: list[Tensor] = []
        self.audit: GradientAudit = GradientAudit(capture)
        self._audited = 0  # Checks of rows at the last audit.
        #: Takes the rows of the last pass back, and those of all passes of the step.
        self._take_back: Callable[[], None] = lambda: None
        self._take_all_back: Callable[[], None] | None = None
        #: The random numbers' state before those of the last pass in which nothing counted.
        self._undrawn: Tensor | None = None
        #: Whether the likelihood has been held against the gradient of the loss.
        self.compared: bool = False
        #: Both as they were before the passes of this step, and what these say of the loss.
        self._before = self.likelihood, self.compared
        self._untold: list[str] = []
        #: Whether passes of this step have left gradients in ``.grad``.
        self.left_gradients = False
        #: Called before anything of a step changes.
        self.before_change: Callable[[], None] = lambda: None
        #: Whether gradients of the passes seen were reset, and what forgets these passes.
        self.discarded = False
        self.forget_discarded: Callable[[], None] = lambda: None
        #: Whether the wrapper averages gradients after the last forward pass.
        self.last_pass = True
        self._others_count = False  # Samples of the last pass count in other processes,
        self._others_go_on = False  # which make further passes after the last one of this.
        #: Whether some process knows curvature, of those that share work; some keep none at all.
        self.known_together = False
        capture.on_backward = self._on_backward

    # What is due.

    @property
    def update_due(self) -> bool:
        """Whether this step updates the curvature."""
        if self.warmup > 0:
            return True
        if self.schedule is not None:
            return self.schedule(self.steps)
        turn = self.is_turn(self.refresh.factors)
        known = self.knows_curvature if self.replicas.are_alone else self.known_together
        return turn or not known

    def is_turn(self, interval: int) -> bool:
        """Return whether something done at an interval is due at this step."""
        return self.renews or self.refresh.is_turn(self.steps - self.start, interval)

    @property
    def knows_curvature(self) -> bool:
        """Whether any step has updated the curvature here; the first batches may be empty."""
        return any(one.average is not None for one in self.curvature.estimates.values())

    @property
    def keeps_batch_fisher(self) -> bool:
        """Whether this step keeps the rows of its batch."""
        return self.warmup == 0 and self.wants_batch_fisher(self.steps - self.start)

    @property
    def rows_due(self) -> bool:
        """Whether this step wants rows."""
        return self.update_due or self.keeps_batch_fisher

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

    # Passes.

    def begin_pass(self) -> None:
        """Choose what is recorded of a forward pass that begins."""
        due, sources = self.rows_due, self.capture.sources
        if due and self.steps and self.steps % CHECK_INTERVAL == 0 and not self.seen:
            sources.forget()
        # Gradients are collected if rows were checked since, or will be in this pass.
        stale = not sources.checked or sources.checks != self._audited
        audited = due and self.warmup == 0 and not self.capture.shards
        if audited and stale and not self.audit.active:
            self.audit.begin()
        self.capture.recording = due or self.isotropy_probe is not None
        watched = self.row_modules
        if self.keeps_batch_fisher and self.probe_layer is not None:
            watched = watched | {self.capture.blocks[self.probe_layer].uses[0].module}
        own = due and self.fisher.from_user_gradients
        self.capture.watching = own or watched or False

    @outside_graphs
    def _on_backward(self, recorded: ForwardPass) -> None:
        """Take rows at the start of the user's backward pass."""
        purpose = recorded.purpose
        self.left_gradients |= purpose == "train"
        if self.capture.shards and self.rows_due:
            with whole_parameters(self.capture.model):
                self._reached(recorded, purpose == "ask")
        else:
            self._reached(recorded, purpose == "ask")
        if purpose != "ask":
            self._tell()

    def _reached(self, recorded: ForwardPass, asked: bool) -> None:
        self.begin_anew()
        if not self.seen:
            self._before = self.likelihood, self.compared
        recordings = [one.recorded for one in self.seen]
        if not any(one.told for one in self.seen):
            trains = any(not one.asked for one in self.seen)
            if asked and trains and recorded not in recordings:
                return  # A look at gradients beside those that train.
            if not asked and not trains:
                self._forget_looks(recorded)
                recordings = []
        place = recordings.index(recorded) if recorded in recordings else None
        assert recorded.output is not None
        has_samples = recorded.output.numel() > 0
        if recorded.has_edges and place is None and has_samples:
            self.capture.settle(recorded)
        if asked and recorded.retained:
            self.audit.drop()  # It would find second derivatives, which are no gradient.
        elif self.audit.active and has_samples:
            self.audit.explain(recorded, asked)
        recorded.join_dropped()
        if place is not None:
            self._see_again(place, asked)
            return
        one = self._see(recorded, recorded.cotangent, asked)
        if recorded.has_edges:
            self._take_rows(one)
        if not self.replicas.are_alone:
            self._take_part_in_others()
            self._begin_sums()

    def begin_anew(self) -> None:
        """Forget passes whose gradients were reset: other ones come now."""
        if self.discarded:
            audited = self.audit.active
            if all(one.asked and not one.told for one in self.seen):
                self._forget_looks()
            self.forget_discarded()
            if audited:
                self.audit.begin()

    def _see_again(self, place: int, asked: bool) -> None:
        """Let a further backward pass through an output count as it does in ``.grad``.

        Every loss may have a pass of its own, which shows the events that it counts alone. Nobody
        is asked in other processes, which need not have as many. Passes that only return gradients
        (``asked``), as to compare those of several losses, count if none leaves some in ``.grad``.
        """
        present = self.seen[place]
        recorded, total = present.recorded, present.recorded.cotangent
        if present.cotangent is None or total is None or present.gradients is None:
            return
        looks, afresh = asked and not present.asked, present.asked and not asked
        present.gradients.begin(looks=looks, afresh=afresh)
        if not afresh:
            total = present.cotangent if looks else present.cotangent + total
        recorded.cotangent = total
        known = replace(present, cotangent=total, asked=asked and present.asked)
        self.seen[place] = known
        if present.weights is _NOTHING or looks:
            return
        found = self._weighed(recorded, total)
        self.seen[place] = weighed = replace(
            found,
            cotangent=total,
            asked=known.asked,
            told=known.told,
            gradients=present.gradients,
        )
        if not recorded.has_edges or torch.equal(weighed.weights, present.weights):
            return
        if place + 1 < len(self.seen):
            self.capture.tell(
                "a further backward pass reached the output of a forward pass after those of "
                "other passes, so what it alone counts is missing in the curvature: backpropagate "
                "all losses of a pass before the next"
            )
            return
        self._take_back()
        if self.curvature.shared is not None:
            self.curvature.shared.outdated = True
        if present.is_empty and self._undrawn is not None:
            self.generator.set_state(self._undrawn)
        if weighed.is_empty:
            self._undrawn = self.generator.get_state()
            self._draw_in_step(recorded)
        self._take_rows(weighed)

    def _forget_looks(self, recorded: ForwardPass | None = None) -> None:
        """Forget passes whose gradients were only asked for, as there is one now that trains."""
        for one in self.seen:
            if one.recorded is recorded and one.gradients is not None:
                one.gradients.begin(afresh=True)
        if self._take_all_back is not None:
            self._take_all_back()
        self.seen, self._take_all_back = [], None
        self.likelihood, self.compared = self._before
        self._untold = []

    def _tell(self) -> None:
        """Say what was found out about the loss."""
        for sentence in self._untold:
            self.capture.tell(sentence)
        self._untold = []

    def _begin_sums(self) -> None:
        """Let the sums over processes be on their way while the user's backward pass runs.

        Rows that its own gradients make, and those of passes to come, are not there yet.
        """
        if not self.update_due:
            return
        self.curvature.drop_sums()
        if self.last_pass and not self.fisher.from_user_gradients:
            assert self.curvature.shared is not None
            self.curvature.shared.begin_sums()

    def findings(self, forgiven: Set[str]) -> Findings:
        """Return what the audit of this step found, but for gradients changed on purpose."""
        self._audited = self.capture.sources.checks
        self.audit.forgive(forgiven)
        return self.audit.end(self.replicas.are_alone)

    def see_retained(self) -> None:
        """See passes that only a backward pass with ``create_graph=True`` reached."""
        if self.seen:
            return
        try:
            for recorded in list(self.capture.passes):
                if recorded.retained and recorded.cotangent is not None:
                    self._on_backward(recorded)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            self.seen = []  # The loss is made of derivatives, and its pass has freed their graph.

    def _see(
        self,
        recorded: ForwardPass,
        cotangent: Tensor | None,
        asked: bool = False,
        told: bool = False,
    ) -> SeenPass:
        """Note a pass; weigh its events on steps that take rows."""
        assert recorded.output is not None
        one = SeenPass(recorded, is_empty=recorded.output.numel() == 0)
        if self.rows_due or self.isotropy_probe is not None:
            one = self._weighed(recorded, cotangent)
            if not self.replicas.are_alone:
                one = self._placed(one)
        gradients = LayerGradients(recorded)
        one = replace(one, cotangent=cotangent, asked=asked, told=told, gradients=gradients)
        self.seen.append(one)
        return one

    def _placed(self, one: SeenPass) -> SeenPass:
        """Find the place of a pass's samples in the batch of all processes, which all take part in.

        Rows that are of the whole batch are partial in all of them if they are in one.
        """
        assert one.recorded.output is not None
        device, own = self.capture.layout.device, len(one.recorded.output)
        shared, curvature = self.curvature.shared, self.curvature
        assert shared is not None
        sums = self.fisher.independent and curvature.additive and curvature.by_layer
        sums = sums and self.capture.sources.sums_rows
        flags = [one.partial is not None, not one.is_empty, self.last_pass, sums]
        place, each = self.replicas.placed(own, flags, device)
        partial, counts, last, summed = zip(*each, strict=True)
        shared.sums_rows = shared.sums_rows or any(summed)
        self.generator.place = self.curvature.place = place
        self._others_count = any(counts)
        if one.is_empty:
            self._undrawn = self.generator.get_state()
            if any(counts):
                self._draw_in_step(one.recorded)
        self._others_go_on = self.last_pass and not all(last)
        if one.partial is None and any(partial):
            one = replace(one, partial=one.weights.new_zeros(own, dtype=torch.bool))
        return one

    def _take_part_in_others(self) -> None:
        """After the last pass of this process, take part in those that others make besides."""
        present, device = self.generator.place, self.capture.layout.device
        while self._others_go_on:
            place, each = self.replicas.placed(0, [False, False, True, False], device)
            _, counts, last, _ = zip(*each, strict=True)
            self.generator.place = place
            if any(counts):
                self._draw_in_step(self.seen[-1].recorded, samples=0)
                for name, one in self.curvature.estimates.items():
                    self.curvature.estimates[name] = replace(one, draws=one.draws + 1)
            self._others_go_on = not all(last)
        self.generator.place = present

    def _draw_in_step(self, recorded: ForwardPass, samples: int | None = None) -> None:
        """Draw as other processes do for a pass in which nothing counts here."""
        assert recorded.output is not None
        if self.rows_due and not self.replicas.are_alone:
            likelihood = self.likelihood.of_shapes(recorded.heads)
            output = recorded.output.detach()[:samples]
            draw_in_step(likelihood, self.fisher, output, self.generator)

    def _weighed(self, recorded: ForwardPass, cotangent: Tensor | None) -> SeenPass:
        """Return a pass with the weights of its events; the one place where it is waited for."""
        assert recorded.output is not None
        output, target = recorded.output.detach(), recorded.target
        if output.numel() == 0:  # A batch of no samples.
            return SeenPass(recorded, is_empty=True)
        likelihood = self.likelihood.of_shapes(recorded.heads)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            if cotangent is not None and (not self.compared or self.likelihood.undecided):
                self._compare(likelihood, output, cotangent, target)
                likelihood = self.likelihood.of_shapes(recorded.heads)
            if cotangent is None:
                weights = likelihood.event_weights(output, target)
                scale, count = weights.new_ones(()), likelihood.count(output, target)
            else:
                weights, scale = likelihood.infer_event_weights(output, cotangent, target)
                count = likelihood.seen_count(output, weights, target)
            partial = (weights == 0).flatten(1).any(1)
            empty, some = torch.stack([count == 0, partial.any()]).tolist()
        return SeenPass(recorded, weights, count, scale, empty, partial if some else None)

    def _compare(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, target: Any
    ) -> None:
        """Hold the likelihood against the gradient of the loss, once that is finite."""
        if not bool(cotangent.isfinite().all()):
            return  # An overflow says nothing of the loss.
        self.likelihood, sentences = likelihood.seen_with(output, cotangent, target)
        self.compared = self.compared or bool(cotangent.any())
        self._untold += sentences

    def _take_rows(self, one: SeenPass) -> None:
        """Pull the Fisher's vectors back through a pass, if this step wants them."""
        self._take_back = lambda: None
        output = one.recorded.output
        assert output is not None
        if one.is_empty:
            if self._others_count and self.update_due:
                self._take_back = self._as_now(self._undrawn)
                self._take_all_back = self._take_all_back or self._take_back
                self.before_change()
                self.curvature.pass_over(len(output))
            if self._others_count and self.keeps_batch_fisher:
                self.take_part()
                assert self.batch_fisher is not None
                self.batch_fisher.pass_over()
            return
        likelihood = self.likelihood.of_shapes(one.recorded.heads)
        if self.rows_due or self.isotropy_probe is not None:
            self._take_back = self._as_now()
            self._take_all_back = self._take_all_back or self._take_back
        if self.isotropy_probe is not None:
            self.isotropy_probe.observe(
                self.capture, likelihood, output, one.weights, float(one.count),
                self.generator.place,
            )  # fmt: skip
        if not self.rows_due or self.fisher.from_user_gradients:
            return
        with linalg.unawaited() as failures:
            update_from_output(
                self._receiver(),
                self.capture,
                likelihood,
                self.fisher,
                output,
                one.weights,
                one.count,
                generator=self.generator,
                target=one.recorded.target,
                cotangent=one.recorded.cotangent,
                partial=one.partial,
            )
        self.failures += failures

    def _as_now(self, random: Tensor | None = None) -> Callable[[], None]:
        """Return what restores what rows are kept in, any number of times."""
        estimates = self.curvature.snapshot()
        random = self.generator.get_state() if random is None else random
        failures, batch, probe = list(self.failures), *self._copies()
        signs = random if probe is None else probe._generator.get_state()

        def restore() -> None:
            self.curvature.rollback(estimates)
            self.generator.set_state(random)
            self.batch_fisher, self.isotropy_probe = batch, probe
            self.batch_fisher, self.isotropy_probe = self._copies()
            self.failures = list(failures)
            if self.isotropy_probe is not None:
                self.isotropy_probe._generator.set_state(signs)

        return restore

    def _copies(self) -> tuple[BatchFisher | None, IsotropyProbe | None]:
        """Return what collects rows beside the curvature, with lists of their own."""
        batch, probe = copy.copy(self.batch_fisher), copy.copy(self.isotropy_probe)
        if batch is not None:
            batch._rows = list(batch._rows)
        if probe is not None:
            probe._gradients, probe._norms = list(probe._gradients), list(probe._norms)
        return batch, probe

    def _receiver(self) -> RowReceiver:
        """Return what takes the rows of a pass of this step."""
        self.before_change()
        if not self.keeps_batch_fisher:
            return self.curvature
        self.take_part()
        assert self.batch_fisher is not None
        if not self.update_due:
            return self.batch_fisher
        return RowReceivers(self.curvature, self.batch_fisher)

    def take_part(self) -> None:
        """Have a Fisher matrix of the batch, of no rows so far."""
        if self.batch_fisher is None:
            self.batch_fisher = BatchFisher(self.capture.layout, self.exact_batch_fisher)

    def complete(self) -> None:
        """Let gradients at the layers' outputs be those of all backward passes of the step.

        Take the rows that these left, for Fisher types made of them.
        """
        for one in self.seen:
            if one.gradients is not None:
                one.gradients.complete()
        if not (self.fisher.from_user_gradients and self.rows_due):
            return
        for one in self.seen:
            if one.recorded.cotangent is None or one.recorded.output is None or one.is_empty:
                continue
            with linalg.unawaited() as failures:
                rows = self.capture.user_jacobians(one.recorded, 1.0 / one.scale, one.partial)
                self._receiver().observe(rows, one.count)
            self.failures += failures

    def coordinates(self) -> Tensor | None:
        """Return ``u`` with ``∇L = Jᵀu`` where the passes of this step made rows and gradient.

        The rows, and with them u, are those of all processes, in the order of their ranks.
        """
        own = self._own_coordinates()
        if self.replicas.are_alone:
            return own
        known = own is not None or all(one.is_empty for one in self.seen)
        each = self.replicas.gathered({"u": own, "known": known}, self.capture.layout.device)
        found = [one["u"] / len(each) for one in each if one["u"] is not None]
        return torch.cat(found) if found and all(one["known"] for one in each) else None

    def _own_coordinates(self) -> Tensor | None:
        found: list[Tensor] = []
        for one in self.seen:
            output, cotangent = one.recorded.output, one.recorded.cotangent
            if output is None or cotangent is None:
                return None
            if one.is_empty:
                continue
            if self.fisher.from_user_gradients:  # The rows of what does not count are zero.
                counts = (one.weights != 0).flatten(1).any(1, keepdim=True)
                found.append(one.scale * counts)
                continue
            likelihood = self.likelihood.of_shapes(one.recorded.heads)
            coordinates = self.fisher.coordinates(
                likelihood, output.detach(), cotangent, one.weights
            )
            if coordinates is None:
                return None
            found.append(coordinates)
        return torch.cat(found) if found else None

    def update_fisher(self, output: Any, target: Any = None, loss: Tensor | None = None) -> None:
        """Take the rows of a model output now, before ``loss.backward()``.

        Args:
            output: What the likelihood looks at, with its graph; with several heads, the model's
                output.
            target: The true target; gives ignored events and class weights. With several heads, a
                mapping with their keys.
            loss: The user's loss, whose gradient at the output shows masks, weights and its scale.
        """
        if not self.rows_due or self.capture.on_forward is None:
            return
        self.begin_anew()
        if isinstance(self.capture.select, Selection) and self.capture.passes:
            output = self.capture.passes[-1].output  # The heads were made of it.
        found = self.capture.find_pass(output)
        self.capture.settle(found)
        found.target = None if target is None else found.samples_first(target)
        if self.fisher.from_user_gradients:
            output.register_hook(self._see_later(found))
        else:
            cotangent = None
            # Without the scaling of mixed precision small gradients of float16 vanish.
            if loss is not None and loss.requires_grad and output.dtype != torch.float16:
                with own_backward(loss) as root:
                    (cotangent,) = torch.autograd.grad(
                        root, output, retain_graph=True, allow_unused=True
                    )
                cotangent = None if cotangent is None else found.samples_first(cotangent)
            self._take_rows(self._see(found, cotangent, asked=True, told=True))
            self._tell()
            if not self.replicas.are_alone:
                self._take_part_in_others()
                self._begin_sums()

    def _see_later(self, recorded: ForwardPass) -> Callable[[Tensor], None]:
        def keep(cotangent: Tensor) -> None:
            recorded.cotangent = recorded.samples_first(cotangent.detach())
            if all(one.recorded is not recorded for one in self.seen):
                self._see(recorded, recorded.cotangent)

        return keep

    # The end of a step.

    def finish(self) -> None:
        """Count the step and forget its passes.

        Steps of the warm-up are not counted, so that the first one after it updates and factorises
        whatever the intervals.
        """
        if self.warmup > 0:
            self.warmup -= 1
        else:
            self.steps += 1
        self.renews = False
        self._tell()
        if not (self.replicas.are_alone or self.known_together):
            device = self.capture.layout.device
            self.known_together = self.replicas.any(self.knows_curvature, device)
        self.forget()

    def forget(self) -> None:
        """Forget the passes of the step."""
        if self.isotropy_probe is not None:
            self.isotropy_probe.clear()
        self.seen, self.failures, self.batch_fisher = [], [], None
        self._take_back, self._take_all_back = lambda: None, None
        self.discarded = self.left_gradients = False
        if not self.replicas.are_alone:
            self.curvature.drop_sums()
        if self.audit.active:
            self.audit.drop()
        self.capture.clear()


class ModelWatch:
    """Sees parameters frozen, moved, replaced or renamed, and modules exchanged, in microseconds.

    Args:
        model: The model; what it is now counts as known.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables: list[Any] = [m._parameters for m in modules]
        tables += [m._modules for m in modules]
        # Compiled modules make other objects of what they hold at every look.
        self._tables = [table for table in tables if isinstance(table, dict)]
        self._parameters = list(model.parameters())
        self._kinds = self._present_kinds()
        self._entries = list(self._present())  # Held, so that no other object gets their identity.
        self._identities = list(map(id, self._entries))
        self._names = list(chain.from_iterable(self._tables))

    def _present(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))

    def _present_kinds(self) -> list[Any]:
        return [(p.requires_grad, p.dtype, p.device) for p in self._parameters]

    def sees_frozen(self) -> bool:
        """Return whether parameters were frozen or unfrozen, or brought elsewhere."""
        return self._present_kinds() != self._kinds

    def sees_change(self) -> bool:
        """Return whether anything is not as it was."""
        if self.sees_frozen():
            return True
        same = list(map(id, self._present())) == self._identities
        if (
            same and list(chain.from_iterable(self._tables)) == self._names
        ):  # Pruning renames parameters.
            return False
        # ``torch.func.functional_call`` lends plain tensors for one pass.
        return all(isinstance(one, (nn.Parameter, nn.Module, NoneType)) for one in self._present())
