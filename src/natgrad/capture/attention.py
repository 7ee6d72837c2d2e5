"""``nn.MultiheadAttention``: the projections inside it, which no module hook can see.

While the layer runs, a private copy of :func:`torch.nn.functional.multi_head_attention_forward`
whose ``linear`` records its inputs and outputs stands in for the original. Nothing global is
changed and the computation is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from natgrad.capture.hooks import outside_graphs
from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    is_data,
    is_parameter,
    register_kind,
)
from natgrad.jacobians import LayerJacobian


class AttentionKind(LayerKind):
    """Input and output projections of attention, as two linear blocks.

    With self-attention the three input projections are one linear map of one input. Otherwise
    query, key and value positions are laid one after the other, each seeing its own rows of the
    packed weight.
    """

    owned_children: tuple[str, ...] = ("out_proj",)
    own_layout: ClassVar[bool] = True
    records_inside: ClassVar[bool] = True

    def recorder(self, module: nn.Module, record: Callable[[LayerCall], None]) -> RecordProjections:
        """Return a mode that records the projections."""
        return RecordProjections(cast(nn.MultiheadAttention, module), record)

    def parameter_groups(self, module: nn.Module) -> list[tuple[str, ...]]:
        """Return the input projections and the output projection."""
        attention = cast(nn.MultiheadAttention, module)
        bias = attention.in_proj_bias is not None
        groups: list[tuple[str, ...]]
        if attention._qkv_same_embed_dim:
            groups = [("in_proj_weight", "in_proj_bias") if bias else ("in_proj_weight",)]
        else:
            groups = [("q_proj_weight",), ("k_proj_weight",), ("v_proj_weight",)]
            groups += [("in_proj_bias",)] if bias else []
        out_bias = attention.out_proj.bias is not None
        groups.append(("out_proj.weight", "out_proj.bias") if out_bias else ("out_proj.weight",))
        return groups

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return which recorded projections concern a block."""
        first = names[0]
        if first.startswith("out_proj"):
            return ("out",)
        return {
            "q_proj_weight": ("query",),
            "k_proj_weight": ("key",),
            "v_proj_weight": ("value",),
        }.get(first, ("packed", "query", "key", "value"))

    def samples_first(self, call: LayerCall, gradients: Tensor) -> Tensor:
        """Turn ``(K, T, B, d)`` or ``(K, T·B, d)`` into ``(K, B, T, d)``."""
        features = gradients.shape[-1]
        return gradients.reshape(len(gradients), -1, call.options["batch"], features).transpose(
            1, 2
        )

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows; a projection that fills only some output rows is padded with zeros."""
        rows: list[tuple[Tensor, Tensor]] = []
        layout, samples = block.layout, block.samples
        separate = block.names[0] in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        for call, delta in block.single_outputs():
            a = _of_samples(call.inputs[0], call, samples)[..., : layout.d_in]
            d = torch.stack([_of_samples(part, call, samples) for part in delta], dim=1)
            offset = 0 if separate else call.options["offset"]
            missing = layout.d_out - offset - d.shape[-1]
            if offset or missing:
                d = functional.pad(d, (offset, missing))
            rows.append((a.unsqueeze(2), d.unsqueeze(3)))
        return block.linear(rows)


def _of_samples(tensor: Tensor, call: LayerCall, samples: int) -> Tensor:
    """Turn ``(T, B, d)`` or ``(T·B, d)``, time outermost, into ``(N, T', d)``."""
    features = tensor.shape[-1]
    moved = tensor.reshape(-1, call.options["batch"], features).transpose(0, 1)
    return call.axis.samples_first(moved, samples).reshape(samples, -1, features)


class RecordProjections(TorchFunctionMode):
    """Record every projection of one attention call.

    Args:
        module: The attention layer.
        record: Receives one :class:`LayerCall` per projection.
    """

    def __init__(self, module: nn.MultiheadAttention, record: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self.module = module
        self.record = record
        self.batch: int = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run attention through the recording copy; leave every other function alone."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            self.batch = query.shape[1] if query.dim() == 3 else 1
            return _attend(self._linear, args, kwargs)
        return func(*args, **kwargs)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = functional.linear(inputs, weight, bias)
        found = self._identify(weight)
        if found is not None and output.requires_grad:
            key, offset = found
            options = {"batch": self.batch, "offset": offset}
            own, of_data = inputs.detach(), is_data(inputs)
            if is_parameter(inputs):  # Which in shards has no memory after the pass.
                own = own.clone()
            self.record(LayerCall(self.module, key, (own,), (output,), options, of_data=of_data))
        return output

    def _identify(self, weight: Tensor) -> tuple[str, int] | None:
        """Return which projection uses a weight and where its rows start in the packed bias."""
        module = self.module
        if weight is module.out_proj.weight:
            return "out", 0
        width = module.embed_dim
        if module._qkv_same_embed_dim:
            packed = module.in_proj_weight
            if weight is packed or weight._base is packed:
                return "packed", (weight.storage_offset() - packed.storage_offset()) // width
            return None
        for index, name in enumerate(("query", "key", "value")):
            if weight is getattr(module, f"{name[0]}_proj_weight"):
                return name, index * width
        return None


@outside_graphs  # The compiler would look for `linear` in the namespace of the original.
def _attend(linear: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _recording_attention(linear)(*args, **kwargs)


def _recording_attention(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """Copy PyTorch's attention function and what it calls, with ``linear`` replaced."""
    namespace = dict(vars(functional))
    namespace["linear"] = linear
    for name, value in vars(functional).items():
        if isinstance(value, FunctionType) and "linear" in value.__code__.co_names:
            copy = FunctionType(
                value.__code__, namespace, name, value.__defaults__, value.__closure__
            )
            copy.__kwdefaults__ = value.__kwdefaults__
            namespace[name] = copy
    return cast(Callable[..., Any], namespace["multi_head_attention_forward"])


register_kind(AttentionKind(), nn.MultiheadAttention)
