"""Watching a model: hooks that record what layer Jacobians are made of."""

from natgrad.capture import (  # noqa: F401
    attention,
    convolution,
    embedding,
    linear,
    normalization,
    recurrent,
)
from natgrad.capture.blocks import Block
from natgrad.capture.capture import Capture
from natgrad.capture.forward_pass import ForwardPass
from natgrad.capture.kinds import LayerCall, LayerKind, register_kind, register_layer

__all__ = [
    "Block",
    "Capture",
    "ForwardPass",
    "LayerCall",
    "LayerKind",
    "register_kind",
    "register_layer",
]
