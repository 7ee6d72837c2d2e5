"""The other optimizers of the benchmarks, and the rates to search for them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer

#: Usual learning rates, the middle of a search.
USUAL_RATES = {"sgd": 0.1, "adamw": 1e-3, "soap": 3e-3, "muon": 3e-3, "psgd": 1e-3}


class Muon(Optimizer):
    """Muon for hidden weights, convolutions as matrices; AdamW for the rest.

    The steps are those of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, but in float32
    unless another type is given: many processors have no fast bfloat16, and the same steps took
    them ten times as long. Both parts take the same rate, as Muon's updates are scaled to the size
    of AdamW's.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, dtype: str = "float32"
    ) -> None:
        modules = [
            m
            for m in model.modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) or type(m).__name__ == "Conv1D"  # Of GPT-2.
        ]
        hidden = [m.weight for m in modules[:-1]]
        taken = {id(w) for w in hidden}
        rest = [p for p in model.parameters() if id(p) not in taken]
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([{"params": hidden}, {"params": rest}], defaults)
        self.rest = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
        self.dtype = getattr(torch, dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step of both."""
        group, rest = self.param_groups
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if weight not in self.state:
                self.state[weight]["average"] = torch.zeros_like(weight)
            average = self.state[weight]["average"]
            average.lerp_(weight.grad, 0.05)
            update = self._orthogonalised(weight.grad.lerp(average, 0.95).flatten(1))
            size = 0.2 * max(update.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-size * group["lr"])
        self.rest.param_groups[0]["lr"] = rest["lr"]
        self.rest.step()

    def _orthogonalised(self, matrix: Tensor) -> Tensor:
        """Return the matrix with singular values near 1, by five Newton-Schulz steps."""
        x = matrix.to(self.dtype)
        x = x.mT if len(matrix) > matrix.shape[1] else x
        x = x / x.norm().clamp_min(1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.addmm(
                x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
            )
        return (x.mT if len(matrix) > matrix.shape[1] else x).to(matrix.dtype).contiguous()


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
    if name == "psgd" and find_spec("opt_einsum") is None:
        return "opt_einsum, without which PSGD takes minutes per step, is not installed"
    return None


def rate_grid(usual: float, count: int) -> list[float]:
    """Return rates around the usual one, a factor √10 apart, rounded to 1 and 3."""
    exponents = [i - (count - 1) / 2 for i in range(count)]
    rounded = [f"{usual * 10 ** (e / 2):.0e}" for e in exponents]
    return [10 * float("1" + r[1:]) if r[0] == "9" else float(r) for r in rounded]
