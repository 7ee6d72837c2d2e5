"""Which parameters form a block: a layer's own, or one that layers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from natgrad.capture.convolution import convolution_within
from natgrad.capture.generic import GenericKind, free_layout
from natgrad.capture.kinds import LayerKind, find_kind
from natgrad.capture.likeness import kind_by_trial
from natgrad.capture.normalization import kind_within
from natgrad.layouts import BlockLayout

COMPLEX = "complex: only real parameters are preconditioned"


@dataclass(frozen=True)
class Use:
    """One layer's use of a block's parameters.

    Attributes:
        module: The layer.
        kind: How it is recorded.
        names: The block's parameters, by their names within the layer.
        keys: Which of the layer's recorded calls concern the block.
        layout: The block's layout as this layer stores it.
    """

    module: nn.Module
    kind: LayerKind
    names: tuple[str, ...]
    keys: tuple[str, ...]
    layout: BlockLayout


@dataclass(frozen=True)
class Block:
    """The trainable parameters of one layer, or one tied parameter.

    Attributes:
        name: Qualified layer name; a qualified parameter name where layers share a parameter.
        kind: Layer class name, or the names joined by ``+`` for tied layers.
        layout: Names, shapes and matrix form.
        uses: The layers that use it; none if its rows are had at the parameters only.
    """

    name: str
    kind: str
    layout: BlockLayout
    uses: tuple[Use, ...]


def find_blocks(
    model: nn.Module, excluded: Collection[str] = ()
) -> tuple[dict[str, Block], dict[str, str]]:
    """Return a model's blocks by name, and parameter name → why no block covers it."""
    # A parameter without entries has nothing to train: it is in no block, and not missing.
    names = {
        p: n
        for n, p in model.named_parameters()
        if p.requires_grad and p.numel() and n not in excluded
    }
    uncovered: dict[str, str] = {n: COMPLEX for p, n in names.items() if p.is_complex()}
    names = {p: n for p, n in names.items() if n not in uncovered}
    uses: dict[nn.Parameter, list[tuple[str, nn.Module, LayerKind, str]]] = {}
    groups: list[tuple[str, nn.Module, LayerKind, tuple[str, ...]]] = []
    owned: set[nn.Module] = set()
    # Parameters whose rows are had at themselves only: those in no formula of their layer.
    free: list[tuple[str, str, list[nn.Parameter]]] = []
    generic = GenericKind()
    for module_name, module in model.named_modules():
        if module in owned:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            of = dict(module.named_parameters(recurse=False))
            for group in generic.parameter_groups(module):
                own = [of[local] for local in group if of[local] in names]
                free.append((module_name, type(module).__name__, own))
            continue
        kind = find_kind(module) or kind_within(module) or convolution_within(module)
        kind = kind or kind_by_trial(module) or generic
        owned.update(module.get_submodule(child) for child in kind.owned_children)
        covered: set[nn.Parameter] = set()
        reason = kind.refuse(module)
        present = {n for n, p in module.named_parameters(remove_duplicate=False) if p in names}
        for group in kind.parameter_groups(module):
            trainable = tuple(n for n in group if n in present)
            if not trainable:
                continue
            if reason is None:
                groups.append((module_name, module, kind, trainable))
            for local in trainable:
                parameter = module.get_parameter(local)
                covered.add(parameter)
                if reason is None:
                    uses.setdefault(parameter, []).append((module_name, module, kind, local))
                else:
                    uncovered[names[parameter]] = f"{type(module).__name__}: {reason}"
        for parameter in module.parameters(recurse=False):
            if parameter in names and parameter not in covered:
                free.append((module_name, type(module).__name__, [parameter]))
    # Uses by layers count at the parameter itself, too.
    alone = {parameter for *_, members in free for parameter in members}
    for parameter in list(uses):
        if parameter in alone or names[parameter] in uncovered:
            del uses[parameter]  # A tied parameter is covered by all its layers or not at all.

    blocks: dict[str, Block] = {}
    for module_name, module, kind, group in groups:
        alive = tuple(n for n in group if module.get_parameter(n) in uses)
        if not alive:
            continue
        if all(len(uses[module.get_parameter(n)]) == 1 for n in alive):
            several = len(kind.parameter_groups(module)) > 1  # Trained or not.
            name = _block_name(module_name, module, kind, alive[0] if several else "")
            use = _use(module, kind, alive, names)
            blocks[name] = Block(name, type(module).__name__, use.layout, (use,))
            continue
        for local in alive:
            parameter = module.get_parameter(local)
            name = names[parameter]
            if name in blocks:
                continue
            shared = tuple(_use(m, k, (n,), names) for _, m, k, n in uses[parameter])
            kinds = "+".join(dict.fromkeys(type(u.module).__name__ for u in shared))
            layout = min(shared, key=_preference).layout
            blocks[name] = Block(name, kinds, layout, shared)
    for module_name, kind_name, members in free:
        own = [p for p in members if p in alone and names[p] not in uncovered]
        alone.difference_update(own)
        if own:
            qualified = tuple(names[p] for p in own)
            name = qualified[0] if len(own) == 1 else module_name or kind_name
            layout = free_layout(qualified, tuple(tuple(p.shape) for p in own))
            blocks[name] = Block(name, kind_name, layout, ())
    return blocks, uncovered


def _preference(use: Use) -> tuple[bool, bool]:
    """Order uses: a factored form before plain rows, the ordinary way round before the other."""
    return isinstance(use.kind, GenericKind), use.layout.transposed


def _use(
    module: nn.Module, kind: LayerKind, local: tuple[str, ...], names: dict[nn.Parameter, str]
) -> Use:
    qualified = tuple(names[module.get_parameter(n)] for n in local)
    return Use(module, kind, local, kind.key_of(local), kind.layout(module, local, qualified))


def _block_name(module_name: str, module: nn.Module, kind: LayerKind, first: str) -> str:
    """Return the name of a block, with that of its first parameter where a layer has several."""
    base = module_name or type(module).__name__
    if not first:
        return base
    others = {_part(group[0]) for group in kind.parameter_groups(module) if first not in group}
    others |= {name for name, _ in module.named_children()} - set(kind.owned_children)
    part = _part(first)
    return f"{base}.{first if part in others else part}"


def names_by_reason(reasons: Mapping[str, str]) -> str:
    """Return names for a message, all of them, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(some)} ({why})" for why, some in names.items())


def _part(local: str) -> str:
    """Return what a parameter belongs to, by its name within the layer."""
    return local.removesuffix(".weight").removesuffix("_weight").removesuffix("_bias")
