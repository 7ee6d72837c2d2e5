"""What an optimizer's parameter groups hold, and the first-order fallback for the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from natgrad.optim.options import Fallback

__all__ = ["make_fallback", "split_groups"]


def split_groups(
    model: nn.Module,
    defaults: dict[str, Any],
    uncovered: dict[str, str],
    params: Iterable[dict[str, Any]] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return preconditioned and first-order groups that hold every trainable parameter once.

    Args:
        model: The model.
        defaults: Options of a preconditioned group, with their defaults.
        uncovered: Parameter name → why no block covers it.
        params: Groups as the user gave them; the last group holds all other parameters.

    Raises:
        ValueError: If a group has an unknown option or matches nothing.
    """
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    taken: set[str] = set()
    groups: list[dict[str, Any]] = []
    first_order: list[dict[str, Any]] = []

    def add(chosen: list[str], options: dict[str, Any]) -> None:
        preconditioned = options.get("preconditioned", True)
        covered = [n for n in chosen if preconditioned and n not in uncovered]
        rest = [n for n in chosen if n not in covered]
        taken.update(chosen)
        if covered:
            groups.append({**options, "params": [names[n] for n in covered]})
        if rest:
            keep = {} if preconditioned else options
            plain = {k: v for k, v in keep.items() if k in ("lr", "weight_decay", "momentum")}
            first_order.append({**plain, "params": [names[n] for n in rest]})

    known = {*defaults, "params", "modules"} - {"unit"}
    for group in params or []:
        unknown = set(group) - known
        if unknown:
            raise ValueError(
                f"unknown option {sorted(unknown)[0]!r} in a parameter group; known: "
                f"{', '.join(sorted(known))}"
            )
        chosen = [n for n in _members(model, names, group) if n not in taken]
        if not chosen:
            raise ValueError(f"the parameter group {_describe(group)} matches no parameter")
        add(chosen, {k: v for k, v in group.items() if k not in ("params", "modules")})
    rest = [n for n in names if n not in taken]
    if rest:
        add(rest, {})
    if not groups and not first_order:
        raise ValueError("the model has no trainable parameters")
    return groups, first_order


def _members(model: nn.Module, names: dict[str, nn.Parameter], group: dict[str, Any]) -> list[str]:
    if ("params" in group) == ("modules" in group):
        raise ValueError("a parameter group needs either 'params' or 'modules'")
    wanted: set[int] = set()
    patterns: list[str] = []
    if "modules" in group:
        for module in group["modules"]:
            wanted.update(id(p) for p in module.parameters())
    elif isinstance(group["params"], str):
        patterns = [group["params"]]
    else:
        for item in group["params"]:
            if isinstance(item, str):
                patterns.append(item)
            else:
                wanted.add(id(item))
    return [
        n
        for n, p in names.items()
        if id(p) in wanted or any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)
    ]


def _describe(group: dict[str, Any]) -> str:
    chosen = group.get("params", group.get("modules"))
    return repr(chosen) if isinstance(chosen, str) else f"of {len(list(chosen or []))} entries"


def make_fallback(fallback: Fallback, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that trains the first-order groups."""
    optimizer: torch.optim.Optimizer
    if fallback.name == "adamw":
        plain = [{k: v for k, v in g.items() if k != "momentum"} for g in groups]
        optimizer = torch.optim.AdamW(plain, lr=1e-3 if fallback.lr is None else fallback.lr)
    else:
        rate = 1e-2 if fallback.lr is None else fallback.lr
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    for group in optimizer.param_groups:
        group["preconditioned"] = False
    return optimizer
