"""What an optimizer's parameter groups hold, and the first-order fallback for the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.arguments import check_range, check_rate
from natgrad.optim.eager import EagerAdamW, EagerSGD
from natgrad.optim.options import Fallback

#: What torch and its schedulers keep in a group beside options.
NOTES = {"params", "modules", "param_names", "name", "initial_lr", "first_lr"}


def read_groups(params: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return parameter groups, all mappings, whose members can be read again, and copied."""
    groups = list(params or [])
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(
                "params takes parameter groups, dicts such as {'params': 'head.*', 'lr': 0.5}, "
                f"got {type(group).__name__}: leave it out where all parameters are alike"
            )
    return [
        {key: list(one) if isinstance(one, Iterator) else one for key, one in group.items()}
        for group in groups
    ]


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise a ValueError if a group has an unknown option, or one that is out of range."""
    known = {*defaults} - {"unit"} | {"params", "modules"}
    unknown = set(group) - known - NOTES
    if unknown:
        raise ValueError(
            f"unknown option {sorted(unknown)[0]!r} in a parameter group; known: "
            f"{', '.join(sorted(known))}"
        )
    check_rate("lr", group.get("lr", 0.0))
    check_range("momentum", group.get("momentum", 0.0), below=1.0)
    check_range("weight_decay", group.get("weight_decay", 0.0))


def first_order_names(model: nn.Module, params: list[dict[str, Any]]) -> list[str]:
    """Return the names of the parameters in groups that ask for the fallback."""
    taken: dict[str, bool] = {}
    for group in params:
        for name in members(model, group):
            taken.setdefault(name, group.get("preconditioned", True))
    return [name for name, preconditioned in taken.items() if not preconditioned]


def split_groups(
    model: nn.Module,
    defaults: dict[str, Any],
    uncovered: dict[str, str],
    params: list[dict[str, Any]],
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
            here = {"params": [names[n] for n in covered], "param_names": covered}
            groups.append({**options, **here})
        if rest:
            kept = {"lr", "weight_decay", "momentum"}
            if preconditioned:  # In other units, but for no decay at all.
                kept = {"weight_decay"} if options.get("weight_decay") == 0 else set()
            plain = {k: v for k, v in options.items() if k in kept}
            here = {"params": [names[n] for n in rest], "param_names": rest}
            first_order.append({**plain, **here})

    for group in params:
        check_group(group, defaults)
        chosen = [n for n in members(model, group) if n in names and n not in taken]
        if not chosen:
            raise ValueError(f"the parameter group {_describe(group)} matches no parameter")
        add(chosen, {k: v for k, v in group.items() if k not in ("params", "modules")})
    rest = [n for n in names if n not in taken]
    if rest:
        add(rest, {})
    if not groups and not first_order:
        raise ValueError("the model has no trainable parameters")
    return groups, first_order


def members(model: nn.Module, group: Mapping[str, Any]) -> list[str]:
    """Return the names of a group's parameters, frozen ones included, in the model's order.

    Raises:
        ValueError: If it says neither or both of ``"params"`` and ``"modules"``, or holds tensors
            that are no parameters of the model.
    """
    if ("params" in group) == ("modules" in group):
        raise ValueError("a parameter group needs either 'params' or 'modules'")
    patterns: list[str] = []
    wanted: list[Any] = []
    if "modules" in group:
        wanted = [p for module in group["modules"] for p in module.parameters()]
    else:
        given = group["params"]
        for item in [given] if isinstance(given, (str, Tensor)) else given:
            if isinstance(item, str):
                patterns.append(item)
            else:
                wanted.append(item[1] if isinstance(item, tuple) else item)
    names = {n: p for n, p in model.named_parameters()}
    strange = len(set(map(id, wanted)) - set(map(id, names.values())))
    if strange:
        raise ValueError(
            f"{strange} tensors of a parameter group are no parameters of the model: natgrad "
            "trains the model it was made with"
        )
    held = set(map(id, wanted))
    return [
        n
        for n, p in names.items()
        if id(p) in held or any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)
    ]


def _describe(group: dict[str, Any]) -> str:
    chosen = group.get("params", group.get("modules"))
    return repr(chosen) if isinstance(chosen, str) else f"of {len(list(chosen or []))} entries"


def make_fallback(fallback: Fallback, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that trains the first-order groups."""
    optimizer: torch.optim.Optimizer
    if fallback.name == "adamw":
        plain = [{k: v for k, v in g.items() if k != "momentum"} for g in groups]
        optimizer = EagerAdamW(plain, lr=1e-3 if fallback.lr is None else fallback.lr)
    else:
        rate = 1e-2 if fallback.lr is None else fallback.lr
        optimizer = EagerSGD(groups, lr=rate, momentum=0.9)
    for group in optimizer.param_groups:
        group["preconditioned"] = False
    return optimizer
