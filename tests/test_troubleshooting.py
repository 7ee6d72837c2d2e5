"""The page on troubleshooting: its blocks run, and every message is found on it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def load_messages() -> Any:
    specification = importlib.util.spec_from_file_location("messages", ROOT / "docs/messages.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["messages"] = module
    specification.loader.exec_module(module)
    return module


@functools.cache
def site() -> str:
    """Return the page as it is on the site, with the list of all messages."""
    messages = load_messages()
    return PAGE.read_text().replace(messages.MARKER, messages.as_markdown())


@functools.cache
def nodes() -> list[tuple[str, ast.Call | ast.Raise]]:
    """Return all calls and raised errors of the library, and where they are."""
    return [
        (f"{path.name}:{node.lineno}", node)
        for path in sorted((ROOT / "src" / "natgrad").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Call, ast.Raise))
    ]


@functools.cache
def patterns() -> list[re.Pattern[str]]:
    """Return the messages of the list, with anything where they name something."""
    return [
        re.compile(".*".join(map(re.escape, text.split("…"))), re.S)
        for text in re.findall(r"^- `(.*)`", site(), re.M)
        if len(text.replace("…", "").split()) >= 3
    ]


def plain(text: str) -> str:
    return " ".join(text.split())


def pieces(node: ast.expr) -> list[str]:
    """The fixed parts of a text of the source, of more than one word."""
    parts = [node] if isinstance(node, ast.Constant) else getattr(node, "values", [])
    texts = [plain(part.value) for part in parts if isinstance(part, ast.Constant)]
    return [text for text in texts if " " in text.strip()]


def calls(*names: str) -> Iterator[tuple[str, ast.expr]]:
    """The first arguments of all calls of these functions in the library."""
    for where, node in nodes():
        if isinstance(node, ast.Call) and node.args:
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in names:
                yield where, node.args[0]


def test_every_warning_is_explained():
    """In the words of the page itself, not in the list at its end."""
    page = plain(PAGE.read_text())
    found = {where: pieces(text) for where, text in calls("warn", "tell", "on_finding")}
    found = {where: texts for where, texts in found.items() if texts}
    assert len(found) > 20
    missing = {w: t for w, t in found.items() if not any(beginning(one) in page for one in t)}
    assert missing == {}


def beginning(text: str) -> str:
    """What must be on the page of a text: its first seven words."""
    return " ".join(text.strip(" ,;:.").split()[:7])


def test_every_error_is_on_the_site():
    listed, number = plain(site()), 0
    for where, node in nodes():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for text in node.exc.args[:1]:
                number += 1
                for piece in pieces(text):
                    assert re.sub(r"\{\w*(![rs])?\}", "…", piece).strip() in listed, where
    assert number > 300


def too_large() -> None:
    natgrad.KFAC(nn.Linear(2, 2), lr=-1.0)


def parameters() -> None:
    natgrad.KFAC(list(nn.Linear(2, 2).parameters()))  # type: ignore[arg-type]


def misplaced() -> None:
    natgrad.KFAC(nn.Linear(2, 2), nesterov=True)


def no_likelihood() -> None:
    natgrad.KFAC(nn.Linear(2, 2), nn.CTCLoss())


def lazy() -> None:
    natgrad.KFAC(nn.Sequential(nn.LazyLinear(2)))


def without_closure() -> None:
    natgrad.EGN(nn.Linear(2, 2)).step()


def no_rows() -> None:
    table = nn.Embedding(3, 2, scale_grad_by_freq=True)
    natgrad.fisher_matrix(nn.Sequential(table), [(torch.tensor([0, 1]), torch.tensor([0, 1]))])


def not_finite() -> None:
    model = nn.Linear(2, 2)
    optimizer = natgrad.KFAC(model)
    functional.cross_entropy(model(torch.full((3, 2), torch.nan)), torch.zeros(3).long()).backward()
    optimizer.step()


def another_output() -> None:
    model = nn.Linear(2, 2)
    optimizer = natgrad.KFAC(model)
    (model.weight @ torch.ones(2, 1)).square().sum().backward()
    optimizer.step()


def no_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = natgrad.KFAC(model)
    model[0](torch.ones(3, 2)).sum().backward()
    optimizer.step()


def foreign() -> None:
    model = nn.Linear(2, 2)
    optimizer = natgrad.KFAC(model)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()


def of_a_mean() -> None:
    model = nn.Linear(2, 20)
    optimizer = natgrad.KFAC(model, "gaussian")
    functional.mse_loss(model(torch.randn(30, 2)), torch.randn(30, 20)).backward()
    optimizer.step()


def unexplained() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x) @ self.table.weight.T.cov())

    model = Bare()
    optimizer = natgrad.KFAC(model, fisher="exact")  # With "mc" it costs nothing.
    functional.cross_entropy(model(torch.tensor([0, 1, 2])), torch.tensor([0, 1, 1])).backward()
    optimizer.step()


GIVERS = [
    too_large, parameters, misplaced, no_likelihood, lazy, without_closure, no_rows, not_finite,
    another_output, no_pass, foreign, of_a_mean, unexplained,
]  # fmt: skip


@pytest.mark.parametrize("give", GIVERS, ids=lambda give: give.__name__)
def test_what_is_really_said_is_on_the_site(give: Callable[[], None]):
    torch.manual_seed(0)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            give()
        except Exception as error:
            said.append(str(error))
    said += [str(one.message) for one in caught if one.category is UserWarning]
    assert said
    for sentence in said:
        assert any(pattern.search(plain(sentence)) for pattern in patterns()), sentence


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(48, 6), torch.randint(0, 3, (48,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    names: dict[str, Any] = {
        "natgrad": natgrad, "torch": torch, "F": functional, "model": model, "loader": loader
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, str(PAGE), "exec"), names)
        trained = names.get("judge", model)
        optimizer = names.get("judge_optimizer", names["optimizer"])
        before = [p.detach().clone() for p in trained.parameters()]
        classes = trained is model
        loss = functional.cross_entropy if classes else functional.binary_cross_entropy_with_logits
        for x, y in [*loader] * 3:
            optimizer.zero_grad()
            loss(trained(x), y if classes else torch.ones(len(x), 1)).backward()
            optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(trained.parameters(), before, strict=True))
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
    assert len(BLOCKS) == 7
