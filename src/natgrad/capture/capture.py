"""The hook manager: which layers are covered, what a pass records, how it is pulled back."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.capture.blocks import Block, find_blocks, names_by_reason
from natgrad.capture.forward_pass import (
    ForwardPass,
    before_cast,
    call_with_gradient,
    leads_to,
    unviewed,
    user_hook,
    watch_losses,
)
from natgrad.capture.generic import GenericKind
from natgrad.capture.hooks import (
    FirstHook,
    ModelHook,
    called_from_graph,
    inside_backward,
    inside_transform,
    is_pulling_back,
    leave_with,
    outside_graphs,
    present_pass,
    remove_hooks,
)
from natgrad.capture.kinds import LayerCall, LayerKind, is_parameter
from natgrad.capture.model_output import (
    check_watched,
    is_squeezed,
    losses,
    samples_lie_second,
    select_output,
    separated,
    side_by_side,
    substituted,
    unwrap,
)
from natgrad.capture.normalization import batch_norms, fix_statistics, run_outside_graph
from natgrad.capture.product_kinds import is_product, watched_parameters
from natgrad.capture.products import RecordProducts
from natgrad.capture.row_check import RowCheck
from natgrad.capture.row_sources import RecordedCall, RowSources
from natgrad.capture.rows import RowBuilder, RowsUnavailable, batched_gradients, release
from natgrad.distributed.shards import whole
from natgrad.jacobians import Jacobians
from natgrad.layouts import ParameterLayout

#: Forward passes that wait for their backward pass are kept up to so many entries of layers'
#: outputs (2^24 float32 = 64 MiB); beyond, up to so many passes in training and in evaluation mode.
#: A loss may sum many, but those of an evaluation never get one, and hold their graph.
WAITING_ELEMENTS = 2**24
WAITING_PASSES = {True: 64, False: 4}


class Capture:
    """Records layer inputs and output gradients of a model through hooks.

    Hooks are installed once, cost next to nothing while ``recording`` is off, never change what
    the model computes, and disappear with :meth:`remove`. Copies and pickles of the model carry
    inert hooks. Recomputations by non-reentrant gradient checkpointing are not recorded twice.
    Under ``torch.compile`` every captured layer is a graph break. What rows rest on is checked; see
    :class:`natgrad.capture.row_check.RowCheck`.

    Args:
        model: The model; wrappers of DistributedDataParallel and ``torch.compile`` are looked
            through.
        output: Function that picks the tensor the likelihood looks at out of the model's output,
            e.g. ``lambda out: out.logits``. By default the output itself, its ``logits``, or its
            first tensor.
        excluded: Names of parameters that get no rows.
        batch_dim: The dimension of that tensor that holds the samples; by default the first, or
            the second where samples turn out to lie there, as in ``(time, batch, features)``.
        shards: Whether parameters may be spread over processes, which have them whole where rows
            are made.
        sums_coupled: Whether the rows of samples that a layer couples are only ever added up
            (``independent`` in :meth:`pull_back`), so that there is nothing to say of them.
        leaves_complex: Whether complex parameters are uncovered where there are real ones, and not
            refused.

    Attributes:
        blocks: Block name → :class:`Block`, in the order of ``model.named_modules()``.
        uncovered: Parameter name → why no block covers it.
        layout: Order of all trainable parameters, without those that are complex.
        sources: What rows are made of, as far as it is known.
        rows: Makes rows from what a pass recorded.
        row_check: Finds their sources, and that rows are right.
        recording: Whether forward passes are recorded.

    Example:
        >>> with Capture(model) as capture:
        ...     out = model(x)
        ...     vectors = torch.eye(10).unsqueeze(1).expand(10, len(x), 10)
        ...     jacobians = capture.pull_back(out, vectors)
    """

    def __init__(
        self,
        model: nn.Module,
        output: Callable[[Any], Tensor] | None = None,
        *,
        excluded: Collection[str] = (),
        batch_dim: int | None = None,
        shards: bool = False,
        sums_coupled: bool = False,
        leaves_complex: bool = False,
    ) -> None:
        self.model: nn.Module = unwrap(model)
        self.shards: bool = shards
        self.sums_coupled: bool = sums_coupled
        self.leaves_complex: bool = leaves_complex
        if batch_dim is not None and not (isinstance(batch_dim, int) and batch_dim >= 0):
            raise ValueError(
                f"batch_dim must be None or a dimension of the output, from 0 on, got {batch_dim!r}"
            )
        self.select: Callable[[Any], Tensor] | None = output
        self.excluded: frozenset[str] = frozenset(excluded)
        self.batch_dim: int | None = batch_dim
        _check_usable(self.model)
        self.recording = True
        self.passes: list[ForwardPass] = []
        #: Called at the start of every forward pass of the root module.
        self.on_forward: Callable[[], None] | None = None
        #: Called when the user's backward pass reaches the output of a recorded pass.
        self.on_backward: Callable[[ForwardPass], None] | None = None
        #: Called with one sentence about whatever the user should know; a warning by default.
        self.on_finding: Callable[[str], None] = _warn
        #: Whether the user's own output gradients are recorded, and for which blocks.
        self.watching: frozenset[nn.Module] | bool = False
        #: How many dimensions the last output had that had one for the samples.
        self.output_dims: int | None = None
        self._running = _Running()
        self._suspended = False
        self._told: set[str] = set()
        self._handles: list[Any] = []
        leave_with(self, self._handles)
        self._find()

    # Life cycle.

    def _find(self) -> None:
        """Find the blocks of the model as it is now, and watch their layers."""
        self.blocks: dict[str, Block]
        self.uncovered: dict[str, str]
        self.layout: ParameterLayout = ParameterLayout.of(
            self.model, self.shards, self.leaves_complex
        )
        self.blocks, self.uncovered = find_blocks(self.model, self.excluded)
        self._watched = watched_parameters(self.model, self.blocks)
        self.sources: RowSources = RowSources(
            self.model, self.blocks, self._watched, self.tell, tells_coupled=not self.sums_coupled
        )
        self.rows: RowBuilder = RowBuilder(self.sources, self.layout, self._unrecorded, self.shards)
        self.row_check: RowCheck = RowCheck(self.rows)
        for sentence in self.sources.costly(products=False):
            self.tell(sentence)
        self._tell_programs()
        self._present = self._signature()
        self._install()

    def _signature(self) -> list[tuple[Any, ...]]:
        """Return what tells whether other parameters are to be captured, or by other modules."""
        return [
            (name, id(module), p.requires_grad, p.dtype, p.device)
            for name, module in self.model.named_modules(remove_duplicate=False)
            for p in module.parameters(recurse=False)
        ] + [(n, id(p), n in self.excluded) for n, p in self.model.named_parameters()]

    def rescan(self, excluded: Collection[str] | None = None) -> bool:
        """Find blocks anew if parameters were frozen, moved, added, replaced or excluded.

        Recorded passes are forgotten then.

        Args:
            excluded: Names of parameters that get no rows from now on; as before by default.

        Returns:
            Whether anything changed.
        """
        if excluded is not None:
            self.excluded = frozenset(excluded)
        if self._signature() == self._present:
            return False
        self.remove()
        self._find()
        return True

    def tell(self, sentence: str) -> None:
        """Tell the user something, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            self.on_finding(sentence)

    def _tell_programs(self) -> None:
        """Say which modules torch.jit made programs of, whose layers cannot be watched."""
        modules = self.model.named_modules()
        programs = {n: m for n, m in modules if isinstance(m, torch.jit.ScriptModule)}
        own = [n for n, m in programs.items() if any(p.requires_grad for p in m.parameters())]
        outer = [
            repr(n) if n else "the model"
            for n in own
            if not n or n.rpartition(".")[0] not in programs
        ]
        if outer:
            self.tell(
                f"a program that torch.jit made ({', '.join(outer)}) has no layers to be watched: "
                "rows are taken from the gradients at its parameters, exactly, but with a backward "
                "pass per sample, or as one row per batch where the Fisher type is 'mc'; hand the "
                "model over as it was before"
            )

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def _install(self) -> None:
        modules: dict[nn.Module, LayerKind] = {}
        for block in self.blocks.values():
            for use in block.uses:
                modules[use.module] = use.kind
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                hook = ModelHook(self, _after_batch_norm)
                self._handles.append(module.register_forward_hook(hook))
        for module, kind in modules.items():
            if kind.records_inside:
                before = ModelHook(self, functools.partial(_before_recorded, kind))
                after = ModelHook(self, _after_recorded)
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after, always_call=True))
            else:
                hook = ModelHook(self, functools.partial(_after_layer, kind))
                # In tensor parallelism a hook then cuts the output as others want it.
                handle = module.register_forward_hook(hook, with_kwargs=True, prepend=self.shards)
                self._handles.append(handle)
        first = FirstHook(self, _before_model)
        last = ModelHook(self, _after_model)
        self._handles.append(self.model.register_forward_pre_hook(first, prepend=True))
        self._handles.append(self.model.register_forward_hook(last))
        if self._watched:
            closing = ModelHook(self, _stop_products)
            self._handles.append(self.model.register_forward_hook(closing, always_call=True))

    def remove(self) -> None:
        """Remove all hooks and forget everything recorded."""
        remove_hooks(self._handles)
        self.clear()

    def check_covered(self) -> None:
        """Make sure that every trainable parameter has Jacobian rows.

        Raises:
            ValueError: If one has none; the message names it and says why.
        """
        if self.uncovered:
            raise ValueError(
                "some parameters have no Jacobian rows, so the result would miss them: "
                f"{names_by_reason(self.uncovered)}. Freeze them with requires_grad_(False), put "
                "the model in eval mode, or describe the layer with natgrad.register_layer"
            )

    def clear(self) -> None:
        """Forget recorded passes."""
        self.passes.clear()
        self._running.open = None

    def __enter__(self) -> Capture:
        """Return the capture itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        self.remove()

    # Forward hooks.

    def _active(self) -> bool:
        return (
            (self.recording or self.watching is not False)
            and not self._suspended
            and torch.is_grad_enabled()
            and not inside_backward()
            and not inside_transform()
        )

    def _record(self, kind: LayerKind, call: LayerCall) -> None:
        """Keep a layer call and the autograd edges of its outputs."""
        outputs, call.outputs = call.outputs, ()
        # Those of torch.fx are no tensors.
        alive = [isinstance(one, Tensor) and one.requires_grad for one in outputs]
        if not any(alive):
            return
        current = self._running.open or self._open_pass()
        key, shapes = (call.module, call.key), [one.shape for one in outputs]
        place = (*key, current.numbers[key], len(shapes[0]))
        recorded = RecordedCall(call, kind, place, shapes, alive, [one.dtype for one in outputs])
        current.numbers[key] += 1
        current.calls.append(recorded)
        watching = self.watching is True or (self.watching and call.module in self.watching)
        recorded.user_gradients = [None] * len(outputs) if watching else []
        for index, output in enumerate(outputs):
            if alive[index]:
                current.elements += output.numel()
                made = unviewed(output, call.inputs) if len(outputs) == 1 else output
                inside: GradientEdge | None = call.options.pop("edge", None)
                if self.recording:
                    recorded.edges.append(inside or get_gradient_edge(made))
                if watching:
                    call_with_gradient(inside or made, user_hook(current, recorded, index))

    def _watch_products(self) -> None:
        """Record products in this pass: all while rows are to be checked, then those of rows."""
        wanted = self._watched
        if self.sources.checked:
            wanted = [one for one in wanted if one.block in self.sources.by_products]
        if called_from_graph():
            if self.sources.by_products:
                self.sources.forget_products()
        elif wanted and (self.recording or self.watching is True):
            mode = RecordProducts(wanted, self._record)
            if mode.watched or mode.sharded:
                mode.__enter__()  # type: ignore[no-untyped-call]
                self._running.products = mode

    def _forget_product(self, call: LayerCall) -> None:
        """Forget the product inside a layer's call, which counts as the call."""
        current = self._running.open
        if current is None or not call.inputs:
            return
        place, sparse, calls = call.inputs[0].data_ptr(), "sparse" in call.options, current.calls
        for number in range(len(calls) - 1, -1, -1):
            one = calls[number].call
            inside = one.module is call.module and is_product(calls[number].kind)
            copied = sparse and "sparse" in one.options  # Each has a dense copy of its own.
            if inside and (copied or one.inputs[0].data_ptr() == place):
                del calls[number]
                return

    def _open_pass(self) -> ForwardPass:
        opened = self._running.open = ForwardPass(self.rows, self.model, has_edges=self.recording)
        self.passes.append(opened)
        number = WAITING_PASSES[self.model.training]
        while len(self.passes) > number:
            if sum(one.elements for one in self.passes) <= WAITING_ELEMENTS:
                break
            del self.passes[0]
        return opened

    # Pulling back.

    def find_pass(self, output: Tensor) -> ForwardPass:
        """Return the recorded pass that made ``output``.

        Raises:
            RuntimeError: If nothing was recorded.
        """
        for candidate in reversed(self.passes):
            if candidate.output is output or candidate.source is output:
                return candidate
        if not self.passes:
            raise RuntimeError(
                "no forward pass was recorded: call the model with gradients enabled (outside "
                "torch.no_grad and torch.inference_mode) while the capture is recording, then "
                "pull back"
            )
        last = self.passes[-1]
        last.source = output
        if last.heads is None:
            last.batch_dim = self.batch_dim or 0
        last.output = last.samples_first(output)
        return last

    def take_gradient(self, recorded: ForwardPass, cotangent: Tensor) -> None:
        """Keep the gradient of the loss at a pass's own output.

        An output that is an input of a later pass, as in a rollout, also receives what that brings
        to it, which is a part of the rows of the later pass.

        Args:
            recorded: The pass.
            cotangent: What the backward pass brings to its output, laid out as that.
        """
        own, source = recorded.without_later(cotangent), recorded.source
        recorded.cotangent = recorded.samples_first(own)
        others = [one for one in self.passes if one is not recorded and one.source is not None]
        if source is None or not (recorded.has_edges and others) or self.shards:
            return
        places = [cast(Tensor, one.source) for one in others]
        try:
            brought = batched_gradients(
                source, places, own.unsqueeze(0), True, fixed_statistics=False
            )
        except RowsUnavailable:
            return
        for one, gradient in zip(others, brought, strict=True):
            if gradient is not None:
                one.brought_by_later(gradient[0])

    def settle(self, recorded: ForwardPass) -> None:
        """Check the rows of a pass, and bring the samples of its output to the first dimension.

        Does nothing on most passes; see :class:`natgrad.capture.row_check.RowCheck`.
        """
        assert recorded.output is not None
        self._check(recorded, may_turn=self.batch_dim is None)
        if self.sources.time_first and self.batch_dim is None and recorded.batch_dim == 0:
            recorded.lay_samples(1)
            with torch.enable_grad():  # Backward passes run their hooks without.
                recorded.output = recorded.samples_first(recorded.output)
            if recorded.cotangent is not None:
                recorded.cotangent = recorded.samples_first(recorded.cotangent)
            self._check(recorded)
        unknown = self.sources.silent or self.sources.unreached
        if self.watching is True and unknown and recorded.cotangent is not None:
            # The user's own gradients may be the first to reach them, and free the graph.
            self.pull_back(recorded.output, recorded.cotangent.unsqueeze(0), independent=True)

    def _check(self, recorded: ForwardPass, may_turn: bool = False) -> None:
        """Check the rows of a pass; its samples may turn out to lie elsewhere if told so."""
        assert recorded.output is not None
        if not (self.sources.time_first and self.batch_dim is None and not recorded.batch_dim):
            self.sources.begin_pass(recorded.calls, recorded.output)
        if not self.sources.knows(recorded.calls):
            turned = recorded.turned if may_turn else None
            try:
                self.row_check.check(recorded.calls, recorded.output, turned, recorded.like_inputs)
            finally:
                release(recorded.calls)

    def pull_back(
        self,
        output: Tensor,
        vectors: Tensor,
        *,
        retain_graph: bool = True,
        partial: Tensor | None = None,
        independent: bool = False,
    ) -> Jacobians:
        """Pull ``K`` output vectors per sample back to every layer's output.

        Args:
            output: The model output, ``(N, ...)``, with its autograd graph.
            vectors: ``(K, *output.shape)``.
            retain_graph: Keep the graph for a later backward pass.
            partial: Samples of which some event does not count, ``(N,)``: positions of theirs that
                no vector reaches (ignored or padded tokens) are left out of the Kronecker input
                factors. None for none.
            independent: Whether the vectors of different samples are independent with mean zero.
                A layer that couples samples (a table of positions called once for all) then gets
                the sum of their rows as one row: sums of squares of rows are right on average, and
                it takes no backward pass per sample.

        Returns:
            The Jacobian rows of every block that ``output`` depends on. Parameters' ``.grad``
            is not touched.

        Raises:
            RuntimeError: If no forward pass was recorded.
            ValueError: If ``vectors`` does not have the shape ``(K, *output.shape)``.
        """
        if vectors.shape[1:] != output.shape:
            raise ValueError(
                f"vectors must have shape (K, {', '.join(map(str, output.shape))}), "
                f"got {tuple(vectors.shape)}"
            )
        found = self.find_pass(output)
        assert found.output is not None
        if found.output is not output:
            vectors = torch.stack([found.samples_first(one) for one in vectors])
        self._check(found)

        pull, vectors, sources = self.rows.pull_back, vectors.to(output.dtype), self.sources
        given: dict[str, Any] = {"partial": partial, "independent": independent}
        if sources.checked and (sources.silent or sources.unreached):
            rows = pull(found.calls, found.output, vectors, retain_graph=True, **given)
            if sources.checked:
                return rows
            self._check(found)  # Some layers are reached for the first time.
        return pull(found.calls, found.output, vectors, retain_graph=retain_graph, **given)

    def user_jacobians(
        self,
        recorded: ForwardPass,
        scale: float | Tensor = 1.0,
        partial: Tensor | None = None,
        separate: bool = True,
    ) -> Jacobians:
        """Form rows (``K = 1``) from the gradients the user's own backward pass left.

        Args:
            recorded: A pass recorded with ``watching`` on, after the user's backward pass.
            scale: Factor that turns the user's gradients into per-sample ones.
            partial: As in :meth:`pull_back`.
            separate: Leave out blocks whose rows that backward pass has summed over samples; they
                are then in ``sources.inseparable``.

        Returns:
            Rows of the blocks that are as they were in the pass, by what was known of them then.
        """
        maker, calls = recorded.rows, recorded.calls
        rows = maker.user_rows(calls, recorded.samples, scale, partial, separate)
        now, then = self.blocks, maker.sources.blocks
        same = [n for n in rows if n in now and now[n].layout == then[n].layout]
        return rows.of_blocks(same, self.layout)


class _Running(threading.local):
    """What is under way in a thread, as others may run the same model, to evaluate it or to act.

    Attributes:
        open: The pass that is recorded.
        modes: Layers that are recorded while they run, and what records them.
        products: What records products in the pass.
    """

    def __init__(self) -> None:
        self.open: ForwardPass | None = None
        self.modes: list[tuple[nn.Module, TorchFunctionMode]] = []
        self.products: RecordProducts | None = None


def _warn(sentence: str) -> None:
    warnings.warn(f"natgrad: {sentence}", stacklevel=2)


def _check_usable(model: nn.Module) -> None:
    """Refuse models that cannot be watched, and parameters that cannot be worked with."""
    if isinstance(model, torch.jit.RecursiveScriptModule):  # Which takes no hooks.
        raise ValueError(
            "the model itself is a program that torch.jit made, which cannot be watched: hand it "
            "over as it was before it was scripted"
        )
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet: run the model once on a batch, so that its "
                "lazy modules are initialised, and then hand it over"
            )
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was made inside torch.inference_mode(), where nothing can be "
                "differentiated: make the model outside of it"
            )


# Hook bodies run outside compiled graphs: autograd edges are only there in eager code.


@outside_graphs
def _after_batch_norm(capture: Capture, module: nn.Module, args: Any, output: Any) -> Any:
    if not (capture._active() and batch_norms(module)):
        return None
    again = run_outside_graph(module, args, output)
    fix_statistics(module, args[0], output if again is None else again)
    return again


@outside_graphs
def _after_layer(
    kind: LayerKind,
    capture: Capture,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    if not capture._active():
        return
    reason = kind.refuse(module)
    if reason is not None:
        capture.tell(f"a {type(module).__name__} layer is not recorded in this mode: {reason}")
        return
    if isinstance(output, Tensor) and output.is_nested:
        if output.layout is torch.strided:
            raise ValueError(
                f"the output of a {type(module).__name__} layer is a nested tensor of the layout "
                "torch.strided, through which torch takes few derivatives: make the nested inputs "
                "with layout=torch.jagged"
            )
        return  # Rows come from the gradients at the parameters.
    lent = capture.shards and any(map(is_parameter, (*args, *kwargs.values())))
    for call in kind.observe(module, args, kwargs, output):
        if lent:  # Whole while the model runs only, and then without memory.
            call.inputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, call.inputs)
        if capture._running.products is not None and not isinstance(kind, GenericKind):
            capture._forget_product(call)
        capture._record(kind, call)


@outside_graphs
def _before_model(capture: Capture, module: nn.Module, args: Any) -> None:
    if capture._suspended or not torch.is_grad_enabled():
        return
    if inside_backward() or inside_transform():
        return
    if capture.on_forward is not None:
        capture.on_forward()
    capture._running.open = None
    if capture._active():
        capture._open_pass()
        if capture.sources.by_products or not capture.sources.checked:
            capture._watch_products()


@outside_graphs
def _after_model(capture: Capture, module: nn.Module, args: Any, output: Any) -> Any:
    """Watch the output; where it has several heads, return it with heads made of one tensor."""
    current = capture._running.open
    if current is None or not capture._active():
        return None
    capture._running.open = None
    selected, replaced = select_output(output, capture.select), None
    heads: dict[Any, Tensor] = {}
    if isinstance(selected, dict):
        heads, selected = selected, side_by_side(selected)
        current.heads = {key: one.shape for key, one in heads.items()}
        if capture.on_backward is not None:
            copies = separated(selected, heads)
            old = [id(one) for one in heads.values()]
            replaced = substituted(output, dict(zip(old, copies, strict=True)))
            check_watched(capture.select, replaced, copies)
    if selected is None or not selected.requires_grad:
        if current in capture.passes:
            capture.passes.remove(current)
        return None
    if selected.is_nested:
        raise ValueError(
            "the output that the likelihood looks at is a nested tensor, which has no first "
            "dimension of samples: let the model return its values(), or pass output=lambda out: "
            "out.values()"
        )
    squeezed = not heads and is_squeezed(args, selected, capture.output_dims)
    if not (selected.dim() or squeezed):
        raise ValueError(
            "the output that the likelihood looks at is a single number, as a loss is: let the "
            "model return what the loss is computed of, too, and pass output=lambda out: ... to "
            "pick it"
        )
    if selected.is_complex():
        raise ValueError(
            f"the output that the likelihood looks at is {selected.dtype}, and likelihoods are of "
            "real numbers: let the model return real and imaginary part as two, by "
            "torch.view_as_real"
        )
    time_first = capture.sources.time_first and selected.dim() > 1
    current.source, current.is_squeezed = selected, squeezed
    current.like_inputs = samples_lie_second(args, heads or {None: selected})
    if not squeezed:
        capture.output_dims = selected.dim()
        current.lay_samples(int(time_first) if capture.batch_dim is None else capture.batch_dim)
    current.output = current.samples_first(whole(selected))
    if capture.on_backward is None:
        return None
    owner, waiting = weakref.ref(capture), weakref.ref(current)
    watched, current.version = unviewed(selected, ()), selected._version
    if type(selected) is Tensor:
        current.returned = torch.ops.aten._unsafe_view(watched, selected.shape)

    def reached(cotangent: Tensor) -> None:
        found, recorded = owner(), waiting()
        if found is None or is_pulling_back(cotangent):
            return
        if recorded is None:
            found.tell(
                "a backward pass reached the output of a forward pass that was forgotten, so its "
                "rows are missing: an optimizer step came between, or more than "
                f"{WAITING_PASSES[True]} passes (in evaluation mode {WAITING_PASSES[False]}) "
                "waited for it"
            )
            return
        if recorded.purpose == "inputs":
            return
        # With create_graph=True the user may differentiate the output itself (as in a
        # physics-informed loss); whether training backpropagates is seen at the step.
        retained = torch.is_grad_enabled()
        source, returned = recorded.source, recorded.returned
        assert source is not None
        changed = returned is not None and source._version != recorded.version
        if changed and not leads_to(source, returned):
            found.tell(
                "the model's output is changed in place after the model has returned it, as by "
                "out /= 2: curvature is that of a model that returns the new values; write "
                "out = out / 2 to have the change taken for a part of the loss"
            )
            assert returned is not None
            with torch.enable_grad():
                recorded.output = recorded.samples_first(returned)
        recorded.task = present_pass()
        # What is asked for after a pass with create_graph=True, without it, are second derivatives.
        if retained or not (recorded.retained and recorded.purpose == "ask"):
            recorded.retained = retained
            found.take_gradient(recorded, whole(cotangent.detach()).reshape(source.shape))
        if found.on_backward is not None and not retained:
            found.on_backward(recorded)

    def reached_before_cast(cotangent: Tensor) -> None:
        recorded = waiting()
        if recorded is None or recorded.task != present_pass():
            reached(cotangent)

    watched.register_hook(reached)
    made = before_cast(selected) if losses(output) else None
    if made is not None:
        call_with_gradient(made, reached_before_cast)
    if heads:
        watch_losses(current, output, heads, reached)
    return replaced


@outside_graphs
def _stop_products(capture: Capture, module: nn.Module, args: Any, output: Any) -> None:
    mode, capture._running.products = capture._running.products, None
    if mode is not None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


@outside_graphs
def _before_recorded(kind: LayerKind, capture: Capture, module: nn.Module, args: Any) -> None:
    if capture._active():
        mode = kind.recorder(module, functools.partial(capture._record, kind))
        mode.__enter__()
        capture._running.modes.append((module, mode))


@outside_graphs
def _after_recorded(capture: Capture, module: nn.Module, args: Any, output: Any) -> None:
    if capture._running.modes and capture._running.modes[-1][0] is module:
        capture._running.modes.pop()[1].__exit__(None, None, None)
