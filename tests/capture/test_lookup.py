"""Tables of other authors: scaled rows, positions that the module numbers itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.capture.blocks import find_blocks
from natgrad.capture.embedding import LookupKind
from natgrad.capture.generic import GenericKind
from tests.capture.test_capture import check
from tests.cases import generator, normal

ROWS, WIDTH = 7, 3


class Scaled(nn.Embedding):
    """Rows times a number."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 1.5


class ScaledByBuffer(nn.Embedding):
    """Rows times a number that is a buffer."""

    def __init__(self, *sizes: int, **options) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


class Positions(nn.Embedding):
    """A row for every place, whatever stands there; two are kept back."""

    def forward(self, tokens: Tensor, *, past: int = 0) -> Tensor:
        places = past + torch.arange(tokens.shape[1], device=tokens.device)
        return super().forward(places.expand(len(tokens), -1) + 2)


class SharedPositions(nn.Module):
    """One slice of a matrix for all samples."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[: tokens.shape[1]]


class Weighed(SharedPositions):
    """Every token has a factor of its own, and something is added that is not of the table."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * (1 + tokens.unsqueeze(-1)) + tokens.unsqueeze(-1).sin()


class Reversed(SharedPositions):
    """Samples come second."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * self.weight[tokens.transpose(0, 1)]


class Sums(SharedPositions):
    """Two rows at once are no lookup."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] + self.weight[(tokens + 1) % len(self.weight)]


class Squares(SharedPositions):
    """Nor are squares of rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] ** 2


class Mixed(SharedPositions):
    """Nor are rows whose entries change places."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].flip(-1)


class Model(nn.Module):
    """Tokens by a table, beside tokens by an ordinary one."""

    def __init__(self, table: nn.Module, samples_second: bool = False) -> None:
        super().__init__()
        self.table = table
        self.plain = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 2)
        self.samples_second = samples_second
        for i, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=i)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.table(tokens)
        found = found.transpose(0, 1) if self.samples_second else found
        return self.head(torch.tanh(found + self.plain(tokens)))


LOOKUPS = {
    "scaled": Scaled(ROWS, WIDTH),
    "scaled, padded": Scaled(ROWS, WIDTH, padding_idx=1),
    "scaled by a buffer": ScaledByBuffer(ROWS, WIDTH),
    "positions": Positions(ROWS, WIDTH),
    "shared positions": SharedPositions(ROWS, WIDTH),
    "weighed": Weighed(ROWS, WIDTH),
    "samples second": Reversed(ROWS, WIDTH),
}
OTHERS = {"sums": Sums(ROWS, WIDTH), "squares": Squares(ROWS, WIDTH), "mixed": Mixed(ROWS, WIDTH)}


@pytest.mark.parametrize("name", [*LOOKUPS, *OTHERS])
@pytest.mark.parametrize("samples", [1, 4])
def test_rows_are_the_dense_ones(name, samples):
    table = LOOKUPS.get(name) or OTHERS[name]
    model = Model(table, name == "samples second").double()
    kind = next(b for n, b in find_blocks(model)[0].items() if "table" in n).uses[0].kind
    assert type(kind) is (LookupKind if name in LOOKUPS else GenericKind)
    tokens = torch.randint(ROWS, (samples, 5), generator=generator(3))
    tokens[0, 0] = 1
    check(model, tokens)


def test_factors_are_those_of_an_embedding():
    """Scaling a table is the same as scaling its rows, of which the gradients are a multiple."""
    model, twin = Model(LOOKUPS["scaled"]).double(), Model(nn.Embedding(ROWS, WIDTH)).double()
    twin.load_state_dict(model.state_dict())
    twin.table.weight.data *= 1.5
    tokens, y = torch.randint(ROWS, (4, 5), generator=generator(3)), normal(4, 5, 2, seed=6)
    found, plain = (
        natgrad.fisher_matrix(one, (tokens, y), "gaussian", "kfac", "empirical").to_dense()
        for one in (model, twin)
    )
    scales = torch.ones(len(plain), dtype=torch.float64)
    scales[: ROWS * WIDTH] = 1.5
    torch.testing.assert_close(found, plain * scales * scales.unsqueeze(1))


@pytest.mark.parametrize("name", LOOKUPS)
def test_training_is_silent_and_leaves_no_trace(name):
    model = Model(LOOKUPS[name], name == "samples second")
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    calls = []
    model.table.register_forward_hook(lambda *_: calls.append(1))
    optimizer = natgrad.KFAC(model)
    tokens = torch.randint(ROWS, (4, 5), generator=generator(3))
    target = torch.randint(2, (4, 5), generator=generator(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            optimizer.zero_grad()
            functional.cross_entropy(model(tokens).transpose(1, 2), target).backward()
            optimizer.step()
    assert len(calls) == 6
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_coupled_samples_stay_in_the_first_dimension():
    """Time, which attention mixes, is not taken for the samples because something couples these."""

    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.center = (
                nn.MultiheadAttention(WIDTH, 1, batch_first=True),
                Centered(3, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.center(self.mix(x, x, x)[0])

    model, x = Attends().double(), normal(4, 5, WIDTH)
    with natgrad.Capture(model) as capture, pytest.warns(match="coupled in or after 'mix'"):
        output = model(x)
        with torch.no_grad():  # As inside of a step.
            capture.pull_back(output, torch.ones_like(output).unsqueeze(0))
        assert not capture.sources.time_first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(model, x)


@pytest.mark.parametrize(
    ("fisher", "structure", "told"),
    [("mc", "kfac", False), ("exact", "kfac", True), ("mc", "full", True)],
)
def test_coupled_samples_are_told_where_they_cost_something(fisher, structure, told):
    """Sums of rows do for sampled labels, if no rows of different layers are multiplied."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden - hidden.mean(0))

    model = Mixes().double()
    preconditioner = natgrad.Preconditioner(model, structure=structure, fisher=fisher)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.functional.cross_entropy(model(normal(6, 5)), torch.arange(6) % 3).backward()
        preconditioner.step()
    assert any("coupled in or after 'first'" in str(one.message) for one in caught) == told
