"""Models are called as their users call them, and left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

import natgrad
from natgrad.capture.evaluation import take_samples
from tests.cases import normal

LABELS = torch.arange(6) % 3


class Two(nn.Module):
    """Has two arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 3).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.last(torch.cat([a, b], dim=1))


class Listed(Two):
    """Has one argument, a list."""

    def forward(self, both: list[Tensor]) -> Tensor:
        assert isinstance(both, list)
        return super().forward(*both)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.GRU(3, 4, batch_first=True).double()
        self.last = nn.Linear(4, 3).double()

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.last(self.recurrent(packed)[1][-1])


class Counting(nn.Module):
    """Changes one buffer in place, puts another in the place of the second, and makes the third."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3).double()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4).double())
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.cache = x.sum(0)
        return self.last(x)


def dense(model: nn.Module, data: object) -> Tensor:
    return natgrad.fisher_matrix(model, data, structure="full").to_dense()


@pytest.mark.parametrize("model", [Two, Listed])
def test_loaders_make_lists_of_tuples(model):
    a, b = normal(6, 2), normal(6, 2, seed=1)

    def collate(samples: list[tuple[Tensor, ...]]) -> tuple[list[Tensor], Tensor]:
        return default_collate([((x, y), label) for x, y, label in samples])

    loader = DataLoader(TensorDataset(a, b, LABELS), batch_size=6, collate_fn=collate)
    assert isinstance(next(iter(loader))[0], list)
    torch.testing.assert_close(dense(model(), loader), dense(Two(), ((a, b), LABELS)))


def test_samples_of_a_list_are_a_list():
    found = take_samples([normal(6, 2), "mode"], slice(0, 2))
    assert isinstance(found, list) and len(found[0]) == 2 and found[1] == "mode"


def test_packed_sequences_are_one_argument():
    model, sequences = Packed(), [normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)]
    packed = dense(model, (pack_sequence(sequences), LABELS[:3]))
    torch.testing.assert_close(packed, dense(model, (torch.stack(sequences), LABELS[:3])))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_as_before(training):
    model = Counting().train(training)
    mean = model.mean
    dense(model, (normal(6, 4), LABELS))
    assert model.mean is mean and model.cache is None
    assert not model.calls.any() and not model.mean.any()


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_batch_norms_are_as_before(training):
    """Which change in training without another version, also in part of a model."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().train(training)
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense(model, (normal(6, 4), LABELS))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_graph_of_the_users_stays_whole():
    """Nothing it holds is written to, even to what it was."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    loss = model(normal(6, 4)).square().sum()
    dense(model, (normal(6, 4, seed=1), LABELS))
    loss.backward()
    assert model[0].weight.grad is not None
