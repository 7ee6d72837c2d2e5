"""Recurrent layers: every matrix in them is a linear map, shared over time.

The layer runs once more on all samples, step by step, and the gradients of its outputs are pulled
back through time to the inputs of the nonlinearities, for all vectors together. With δ there, a
layer's rows are those of a linear map of the inputs ``x_t``, of another one of the earlier states
``h_{t−1}``, and with ``proj_size`` of a third one of the states that are projected.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from natgrad.capture.generic import floating_tensors
from natgrad.capture.kinds import BlockRecord, LayerCall, LayerKind, register_kind
from natgrad.distributed.shards import whole
from natgrad.jacobians import LayerJacobian

#: Layers whose outputs this module has computed as they do.
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# Inputs (B, T, d_in), output gradients (B, K, T, d_out), and which positions are real (B, T).
_Rows = tuple[Tensor, Tensor, "Tensor | None"]


class CellKind(LayerKind):
    """RNNCell, LSTMCell and GRUCell: one step."""

    own_layout: ClassVar[bool] = True

    def suffixes(self, module: nn.Module) -> list[str]:
        """Return the ends of the parameters' names, one per layer and direction."""
        return [""]

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        """Return the maps of inputs and of states, each with its bias."""
        present = {name for name, _ in module.named_parameters(recurse=False)}
        groups = [
            tuple(n for n in (f"weight_{part}{end}", f"bias_{part}{end}") if n in present)
            for end in self.suffixes(module)
            for part in ("ih", "hh", "hr")
        ]
        return [group for group in groups if group]

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse layers within which a parameter occurs twice."""
        own = list(module.named_parameters(recurse=False, remove_duplicate=False))
        if len({id(p) for _, p in own}) < len(own):
            return "shares a parameter among its own layers"
        return None

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Keep the input, the initial state and how sequences are packed."""
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        inputs, state = given["input"], given.get("hx")
        options: dict[str, Any] = {}
        if isinstance(inputs, PackedSequence):
            options["packing"] = _Packing(*inputs[1:])
            inputs = inputs.data
        states = () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)
        options["state"] = [one.detach() for one in states]
        outputs = tuple(floating_tensors(output))
        options["shapes"] = [one.shape for one in outputs]
        options["nested"] = len(outputs) == 2 and _is_made_of(outputs[0], outputs[1])
        if module not in _known:
            options["recorded"] = [one.detach().clone() for one in outputs]
        return [LayerCall(module, "", (inputs.detach(),), outputs, options)]

    def samples_first(self, call: LayerCall, gradients: Tensor) -> Tensor | None:
        """Return the gradients of one output, ``(K, B, ...)``."""
        return gradients if len(call.options["shapes"][0]) == 2 else gradients.unsqueeze(1)

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form the rows of one linear map, its positions being steps in time."""
        parameter = block.calls[0][0].module.get_parameter(block.names[0])
        pairs: list[tuple[Tensor, Tensor]] = []
        active: list[Tensor] = []
        packed = False
        for call, gradients in block.calls:
            (name,) = [n for n, p in call.module.named_parameters(recurse=False) if p is parameter]
            a, d, real = self._rows(call, gradients)[name.split("_", 1)[1]]
            packed |= real is not None
            real = torch.ones_like(a[..., 0]) if real is None else real.to(a.dtype)
            a, d, real = (_of_samples(one, call, block.samples) for one in (a, d, real))
            d = d.transpose(1, 2)  # (N, r, K, T, d_out) to (N, K, r, T, d_out)
            a = a.flatten(1, 2)[..., : block.layout.d_in]
            pairs.append((a.unsqueeze(2), d.flatten(2, 3).unsqueeze(3)))
            active.append(real.flatten(1, 2))
        rows = block.linear(pairs)
        if packed:
            real = torch.cat(active, 1)
            loud = rows.active_positions
            rows.active_positions = real if loud is None else real * loud
        return rows

    def _rows(self, call: LayerCall, gradients: list[Tensor | None]) -> dict[str, _Rows]:
        """Return the rows of every linear map, made once for all blocks of the layer."""
        kept = call.options.get("rows")
        if kept is not None and len(kept[0]) == len(gradients):
            if all(a is b for a, b in zip(kept[0], gradients, strict=True)):
                return cast("dict[str, _Rows]", kept[1])
        rows = self._pulled_back(call, gradients)
        call.options["rows"] = list(gradients), rows
        return rows

    def _pulled_back(self, call: LayerCall, gradients: list[Tensor | None]) -> dict[str, _Rows]:
        module = cast(nn.LSTMCell, call.module)

        def stacked(states: Sequence[Tensor | None]) -> list[Any]:
            """Lay states out as those of one layer, ``(..., 1, B, h)``."""
            size = module.hidden_size
            return [
                None if one is None else one.reshape(*one.shape[:-2], 1, -1, size)
                if one.dim() > 1 else one.reshape(1, 1, size)
                for one in states
            ]  # fmt: skip

        x = call.inputs[0].reshape(1, -1, module.input_size)
        network = _Network(module, [""], 1, x, stacked(call.options["state"]), None)
        network.nested = call.options["nested"]
        if "recorded" in call.options:
            network.expected = None, stacked(call.options.pop("recorded"))
        single = len(call.options["shapes"][0]) == 1
        last = [g.unsqueeze(1) if single and g is not None else g for g in gradients]
        return network.rows(None, stacked(last))


class RecurrentKind(CellKind):
    """RNN, LSTM and GRU, of any number of layers and directions."""

    def suffixes(self, module: nn.Module) -> list[str]:
        """Return the ends of the parameters' names, one per layer and direction."""
        net = cast(nn.LSTM, module)
        ways = ("", "_reverse") if net.bidirectional else ("",)
        return [f"_l{layer}{way}" for layer in range(net.num_layers) for way in ways]

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse dropout between layers."""
        net = cast(nn.LSTM, module)
        if net.training and net.dropout > 0 and net.num_layers > 1:
            return "dropout makes its output random in training mode"
        return super().refuse(module)

    def samples_first(self, call: LayerCall, gradients: Tensor) -> Tensor | None:
        """Return the gradients of the first output, or those of a state, ``(K, B, ...)``."""
        if gradients.shape[1:] == call.options["shapes"][0]:
            return self._time_first(call, gradients).transpose(1, 2)
        return gradients.unsqueeze(1) if gradients.dim() == 3 else gradients.transpose(1, 2)

    def _time_first(self, call: LayerCall, tensor: Tensor) -> Tensor:
        """Return ``(K, T, B, d)`` of what is laid out as the call's sequences are."""
        packing = call.options.get("packing")
        if packing is not None:
            return cast(_Packing, packing).padded(tensor)
        if tensor.dim() == 3:  # One sequence, without a batch.
            return tensor.unsqueeze(2)
        return tensor.transpose(1, 2) if cast(nn.LSTM, call.module).batch_first else tensor

    def _pulled_back(self, call: LayerCall, gradients: list[Tensor | None]) -> dict[str, _Rows]:
        module, packing = cast(nn.LSTM, call.module), call.options.get("packing")

        def batched(states: Sequence[Tensor | None], dims: int) -> list[Any]:
            return [s if s is None or s.dim() == dims else s.unsqueeze(-2) for s in states]

        x = self._time_first(call, call.inputs[0].unsqueeze(0))[0]
        ways, active = 1 + module.bidirectional, None if packing is None else packing.active
        states = batched(call.options["state"], 3)
        network = _Network(module, self.suffixes(module), ways, x, states, active)
        if "recorded" in call.options:
            first, *finals = call.options.pop("recorded")
            sequence = self._time_first(call, first.unsqueeze(0))[0]
            network.expected = sequence, batched(finals, 3)
        top = None if gradients[0] is None else self._time_first(call, gradients[0])
        return network.rows(top, batched(gradients[1:], 4))


@dataclass(frozen=True, eq=False)
class _Packing:
    """How sequences of several lengths are packed, longest first.

    Attributes:
        batch_sizes: How many sequences go on at each step, ``(T,)``.
        sorted_indices: Which sequence of the batch is the i-th longest; None for i.
        unsorted_indices: The inverse.
    """

    batch_sizes: Tensor
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None

    @property
    def active(self) -> Tensor:
        """Which sequences of the batch go on, ``(T, B)``."""
        sizes = self.batch_sizes
        sorted_ones = torch.arange(int(sizes[0])) < sizes.unsqueeze(1)
        return self._in_order(sorted_ones, 1)

    def _in_order(self, tensor: Tensor, dim: int) -> Tensor:
        order = self.unsorted_indices
        return tensor if order is None else tensor.index_select(dim, order.to(tensor.device))

    def padded(self, packed: Tensor) -> Tensor:
        """Turn ``(K, ΣT, d)`` into ``(K, T, B, d)`` in the order of the batch, with zeros."""
        sizes = self.batch_sizes.tolist()
        shape = (packed.shape[0], len(sizes), sizes[0], packed.shape[-1])
        result = packed.new_zeros(shape)
        for step, piece in enumerate(packed.split(sizes, 1)):
            result[:, step, : piece.shape[1]] = piece
        return self._in_order(result, 2)


def _is_made_of(later: Tensor, earlier: Tensor) -> bool:
    """Return whether a tensor is computed from another one by a few operations."""
    found = [later.grad_fn]
    for _ in range(3):
        found = [one for node in found if node is not None for one, _ in node.next_functions]
        if earlier.grad_fn is not None and earlier.grad_fn in found:
            return True
    return False


def _of_samples(tensor: Tensor, call: LayerCall, samples: int) -> Tensor:
    """Return ``(B, ...)`` as ``(N, r, ...)``; refuse a batch that is no multiple of N."""
    if tensor.shape[0] % samples:
        raise ValueError(
            f"a {type(call.module).__name__} saw a batch of {tensor.shape[0]} sequences, which is "
            f"no multiple of the {samples} samples in the model's output"
        )
    tensor = call.axis.samples_first(tensor, samples)
    by_sample: Tensor = tensor.unflatten(0, (samples, -1))
    return by_sample


# -- the layer, run once more ----------------------------------------------------------------------


class _Network:
    """A recurrent layer and one batch of sequences.

    Args:
        module: The layer.
        suffixes: Ends of its parameters' names, by layer and direction.
        ways: Number of directions.
        x: Inputs, ``(T, B, d)``.
        states: Initial states ``(L·ways, B, ·)``, one or two; none for zeros.
        active: Which sequences go on at each step, ``(T, B)``; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        suffixes: Sequence[str],
        ways: int,
        x: Tensor,
        states: Sequence[Tensor],
        active: Tensor | None,
    ) -> None:
        self.module, self.suffixes, self.ways = module, suffixes, ways
        self.x, self.states, self.active = x, states, active
        #: Whether the gradient of the cell state holds already what comes through the hidden state.
        self.nested = False
        #: What it returned, as outputs ``(T, B, d)`` and final states; None if that is not checked.
        self.expected: tuple[Tensor | None, list[Tensor]] | None = None

    def rows(self, top: Tensor | None, last: Sequence[Tensor | None]) -> dict[str, _Rows]:
        """Return inputs and δ of every linear map, from gradients of outputs and final states."""
        dtype = torch.float32
        for one in (top, *last):
            dtype = dtype if one is None else torch.promote_types(dtype, one.dtype)
        runs, sequence = self._run(dtype)
        self._compare(runs, sequence)
        if self.nested and isinstance(runs[0], _LSTM):
            runs[0].to_cell = torch.zeros_like(runs[0].to_cell)
        result: dict[str, _Rows] = {}
        above = None if top is None else top.to(dtype)
        for number in reversed(range(len(runs))):
            run, way = runs[number], number % self.ways
            if way == self.ways - 1:
                below: Tensor | None = None
            own = None
            if above is not None:
                width = above.shape[-1] // self.ways
                own = above[..., way * width : (way + 1) * width]
                own = own.flip(1) if way else own
            ends = [None if g is None else g[:, number].to(dtype) for g in last]
            found = run.pull_back(own, ends)
            real = None if run.active is None else run.active.T
            for part, a, d in found:
                pair = a.transpose(0, 1), d.permute(2, 0, 1, 3)
                result[part + self.suffixes[number]] = (*pair, real)
                if part == "ih" and number >= self.ways:
                    share = d @ run.weights.inputs
                    share = share.flip(1) if way else share
                    below = share if below is None else below + share
            if way == 0:
                above = below
        return result

    def _run(self, dtype: torch.dtype) -> tuple[list[_Run], Tensor]:
        """Return the run of every layer and direction, and the last layer's output."""
        sequence = self.x.to(dtype)
        runs: list[_Run] = []
        active = None if self.active is None else self.active.to(sequence.device)
        cell = next(run for kinds, run in _RUNS if isinstance(self.module, kinds))
        for start in range(0, len(self.suffixes), self.ways):
            outputs = []
            for way in range(self.ways):
                number = start + way
                weights = _Weights.of(self.module, self.suffixes[number], dtype)
                states = [one[number].to(dtype) for one in self.states]
                x = sequence.flip(0) if way else sequence
                mask = active.flip(0) if way and active is not None else active
                run = cell(self.module, weights, x, states, mask)
                runs.append(run)
                outputs.append(run.outputs.flip(0) if way else run.outputs)
            sequence = outputs[0] if self.ways == 1 else torch.cat(outputs, -1)
        return runs, sequence

    def _compare(self, runs: list[_Run], sequence: Tensor) -> None:
        """Refuse an output of the layer that is not, but for rounding, what was computed."""
        if self.expected is None:
            return
        outputs, finals = self.expected
        pairs = [
            (torch.stack([run.finals[i] for run in runs]), one) for i, one in enumerate(finals)
        ]
        if outputs is not None:
            mask = None if self.active is None else self.active.to(sequence).unsqueeze(-1)
            pairs.append((sequence if mask is None else sequence * mask, outputs))
        for own, other in pairs:
            limit = 10 * torch.finfo(other.dtype).eps ** 0.5 * other.norm().clamp(min=1e-3)
            if not bool((own - other.to(own.dtype)).norm() <= limit):
                raise ValueError(
                    f"a {type(self.module).__name__} returned something else than its formula "
                    "gives: rows of such a layer are not known"
                )
        _known.add(self.module)


@dataclass(frozen=True, eq=False)
class _Weights:
    """The matrices of one layer and direction.

    Attributes:
        inputs: ``W_ih``, ``(g·h, d)``.
        states: ``W_hh``, ``(g·h, h_out)``.
        input_bias: ``b_ih``, if there is one.
        state_bias: ``b_hh``, if there is one.
        projection: ``W_hr``, ``(h_out, h)``, if there is one.
    """

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, suffix: str, dtype: torch.dtype) -> _Weights:
        def named(name: str) -> Any:
            value = getattr(module, name + suffix, None)
            return None if value is None else whole(value.detach()).to(dtype)

        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return cls(*map(named, names))


class _Run(ABC):
    """One layer, in one direction, over all steps.

    Args:
        module: The layer.
        weights: Its matrices.
        x: Inputs, ``(T, B, d)``.
        states: Initial states, ``(B, ·)`` each; none for zeros.
        active: Which sequences go on at each step, ``(T, B)``; the others keep their state.
    """

    #: Number of states.
    states: ClassVar[int] = 1

    def __init__(
        self,
        module: nn.Module,
        weights: _Weights,
        x: Tensor,
        states: Sequence[Tensor],
        active: Tensor | None,
    ) -> None:
        self.module, self.weights, self.x, self.active = module, weights, x, active
        self.mask = None if active is None else active.unsqueeze(-1)
        if not states:
            projection, width = weights.projection, weights.states.shape[1]
            widths = [width, width if projection is None else projection.shape[1]]
            states = [x.new_zeros(x.shape[1], w) for w in widths[: self.states]]
        now = list(states)
        through = functional.linear(x, weights.inputs, weights.input_bias)
        earlier, outputs, kept = [], [], []
        for step in range(len(x)):
            earlier.append(now[0])
            fed = functional.linear(now[0], weights.states, weights.state_bias)
            after, memory = self.forward(through[step], fed, now)
            if weights.projection is not None:
                memory = (*memory, after[0])
                after[0] = functional.linear(after[0], weights.projection)
            if self.mask is not None:
                after = [
                    torch.where(self.mask[step], b, a) for a, b in zip(now, after, strict=True)
                ]
            now = after
            outputs.append(now[0])
            kept.append(memory)
        self.earlier, self.outputs, self.finals = torch.stack(earlier), torch.stack(outputs), now
        memories = [torch.stack(one) for one in zip(*kept, strict=True)]
        self.projected = memories.pop() if weights.projection is not None else None
        self.prepare(*memories)

    @abstractmethod
    def forward(
        self, through: Tensor, fed: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Take a step from ``W_ih x + b_ih`` and ``W_hh h + b_hh``, ``(B, g·h)`` each.

        Return the states after it, and what :meth:`prepare` needs.
        """

    @abstractmethod
    def prepare(self, *memories: Tensor) -> None:
        """Compute derivatives of all steps, from what steps returned, ``(T, B, ·)`` each."""

    @abstractmethod
    def backward(
        self, step: int, to_inputs: Tensor, to_states: Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Pull gradients of the states after a step back through its nonlinearities.

        Args:
            step: The step.
            to_inputs: Receives δ at ``W_ih x + b_ih``, ``(K, B, g·h)``.
            to_states: Receives δ at ``W_hh h + b_hh``; for most cells the same tensor.
            gradients: With respect to the states after it.

        Returns:
            What reaches the hidden state before it other than through ``W_hh``, None for nothing,
            and what reaches the other states.
        """

    def pull_back(
        self, outputs: Tensor | None, finals: Sequence[Tensor | None]
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Return inputs ``(T, B, d)`` and δ ``(K, T, B, d)`` of each linear map, by its name."""
        weights, x = self.weights, self.x
        directions = next((len(g) for g in (outputs, *finals) if g is not None), 0)
        to_states = x.new_empty(directions, *x.shape[:2], len(weights.states))
        to_inputs = torch.empty_like(to_states) if isinstance(self, _GRU) else to_states
        projected = None
        if weights.projection is not None:
            projected = x.new_empty(directions, *self.outputs.shape)
        gradients = [
            x.new_zeros(directions, *state.shape) if g is None else g
            for state, g in zip(self.finals, finals, strict=True)
        ]
        for step in reversed(range(len(x))):
            if outputs is not None:
                gradients[0] = gradients[0] + outputs[:, step]
            waiting = None
            if self.mask is not None:
                waiting = [g * ~self.mask[step] for g in gradients]
                gradients = [g * self.mask[step] for g in gradients]
            if projected is not None:
                assert weights.projection is not None
                projected[:, step] = gradients[0]
                gradients[0] = gradients[0] @ weights.projection
            into, fed = to_inputs[:, step], to_states[:, step]
            direct, others = self.backward(step, into, fed, gradients)
            back = fed @ weights.states
            gradients = [back if direct is None else back + direct, *others]
            if waiting is not None:
                gradients = [g + w for g, w in zip(gradients, waiting, strict=True)]
        found = [("ih", x, to_inputs), ("hh", self.earlier, to_states)]
        if projected is not None:
            assert self.projected is not None
            found.append(("hr", self.projected, projected))
        return found


class _LSTM(_Run):
    """``c' = f∘c + i∘g``, ``h' = o∘tanh(c')``."""

    states = 2

    def forward(
        self, through: Tensor, fed: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        i, f, g, o = (through + fed).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * states[1] + i * g
        tanh_c = c.tanh()
        return [o * tanh_c, c], (i, f, g, o, states[1], tanh_c)

    def prepare(self, *memories: Tensor) -> None:
        i, f, g, o, c, tanh_c = memories
        self.forget = f
        self.to_cell = o * (1 - tanh_c.square())
        self.of_cell = torch.stack([g * i * (1 - i), c * f * (1 - f), i * (1 - g.square())], 2)
        self.of_output = tanh_c * o * (1 - o)

    def backward(
        self, step: int, to_inputs: Tensor, to_states: Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        h, c = gradients
        c = c + h * self.to_cell[step]
        parts = to_states.unflatten(-1, (4, -1))
        torch.mul(c.unsqueeze(-2), self.of_cell[step], out=parts[..., :3, :])
        torch.mul(h, self.of_output[step], out=parts[..., 3, :])
        return None, [c * self.forget[step]]


class _GRU(_Run):
    """``n = tanh(W_in x + r∘(W_hn h))``, ``h' = (1 − z)∘n + z∘h``."""

    def forward(
        self, through: Tensor, fed: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        x_r, x_z, x_n = through.chunk(3, -1)
        h_r, h_z, h_n = fed.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return [n + z * (states[0] - n)], (r, z, n, h_n, states[0])

    def prepare(self, *memories: Tensor) -> None:
        r, z, n, h_n, h = memories
        to_n = (1 - z) * (1 - n.square())
        self.slopes = torch.stack([to_n * h_n * r * (1 - r), (h - n) * z * (1 - z), to_n], 2)
        self.reset, self.keep = r, z

    def backward(
        self, step: int, to_inputs: Tensor, to_states: Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        (h,) = gradients
        parts = to_inputs.unflatten(-1, (3, -1))
        torch.mul(h.unsqueeze(-2), self.slopes[step], out=parts)
        to_states.copy_(to_inputs)
        to_states.unflatten(-1, (3, -1))[..., 2, :].mul_(self.reset[step])
        return h * self.keep[step], []


class _RNN(_Run):
    """``h' = tanh(W_ih x + W_hh h)``, or the positive part."""

    def forward(
        self, through: Tensor, fed: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        h = through + fed
        h = h.tanh() if self.module.nonlinearity == "tanh" else h.relu()
        return [h], (h,)

    def prepare(self, *memories: Tensor) -> None:
        (h,) = memories
        tanh = self.module.nonlinearity == "tanh"
        self.slope = 1 - h.square() if tanh else (h > 0).to(h.dtype)

    def backward(
        self, step: int, to_inputs: Tensor, to_states: Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        (h,) = gradients
        torch.mul(h, self.slope[step], out=to_states)
        return None, []


_RUNS: tuple[tuple[tuple[type[nn.Module], ...], type[_Run]], ...] = (
    ((nn.LSTM, nn.LSTMCell), _LSTM),
    ((nn.GRU, nn.GRUCell), _GRU),
    ((nn.RNN, nn.RNNCell), _RNN),
)

register_kind(RecurrentKind(), nn.RNN, nn.LSTM, nn.GRU)
register_kind(CellKind(), nn.RNNCell, nn.LSTMCell, nn.GRUCell)
