"""Models of nested (ragged) tensors, held against the same models of their samples one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.cases import normal

SAMPLES = [normal(length, 6, seed=length) for length in (3, 5, 2, 4)]
LABELS = torch.tensor([0, 1, 2, 0])


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()

    def forward(self, *samples: Tensor) -> Tensor:
        ragged = samples[0].is_nested
        hidden = torch.tanh(self.embed(samples[0])).unbind() if ragged else self._each(samples)
        return self.head(torch.stack([one.mean(0) for one in hidden]))

    def _each(self, samples: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.tanh(self.embed(one)) for one in samples]


class Padded(Pooled):
    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(padded))
        pooled = [one[:length].mean(0) for one, length in zip(hidden, lengths, strict=True)]
        return self.head(torch.stack(pooled))


def nested(layout: torch.layout = torch.jagged) -> Tensor:
    return torch.nested.nested_tensor(SAMPLES, layout=layout)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise", "diagonal"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_matrix_is_that_of_padded_samples(structure, fisher):
    padded = nn.utils.rnn.pad_sequence(SAMPLES, batch_first=True)
    lengths = torch.tensor([len(one) for one in SAMPLES])
    own = natgrad.fisher_matrix(Pooled(), (nested(), LABELS), "categorical", structure,
                                fisher=fisher)  # fmt: skip
    wanted = natgrad.fisher_matrix(Padded(), ((padded, lengths), LABELS), "categorical", structure,
                                   fisher=fisher)  # fmt: skip
    torch.testing.assert_close(own.to_dense(), wanted.to_dense())


def test_outputs_of_all_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rows, labels = torch.cat(SAMPLES), torch.arange(14) % 3
    own = natgrad.fisher_matrix(
        model, (nested(), labels), "categorical", "full", fisher="exact",
        output=lambda out: out.values() if out.is_nested else out,
    )  # fmt: skip
    wanted = natgrad.fisher_matrix(model, (rows, labels), "categorical", "full", fisher="exact")
    torch.testing.assert_close(own.to_dense(), wanted.to_dense())


def test_training():
    model = Pooled()
    optimizer = natgrad.ExactNGD(model, kl_clip=None, lr=0.5)
    twin = Pooled()
    other = natgrad.ExactNGD(twin, kl_clip=None, lr=0.5)
    for _ in range(3):
        for one, net, inputs in ((optimizer, model, [nested()]), (other, twin, SAMPLES)):
            one.zero_grad()
            functional.cross_entropy(net(*inputs), LABELS).backward()
            one.step()
    for own, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)


def test_what_cannot_be_watched_is_refused():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    optimizer = natgrad.KFAC(model)
    with pytest.raises(ValueError, match=r"is a nested tensor, .* output=lambda out: out\.values"):
        model(nested())
    with pytest.raises(ValueError, match=r"layout=torch\.jagged"):
        model(nested(torch.strided))
    optimizer.zero_grad()
