"""Optimizers and estimates with some of their options changed, whatever group those are in."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from natgrad import Capture
from natgrad.curvature import Curvature, as_structure

#: Groups of options, and objects among their fields that have options of their own.
GROUPS = {"refresh": None, "step_rule": "length", "structure": "solver"}

#: Options that make sense where the learning rate is the length of a step.
OF_PLAIN_LENGTH = {
    "lr", "kl_clip", "norm_clip", "nesterov", "graft", "momentum_on", "averaged_momentum",
}  # fmt: skip


def make_optimizer(kind: Any, model: Any, *args: Any, **changes: Any) -> Any:
    """Return an optimizer of a kind; options of groups may be given by their own names.

    ``make_optimizer(KFAC, model, factors=1, nesterov=False, weight_sharing="reduce")`` changes one
    field each of KFAC's own ``refresh``, ``step_rule`` and ``structure``. Lengths are measured only
    where nothing is said that concerns plain ones.
    """
    if isinstance(kind, functools.partial):
        return make_optimizer(kind.func, model, *kind.args, *args, **{**kind.keywords, **changes})
    arguments = set(inspect.signature(kind).parameters)
    if measures(kind) and OF_PLAIN_LENGTH & set(changes) and "step_rule" not in changes:
        changes.setdefault("length", "lr")
    for group, inner in GROUPS.items() if hasattr(kind, "method") else ():
        value = changes.get(group, getattr(kind.method, group))
        if group == "structure":
            value = as_structure(value, training=True)
        found = _changed(value, changes, arguments)
        if inner and dataclasses.is_dataclass(getattr(found, inner, None)):
            held = _changed(getattr(found, inner), changes, arguments)
            if held is not getattr(found, inner):
                found = dataclasses.replace(found, **{inner: held})
        if found is not value:
            changes[group] = found
    return kind(model, *args, **changes)


def measures(kind: Any) -> bool:
    """Return whether a kind of optimizer measures the length of its steps by default."""
    return hasattr(kind, "method") and kind.method.step_rule.measured is not None


def curvature_of(structure: Any, capture: Capture, **options: Any) -> Curvature:
    """Return an empty estimate of a captured model's Fisher matrix in a structure."""
    layouts = {name: block.layout for name, block in capture.blocks.items()}
    return Curvature(as_structure(structure, **options), layouts, capture.layout)


def _changed(value: Any, changes: dict[str, Any], besides: set[str] = frozenset()) -> Any:
    """Return a dataclass with those of the changes that are its fields, which are taken out."""
    names = ({field.name for field in dataclasses.fields(value)} - set(besides)) & set(changes)
    if not names:
        return value
    return dataclasses.replace(value, **{name: changes.pop(name) for name in names})
