"""The other optimizers of the benchmarks, and the rates to search for them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Optimizer = torch.optim.Optimizer

#: Usual learning rates, the middle of a search.
USUAL_RATES = {"sgd": 0.1, "adamw": 1e-3, "soap": 3e-3, "muon": 3e-3, "psgd": 1e-3}


class Muon(Optimizer):
    """torch.optim.Muon for hidden weights, convolutions as matrices; AdamW for the rest.

    Both take the same rate, as Muon's updates are scaled to the size of AdamW's.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> None:
        modules = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.hidden = [m.weight for m in modules[:-1]]
        taken = {id(w) for w in self.hidden}
        rest = [p for p in model.parameters() if id(p) not in taken]
        super().__init__([{"params": self.hidden}, {"params": rest}], {"lr": lr})
        # Matrices share the memory of the weights.
        self.matrices = [nn.Parameter(w.detach().flatten(1)) for w in self.hidden]
        self.parts: list[Optimizer] = [
            torch.optim.Muon(
                self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay),
        ]

    def step(self, closure: None = None) -> None:
        """Take one step of both."""
        for weight, matrix in zip(self.hidden, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def make_rival(
    name: str, model: nn.Module, lr: float, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """Return an optimizer by the name it has in `USUAL_RATES`."""
    options = {"lr": lr, "weight_decay": weight_decay, **options}
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), **{"momentum": 0.9, **options})
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    if name == "muon":
        return Muon(model, **options)
    from pytorch_optimizer import SOAP, Kron

    return {"soap": SOAP, "psgd": Kron}[name](model.parameters(), **options)


def missing(name: str) -> str | None:
    """Return why a rival cannot run here, or None if it can."""
    if name in ("soap", "psgd") and find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed"
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    return None


def rate_grid(usual: float, count: int) -> list[float]:
    """Return rates around the usual one, a factor √10 apart, rounded to 1 and 3."""
    exponents = [i - (count - 1) / 2 for i in range(count)]
    rounded = [f"{usual * 10 ** (e / 2):.0e}" for e in exponents]
    return [10 * float("1" + r[1:]) if r[0] == "9" else float(r) for r in rounded]
