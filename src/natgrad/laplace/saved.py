"""Sums over data as tensors and plain values, the rows of exact structures included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from natgrad.curvature import Curvature
from natgrad.statistics.rows import RowStatistics


def saved_statistics(curvature: Curvature) -> dict[str, Any]:
    """Return part name → what is summed up in it."""
    state = {}
    for name, entry in curvature.state_dict().items():
        estimate = curvature.estimates[name]
        own = estimate.average
        # A checkpoint of training leaves rows out, as they are of one batch; here they are all.
        rows = own.rows() if isinstance(own, RowStatistics) else None
        kept = {key: entry[key] for key in ("average", "draws", "sizes", "matrices")}
        state[name] = {**kept, "rows": rows, "absent": estimate.absent}
    return state


def load_statistics(curvature: Curvature, state: Mapping[str, Any]) -> None:
    """Restore what :func:`saved_statistics` returned, which must have the same parts and sizes."""
    plain = {n: {**entry, "inverse": None, "damping": 0.0} for n, entry in state.items()}
    estimates = curvature.restored(plain)
    for name, estimate in estimates.items():
        entry, average = state[name], estimate.average
        if isinstance(average, RowStatistics) and entry["rows"] is not None:
            average = average.with_rows([entry["rows"]], curvature.parts[name].layout)
        estimates[name] = replace(estimate, average=average, absent=entry["absent"])
    curvature.estimates = estimates
