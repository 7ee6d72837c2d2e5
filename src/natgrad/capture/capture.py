"""The hook manager: which layers are covered, what a pass records, how it is pulled back."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.capture.attention import RecordProjections
from natgrad.capture.batched_backward import batched_gradients
from natgrad.capture.blocks import Block, find_blocks
from natgrad.capture.hooks import (
    ModelHook,
    inside_backward,
    is_pulling_back,
    outside_graphs,
    pulling_back,
)
from natgrad.capture.kinds import BlockRecord, CallGradients, LayerCall, LayerKind, find_kind
from natgrad.capture.model_output import (
    check_watched,
    select_output,
    separated,
    side_by_side,
    substituted,
    unwrap,
)
from natgrad.capture.normalization import batch_norms, fix_statistics
from natgrad.jacobians import Jacobians, LayerJacobian, SumJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["Block", "Capture", "ForwardPass"]

#: Forward passes kept while waiting for their backward pass.
MAX_WAITING_PASSES = 4


@dataclass(eq=False)
class RecordedCall:
    """A layer call together with the places its output gradients can be had from."""

    call: LayerCall
    edges: list[GradientEdge]
    user_gradients: list[Tensor | None] = field(default_factory=list)


@dataclass(eq=False)
class ForwardPass:
    """What one forward pass of the model recorded.

    Attributes:
        calls: Recorded layer calls in order.
        output: The model output the likelihood looks at.
        cotangent: Gradient of the user's loss with respect to it, once backpropagated.
        target: The true target, where the user told it.
        elements: Total number of entries of all recorded layer outputs.
        heads: Key → shape of the heads that are laid side by side in the output, if it has several.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    output: Tensor | None = None
    cotangent: Tensor | None = None
    target: Tensor | None = None
    elements: int = 0
    heads: dict[Any, torch.Size] | None = None

    @property
    def samples(self) -> int:
        """Number of samples ``N``: the output's first dimension."""
        assert self.output is not None
        return int(self.output.shape[0])


class Capture:
    """Records layer inputs and output gradients of a model through hooks.

    Hooks are installed once, cost next to nothing while ``recording`` is off, never change what
    the model computes, and disappear with :meth:`remove`. Copies and pickles of the model carry
    inert hooks. Recomputations by non-reentrant gradient checkpointing are not recorded twice.
    Under ``torch.compile`` every captured layer is a graph break.

    Args:
        model: The model; wrappers of DistributedDataParallel and ``torch.compile`` are looked
            through.
        output: Function that picks the tensor the likelihood looks at out of the model's output,
            e.g. ``lambda out: out.logits``. By default the output itself, its ``logits``, or its
            first tensor.
        excluded: Names of parameters that get no rows.

    Attributes:
        blocks: Block name → :class:`Block`, in the order of ``model.named_modules()``.
        uncovered: Parameter name → why no block covers it.
        layout: Order of all trainable parameters.
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
    ) -> None:
        self.model = unwrap(model)
        self.select, self.excluded = output, frozenset(excluded)
        self.recording = True
        self.passes: list[ForwardPass] = []
        #: Called at the start of every forward pass of the root module.
        self.on_forward: Callable[[], None] | None = None
        #: Called when the user's backward pass reaches the output of a recorded pass.
        self.on_backward: Callable[[ForwardPass], None] | None = None
        #: Whether the user's own output gradients are recorded, and for which blocks.
        self.watching: frozenset[nn.Module] | bool = False
        self._open: ForwardPass | None = None
        self._suspended = False
        self._modes: list[RecordProjections] = []
        self._warned: set[str] = set()
        self._shared: dict[nn.Module, bool] = {}  # As found for calls whose shape does not tell.
        self._handles: list[Any] = []
        self._find()

    # Life cycle.

    def _find(self) -> None:
        """Find the blocks of the model as it is now, and watch their layers."""
        self.layout = ParameterLayout.of(self.model)
        self.blocks, self.uncovered = find_blocks(self.model, self.excluded)
        self._present = self._signature()
        self._install()

    def _signature(self) -> list[tuple[str, int, bool]]:
        """Return what tells whether other parameters are to be captured, or by other modules."""
        return [
            (name, id(module), p.requires_grad)
            for name, module in self.model.named_modules(remove_duplicate=False)
            for p in module.parameters(recurse=False)
        ] + [(n, id(p), n in self.excluded) for n, p in self.model.named_parameters()]

    def rescan(self, excluded: Collection[str] | None = None) -> bool:
        """Find blocks anew if parameters were frozen, unfrozen, added, replaced or excluded.

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

    def _install(self) -> None:
        modules: dict[nn.Module, LayerKind] = {}
        for block in self.blocks.values():
            for use in block.uses:
                modules[use.module] = use.kind
        for module, kind in modules.items():
            if isinstance(module, nn.MultiheadAttention):
                before = ModelHook(self, _before_attention)
                after = ModelHook(self, _after_attention)
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after, always_call=True))
            else:
                hook = ModelHook(self, functools.partial(_after_layer, kind))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for module in self.model.modules():
            if module not in modules and isinstance(module, nn.modules.batchnorm._BatchNorm):
                hook = ModelHook(self, Capture._after_plain_batch_norm)
                self._handles.append(module.register_forward_hook(hook))
        first = ModelHook(self, _before_model)
        last = ModelHook(self, _after_model)
        self._handles.append(self.model.register_forward_pre_hook(first, prepend=True))
        self._handles.append(self.model.register_forward_hook(last))

    def remove(self) -> None:
        """Remove all hooks and forget everything recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def check_covered(self) -> None:
        """Make sure that every trainable parameter has Jacobian rows.

        Raises:
            ValueError: If one has none; the message names it and says why.
        """
        if self.uncovered:
            reasons = "; ".join(f"{name} ({why})" for name, why in self.uncovered.items())
            raise ValueError(
                "some parameters have no Jacobian rows, so the result would miss them: "
                f"{reasons}. Freeze them with requires_grad_(False), put the model in eval mode, "
                "or describe the layer with natgrad.register_layer"
            )

    def clear(self) -> None:
        """Forget recorded passes."""
        self.passes.clear()
        self._open = None

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
        )

    def _after_plain_batch_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._active() and batch_norms(module):
            fix_statistics(module, args[0], output)

    def _record(self, call: LayerCall) -> None:
        """Keep a layer call and the autograd edges of its outputs."""
        outputs = call.outputs
        call.outputs = ()
        live = [o if o.requires_grad else None for o in outputs]
        if not any(o is not None for o in live):
            return
        recorded = RecordedCall(call, [])
        if self.recording:
            recorded.edges = [cast(Any, None if o is None else get_gradient_edge(o)) for o in live]
        watching = self.watching
        if watching is True or (watching and call.module in watching):
            recorded.user_gradients = [None] * len(outputs)
            for index, output in enumerate(live):
                if output is not None:
                    output.register_hook(self._user_hook(recorded, index))
        if self._open is None:
            self._open_pass()
        assert self._open is not None
        self._open.calls.append(recorded)
        self._open.elements += sum(o.numel() for o in live if o is not None)

    def _user_hook(self, recorded: RecordedCall, index: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if not is_pulling_back(gradient):
                recorded.user_gradients[index] = gradient.detach()

        return keep

    def _open_pass(self) -> None:
        self._open = ForwardPass()
        self.passes.append(self._open)
        del self.passes[:-MAX_WAITING_PASSES]

    # Pulling back.

    def find_pass(self, output: Tensor) -> ForwardPass:
        """Return the recorded pass that made ``output``.

        Raises:
            RuntimeError: If nothing was recorded.
        """
        for candidate in reversed(self.passes):
            if candidate.output is output:
                return candidate
        if not self.passes:
            raise RuntimeError(
                "no forward pass was recorded: call the model with gradients enabled while the "
                "capture is recording, then pull back"
            )
        last = self.passes[-1]
        last.output = output
        return last

    def pull_back(
        self,
        output: Tensor,
        vectors: Tensor,
        *,
        retain_graph: bool = True,
        skip_silent: bool = False,
        independent: bool = False,
    ) -> Jacobians:
        """Pull ``K`` output vectors per sample back to every layer's output.

        Args:
            output: The model output, ``(N, ...)``, with its autograd graph.
            vectors: ``(K, *output.shape)``.
            retain_graph: Keep the graph for a later backward pass.
            skip_silent: Leave positions no vector reaches (ignored or padded tokens) out of the
                Kronecker input factors.
            independent: Whether the vectors of different samples are independent with mean zero.
                A layer called once for all samples (a table of positions) then gets the sum of
                their rows as one row: sums of squares of rows are right on average, and it takes
                no backward pass per sample.

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
        edges = [edge for call in found.calls for edge in call.edges if edge is not None]
        if not edges or not output.requires_grad:
            return Jacobians(self.layout, {}, int(output.shape[0]), int(vectors.shape[0]))
        vectors = vectors.to(output.dtype)
        with pulling_back():
            shared = self._shared_calls(found, output)
            split = {} if independent else _sample_by_sample(output, shared, vectors)
            gradients = batched_gradients(output, edges, vectors, retain_graph)
        remaining = iter(gradients)
        calls = []
        for recorded in found.calls:
            own = [None if edge is None else next(remaining) for edge in recorded.edges]
            call = recorded.call
            if recorded in shared:
                call, own = _for_each_sample(
                    call, split.get(recorded, own), recorded in split, int(output.shape[0])
                )
            calls.append((call, own))
        return self._jacobians(calls, int(output.shape[0]), int(vectors.shape[0]), skip_silent)

    def _shared_calls(self, found: ForwardPass, output: Tensor) -> list[RecordedCall]:
        """Return the calls that serve all samples at once.

        Where the size of the input could be that of a batch, the samples that a backward pass from
        the first sample reaches decide, once per layer.
        """
        samples = int(output.shape[0])
        candidates = [
            recorded
            for recorded in found.calls
            if samples > 1
            and any(edge is not None for edge in recorded.edges)
            and _may_be_shared(recorded.call)
        ]
        unknown = [
            recorded
            for recorded in candidates
            if recorded.call.inputs[0].shape[:1].numel() % samples == 0
            and recorded.call.module not in self._shared
        ]
        if unknown:
            probe = torch.zeros_like(output)
            generator = torch.Generator(output.device).manual_seed(0)
            probe[0].normal_(generator=generator)
            edges = [recorded.edges[0] for recorded in unknown]
            reached = batched_gradients(output, edges, probe.unsqueeze(0), True)
            for recorded, gradient in zip(unknown, reached, strict=True):
                if gradient is not None and bool(gradient.isfinite().all()):
                    others = gradient[0, gradient.shape[1] // samples :]
                    self._shared[recorded.call.module] = bool(others.any())
        return [recorded for recorded in candidates if self._is_shared(recorded.call, samples)]

    def _is_shared(self, call: LayerCall, samples: int) -> bool:
        size = call.inputs[0].shape[:1].numel()
        return size % samples != 0 or self._shared.get(call.module, False)

    def _warn_shared(self, module: nn.Module) -> None:
        name = next((n for n, m in self.model.named_modules() if m is module), "")
        if name in self._warned:
            return
        self._warned.add(name)
        warnings.warn(
            f"{name!r} is called once for all samples, so the training gradient has no rows of "
            "single samples for it and the curvature leaves it out: use fisher='exact' or 'mc', or "
            "give it an index per sample",
            stacklevel=4,
        )

    def user_jacobians(
        self, recorded: ForwardPass, scale: float | Tensor = 1.0, skip_silent: bool = False
    ) -> Jacobians:
        """Form rows (``K = 1``) from the gradients the user's own backward pass left.

        Args:
            recorded: A pass recorded with ``watching`` on, after the user's backward pass.
            scale: Factor that turns the user's gradients into per-sample ones.
            skip_silent: As in :meth:`pull_back`.
        """
        calls = []
        for call in recorded.calls:
            own = [
                None if g is None else _scaled(g, scale).unsqueeze(0) for g in call.user_gradients
            ]
            if not any(g is not None for g in own):
                continue
            if _may_be_shared(call.call) and self._is_shared(call.call, recorded.samples):
                self._warn_shared(call.call.module)
                continue
            calls.append((call.call, own))
        return self._jacobians(calls, recorded.samples, 1, skip_silent)

    def _jacobians(
        self,
        calls: list[CallGradients],
        samples: int,
        directions: int,
        skip_silent: bool,
    ) -> Jacobians:
        by_module: dict[nn.Module, list[CallGradients]] = {}
        order: dict[nn.Module, int] = {}
        for call, gradients in calls:
            order.setdefault(call.module, len(order))
            if any(g is not None for g in gradients):
                by_module.setdefault(call.module, []).append((call, gradients))
        result: dict[str, LayerJacobian] = {}
        self._suspended = True
        try:
            with torch.no_grad(), torch.autocast(_device_type(calls), enabled=False):
                for name in self._call_order(order):
                    jacobian = _block_jacobian(self.blocks[name], by_module, samples, skip_silent)
                    if jacobian is not None:
                        result[name] = jacobian
        finally:
            self._suspended = False
        return Jacobians(self.layout, result, samples, directions)

    def _call_order(self, order: dict[nn.Module, int]) -> list[str]:
        """Return block names in order of their layers' first call."""

        def first_call(name: str) -> int:
            return min(order.get(use.module, len(order)) for use in self.blocks[name].uses)

        return sorted(self.blocks, key=first_call)


def _may_be_shared(call: LayerCall) -> bool:
    kind = find_kind(call.module)
    return kind is not None and kind.may_be_shared


def _sample_by_sample(
    output: Tensor, shared: list[RecordedCall], vectors: Tensor
) -> dict[RecordedCall, list[Tensor | None]]:
    """Return the output gradients ``(K, N, *output.shape)`` of calls that serve all samples."""
    if not shared:
        return {}
    edges = [recorded.edges[0] for recorded in shared]
    columns: list[list[Tensor | None]] = []
    for sample in range(vectors.shape[1]):
        single = torch.zeros_like(vectors)
        single[:, sample] = vectors[:, sample]
        columns.append(batched_gradients(output, edges, single, True))
    result: dict[RecordedCall, list[Tensor | None]] = {}
    for index, recorded in enumerate(shared):
        column = [gradients[index] for gradients in columns]
        whole = next((g for g in column if g is not None), None)
        if whole is not None:
            filled = [torch.zeros_like(whole) if g is None else g for g in column]
            result[recorded] = [torch.stack(filled, 1)]
    return result


def _for_each_sample(
    call: LayerCall, gradients: list[Tensor | None], split: bool, samples: int
) -> CallGradients:
    """Write a call that serves all samples as one call per sample.

    Its output gradients are ``(K, N, *output.shape)`` if ``split``, otherwise
    ``(K, *output.shape)``, summed over samples; these become the first sample's.
    """
    inputs = call.inputs[0]
    inputs = inputs.expand(samples, *inputs.shape)
    (gradient,) = gradients
    if gradient is not None and not split:
        rest = gradient.new_zeros(gradient.shape[0], samples - 1, *gradient.shape[1:])
        gradient = torch.cat([gradient.unsqueeze(1), rest], 1)
    return replace(call, inputs=(inputs,)), [gradient]


def _block_jacobian(
    block: Block,
    by_module: Mapping[nn.Module, list[CallGradients]],
    samples: int,
    skip_silent: bool,
) -> LayerJacobian | None:
    records: dict[tuple[LayerKind, BlockLayout], BlockRecord] = {}
    for use in block.uses:
        calls = [one for one in by_module.get(use.module, []) if one[0].key in use.keys]
        if calls:
            # Layers of one kind that share a parameter are calls of one layer.
            empty = BlockRecord(use.layout, use.names, [], samples, skip_silent)
            records.setdefault((use.kind, use.layout), empty).calls.extend(calls)
    parts = [kind.jacobian(record) for (kind, _), record in records.items()]
    if not parts:
        return None
    if len(parts) == 1 and (len(block.uses) == 1 or _same_form(parts[0].layout, block.layout)):
        return parts[0]
    return SumJacobian(parts, block.layout)


def _same_form(left: BlockLayout, right: BlockLayout) -> bool:
    """Return whether two layouts of one parameter have matrices of the same form."""
    forms = [(item.groups, item.d_out, item.d_augmented, item.transposed) for item in (left, right)]
    return forms[0] == forms[1]


# Hook bodies run outside compiled graphs: autograd edges are only there in eager code.


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
        name = type(module).__name__
        if name not in capture._warned:
            capture._warned.add(name)
            warnings.warn(
                f"natgrad does not record a {name} layer in this mode: {reason}", stacklevel=3
            )
        return
    if batch_norms(module):
        fix_statistics(module, args[0], output)
    for call in kind.observe(module, args, kwargs, output):
        capture._record(call)


@outside_graphs
def _before_model(capture: Capture, module: nn.Module, args: Any) -> None:
    if capture._suspended or not torch.is_grad_enabled() or inside_backward():
        return
    if capture.on_forward is not None:
        capture.on_forward()
    capture._open = None
    if capture._active():
        capture._open_pass()


@outside_graphs
def _after_model(capture: Capture, module: nn.Module, args: Any, output: Any) -> Any:
    """Watch the output; where it has several heads, return it with heads made of one tensor."""
    current = capture._open
    if current is None or not capture._active():
        return None
    capture._open = None
    selected, replaced = select_output(output, capture.select), None
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
    current.output = selected
    if capture.on_backward is None:
        return None
    owner, waiting = weakref.ref(capture), weakref.ref(current)

    def reached(cotangent: Tensor) -> None:
        found, recorded = owner(), waiting()
        # create_graph=True means the user differentiates the output itself (as in a
        # physics-informed loss), not that training backpropagates.
        if found is None or recorded is None or torch.is_grad_enabled():
            return
        if is_pulling_back(cotangent):
            return
        recorded.cotangent = cotangent.detach()
        if found.on_backward is not None:
            found.on_backward(recorded)

    selected.register_hook(reached)
    return replaced


@outside_graphs
def _before_attention(capture: Capture, module: nn.Module, args: Any) -> None:
    if capture._active():
        mode = RecordProjections(cast(nn.MultiheadAttention, module), capture._record)
        mode.__enter__()
        capture._modes.append(mode)


@outside_graphs
def _after_attention(capture: Capture, module: nn.Module, args: Any, output: Any) -> None:
    if capture._modes and capture._modes[-1].module is module:
        capture._modes.pop().__exit__(None, None, None)


def _scaled(gradient: Tensor, scale: float | Tensor) -> Tensor:
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient * scale


def _device_type(calls: list[CallGradients]) -> str:
    for _, gradients in calls:
        for gradient in gradients:
            if gradient is not None:
                return gradient.device.type
    return "cpu"
