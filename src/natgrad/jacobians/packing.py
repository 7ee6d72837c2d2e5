"""Copies of rows in little memory, and rows as plain values for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.jacobians.collection import Jacobians, ScaledRows
from natgrad.jacobians.dense import DenseJacobian
from natgrad.jacobians.embedding import EmbeddingJacobian
from natgrad.jacobians.layer import LayerJacobian
from natgrad.jacobians.linear import LinearJacobian, tensor_identity
from natgrad.jacobians.tied import SumJacobian
from natgrad.layouts import BlockLayout, ParameterLayout


def copied(rows: Jacobians) -> Jacobians:
    """Return copies of rows, each in whichever form is smaller: factored, or one gradient per row.

    Nothing changed in place later reaches them.
    """
    copies: dict[Any, Tensor] = {}
    kept = {name: _copied(block, copies) for name, block in rows.items()}
    return Jacobians(rows.layout, kept, rows.samples, rows.directions)


def _copied(rows: LayerJacobian, copies: dict[Any, Tensor]) -> LayerJacobian:
    """Return a copy of one layer's rows; ``copies`` are those made so far."""
    if isinstance(rows, SumJacobian):
        return SumJacobian([_copied(part, copies) for part in rows.parts], rows.layout)
    state = rows.state()
    elements = sum(tensor.numel() for tensor in state.values())
    factored = type(rows) in (LinearJacobian, EmbeddingJacobian)
    if not factored or rows.rows * rows.layout.numel < elements:
        return _as_dense(rows)
    packed = pack_layer(rows)
    for key, tensor in state.items():
        identity = tensor_identity(tensor)
        if identity not in copies:
            copies[identity] = tensor.clone()
        packed[key] = copies[identity]
    return unpack_layer(packed, rows.device)


def _as_dense(rows: LayerJacobian) -> DenseJacobian:
    matrices = rows.per_sample_gradients()
    flat = rows.layout.flat(matrices).reshape(rows.samples, rows.directions, -1)
    layout = replace(
        rows.layout, groups=1, d_out=1, d_in=rows.layout.numel, has_weight=True, has_bias=False,
        transposed=False, one_hot=False,
    )  # fmt: skip
    return DenseJacobian(layout, flat.clone())


def pack(rows: Jacobians) -> dict[str, Any]:
    """Return rows as tensors and plain values."""
    blocks = {name: pack_layer(block) for name, block in rows.items()}
    state = {"samples": rows.samples, "directions": rows.directions, "blocks": blocks}
    if isinstance(rows, ScaledRows):
        state |= {"scales": rows.scales, "coordinates": rows.coordinates}
    return state


def unpack(state: Mapping[str, Any], layout: ParameterLayout, device: torch.device) -> Jacobians:
    """Return the rows that :func:`pack` packed."""
    blocks = {name: unpack_layer(block, device) for name, block in state["blocks"].items()}
    rows = Jacobians(layout, blocks, state["samples"], state["directions"])
    if "scales" not in state:
        return rows
    return ScaledRows(rows, state["scales"].to(device), state["coordinates"].to(device))


def pack_layer(rows: LayerJacobian) -> dict[str, Any]:
    """Return the rows of one layer as tensors and plain values."""
    if isinstance(rows, SumJacobian):
        parts = [pack_layer(part) for part in rows.parts]
        return {"form": "sum", "layout": _pack_layout(rows.layout), "parts": parts}
    state: dict[str, Any] = {"layout": _pack_layout(rows.layout), **rows.state()}
    if isinstance(rows, EmbeddingJacobian):
        return {"form": "embedding", **state}
    if isinstance(rows, LinearJacobian):
        return {"form": "linear", "bias_value": rows.bias_value, **state}
    return {"form": "dense", **state}


def unpack_layer(state: Mapping[str, Any], device: torch.device) -> LayerJacobian:
    """Return the rows that :func:`pack_layer` packed."""
    layout = _unpack_layout(state["layout"])
    if state["form"] == "sum":
        return SumJacobian([unpack_layer(part, device) for part in state["parts"]], layout)
    if state["form"] == "dense":
        return DenseJacobian(layout, state["rows"].to(device))
    gradients = state["output_gradients"].to(device)
    if state["form"] == "embedding":
        return EmbeddingJacobian(layout, state["indices"].to(device), gradients)
    inputs = state["inputs"].to(device)
    return LinearJacobian(layout, inputs, gradients, bias_value=state["bias_value"])


def _pack_layout(layout: BlockLayout) -> dict[str, Any]:
    """Return a layout as plain values, with its kind: they differ in the order of parameters."""
    return {"kind": type(layout).__name__, **asdict(layout)}


def _unpack_layout(state: Mapping[str, Any]) -> BlockLayout:
    known: tuple[type[BlockLayout], ...] = (BlockLayout, *BlockLayout.__subclasses__())
    fields = dict(state)
    name = fields.pop("kind")
    return next(kind for kind in known if kind.__name__ == name)(**fields)
