"""Recurrent layers: exact rows of every map in them, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import natgrad
from natgrad import Capture, fisher_matrix
from natgrad.capture.recurrent import RecurrentKind
from natgrad.curvature import STRUCTURES
from tests import dense
from tests.cases import normal

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
LENGTHS = {"sorted": [4, 2, 1], "unsorted": [2, 4, 3]}


class Reader(nn.Module):
    """A recurrent layer over three sequences of up to four steps, and what is seen of it.

    Args:
        layer: The layer.
        seen: Which of its outputs the result depends on: "o", "h" and "c".
        packed: How sequences are packed, if they are.
        started: Whether there is an initial state.
    """

    def __init__(self, layer: nn.RNNBase, seen: str, packed: str | None, started: bool) -> None:
        super().__init__()
        self.layer, self.seen, self.packed = layer, seen, packed
        states = layer.num_layers * (1 + layer.bidirectional)
        sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
        found = [normal(states, 3, size, seed=i) for i, size in enumerate(sizes)]
        lstm = isinstance(layer, nn.LSTM)
        self.state: Any = None if not started else tuple(found) if lstm else found[0]

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        x = x if first else x.transpose(0, 1)
        if self.packed is None:
            out, state = self.layer(x, self.state)
        else:
            lengths = torch.tensor(LENGTHS[self.packed])
            sequences = pack_padded_sequence(x, lengths, first, self.packed == "sorted")
            out, state = self.layer(sequences, self.state)
            out = pad_packed_sequence(out, first)[0]
        h, c = state if isinstance(state, tuple) else (state, state)
        found = {"o": out if first else out.transpose(0, 1)}
        found |= {"h": h.transpose(0, 1), "c": c.transpose(0, 1)}
        seen = torch.cat([found[name].flatten(1) for name in self.seen], 1)
        weights = torch.linspace(-1, 2, 2 * seen.shape[1], dtype=seen.dtype).view(-1, 2).cos()
        return torch.tanh(seen) @ weights


def check(model: nn.Module, x: Any) -> None:
    """Compare all of the matrix, and that of every part, with one backward pass per output."""
    _, jacobian = dense.jacobian(model, x)
    rows = jacobian.flatten(0, 1)
    expected = rows.T @ rows / len(jacobian)
    found = fisher_matrix(model, (x, None), "gaussian", "full").to_dense()
    dense.assert_same(found, expected, 1e-12)
    parted = fisher_matrix(model, (x, None), "gaussian", "block_diagonal")
    for part in parted.parts.values():
        where = parted.layout.slices(part.layout)
        index = torch.cat([torch.arange(piece.start, piece.stop) for piece in where])
        dense.assert_same(part.to_dense(), expected[index][:, index], 1e-12)


@st.composite
def readers(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if kind == "LSTM":
        options["proj_size"] = draw(st.integers(0, 2))
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    seen = draw(st.sampled_from(["o", "h", "oh", "ohc"] + ["c"] * (kind == "LSTM")))
    layer = KINDS[kind](2, 3, **options).double()
    return Reader(layer, seen, draw(st.sampled_from([None, *LENGTHS])), draw(st.booleans()))


@given(readers())
def test_rows(model):
    check(model, normal(3, 4, 2))


class Stepwise(nn.Module):
    """A cell that is called once per step."""

    def __init__(self, kind: type[nn.RNNCellBase], bias: bool, started: bool) -> None:
        super().__init__()
        self.cell, self.started = kind(2, 3, bias), started

    def forward(self, x: Tensor) -> Tensor:
        lstm = isinstance(self.cell, nn.LSTMCell)
        state: Any = None
        if self.started:
            state = torch.ones(*x.shape[:-2], 3, dtype=x.dtype) / 2
            state = (state, -state) if lstm else state
        for step in x.unbind(-2):
            state = self.cell(step, state)
        return torch.cat(state, -1) if lstm else torch.tanh(state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_cells(kind, bias, started):
    torch.manual_seed(0)
    check(Stepwise(kind, bias, started).double(), normal(3, 4, 2))


class Alone(nn.Module):
    """One sequence without a batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        found = found if isinstance(found, tuple) else (found,)
        states = found[-1] if isinstance(found[-1], tuple) else found[-1:]
        return torch.tanh(torch.cat([one.flatten() for one in (found[0], *states)])).unsqueeze(0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_inputs_without_a_batch(kind):
    torch.manual_seed(0)
    cell = issubclass(kind, nn.RNNCellBase)
    layer = kind(2, 3) if cell else kind(2, 3, 2, bidirectional=True)
    check(Alone(layer).double(), normal(2) if cell else normal(4, 2))


class Unrolled(nn.Module):
    """An LSTM of plain linear layers."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(2, 12), nn.Linear(3, 12)
        values = {name.removesuffix("_l0"): p.detach() for name, p in lstm.named_parameters()}
        for part, layer in (("ih", self.ih), ("hh", self.hh)):
            layer.weight.data, layer.bias.data = values[f"weight_{part}"], values[f"bias_{part}"]

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            i, f, g, o = (self.ih(step) + self.hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


class LastState(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[1][0][-1]


@pytest.mark.parametrize("structure", sorted(set(STRUCTURES) - {"singd", "kpsvd", "kfoc"}))
def test_structures_are_those_of_linear_layers_called_at_every_step(structure):
    torch.manual_seed(0)
    model, x = LastState(nn.LSTM(2, 3, batch_first=True).double()), normal(4, 3, 2)
    found = fisher_matrix(model, (x, None), "gaussian", structure)
    plain = fisher_matrix(Unrolled(model.lstm), (x, None), "gaussian", structure)
    # Parameters are in the order of weights, then biases, and layer by layer.
    sizes = {"weight_ih": 24, "weight_hh": 36, "bias_ih": 12, "bias_hh": 12}
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    places = dict(zip(sizes, (torch.arange(60 + 24)).tensor_split(ends[:-1]), strict=True))
    order = torch.cat([places[n] for n in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")])
    dense.assert_same(found.to_dense()[order][:, order], plain.to_dense(), 1e-9)


def test_factors_leave_out_steps_beyond_the_end_of_a_sequence():
    torch.manual_seed(0)
    layer = nn.GRU(2, 3, batch_first=True).double()
    x = normal(3, 4, 2)
    packed = Reader(layer, "h", "unsorted", False)
    found = fisher_matrix(packed, (x, None), "gaussian", "kfac").parts["layer.weight_ih_l0"]
    real = torch.cat([x[n, :length] for n, length in enumerate(LENGTHS["unsorted"])])
    real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
    dense.assert_same(found.inputs[0].tril(), (real.T @ real / len(real)).tril(), 1e-12)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "bias_hh_l0"])
def test_parts_may_be_frozen(frozen):
    torch.manual_seed(0)
    model = Reader(nn.GRU(2, 3), "oh", None, True).double()
    model.layer.get_parameter(frozen).requires_grad_(False)
    check(model, normal(3, 4, 2))


def test_a_map_shared_by_two_layers_and_two_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(2, 2, batch_first=True), nn.LSTM(2, 2, 2)
            self.second.weight_ih_l1 = self.first.weight_ih_l0

        def forward(self, x: Tensor) -> Tensor:
            out, state = self.first(x)
            out, _ = self.first(out, state)
            return torch.tanh(self.second(out.transpose(0, 1))[0][-1])

    torch.manual_seed(0)
    check(Twice().double(), normal(3, 2, 2))


def test_several_sequences_of_one_sample():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.RNN(2, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1))[0][:, -1].reshape(len(x), -1)

    torch.manual_seed(0)
    check(Views().double(), normal(3, 2, 4, 2))


def test_outputs_changed_in_place_are_still_those_of_the_layer():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1))[0].mul_(2.0).transpose(0, 1).flatten(1)

    torch.manual_seed(0)
    check(InPlace().double(), normal(3, 4, 2))


def test_what_has_no_rows_is_named():
    with Capture(nn.LSTM(2, 2, 2, dropout=0.1)) as capture:
        assert all("dropout" in reason for reason in capture.uncovered.values())
        assert len(capture.uncovered) == 8
    layer = nn.RNN(2, 2, 2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    with Capture(layer) as capture:
        assert all("among its own" in reason for reason in capture.uncovered.values())
    model = nn.GRU(2, 2)
    # Whatever this is, it is no GRU any more.
    model.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
    x = normal(3, 2, 2).float()
    with pytest.raises(ValueError, match="formula"), Capture(model) as capture:
        (recorded,) = capture.find_pass(model(x)[0]).calls
        call = recorded.call
        RecurrentKind()._rows(call, [torch.ones(1, *call.options["shapes"][0]), None])


@pytest.mark.parametrize("kind", ["KFAC", "EKFAC", "ExactNGD", "SINGD", "FNGD", "TwoLevelKFAC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_train_recurrent_layers(kind, dtype):
    torch.manual_seed(0)
    model = LastState(nn.LSTM(2, 3, batch_first=True)).to(dtype)
    x, y = normal(8, 4, 2).to(dtype), normal(8, 3, seed=1).to(dtype)
    optimizer = getattr(natgrad, kind)(model, likelihood="gaussian", lr=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class SentenceEncoder(nn.Module):
    """A classifier by the last hidden state: the outputs of the steps before are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def test_outputs_that_the_loss_does_not_use():
    """A float32 layer on a CPU is one node of the graph, to whose other outputs nothing comes."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model, x = SentenceEncoder(), torch.randn(10, 128, 12)
        model, x = model.to(dtype), x.to(dtype)
        optimizer = natgrad.KFAC(model, fisher="exact")
        nn.functional.cross_entropy(model(x), torch.arange(128) % 3).backward()
        optimizer.step()
        found.append(optimizer.preconditioner.curvature.matrix().to_dense().double())
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()
