"""Where the rows of every block come from: which calls, products or parameters, and which axis."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.capture.blocks import Block, Use
from natgrad.capture.generic import DENSE_LIMIT, GenericKind, NotRunAgain
from natgrad.capture.graph import graph_hash
from natgrad.capture.kinds import LayerCall, LayerKind
from natgrad.capture.product_kinds import WatchedParameter, is_product
from natgrad.capture.samples import SampleAxis

#: A layer, the part of it that was called, which call of the pass, and dimensions of the output.
Place = tuple[nn.Module, str, int, int]
#: One tensor per output of a call; None where nothing came.
Gradients = list[Tensor | None]

#: Up to so many names stand in a sentence.
SHOWN = 6

#: Passes of so many unlike graphs are checked, or sizes looked at; of more of them, of ever fewer.
UNLIKE = 8
#: Between these, others are looked at, one in so many passes at most.
PASSES_PER_LOOK = 16

UNCALLED = "is used without a call of its module"
COUPLED = "the samples of a batch are coupled in it or after it"


@dataclass(eq=False)
class RecordedCall:
    """A layer call of a pass, and the gradients of its outputs while rows are made of them.

    Attributes:
        call: What the layer was called with.
        kind: The kind of the layer.
        place: What tells it from the other calls of a pass.
        shapes: Shapes of the outputs.
        alive: Which of them have a graph.
        dtypes: Their types, and those of their gradients.
        edges: Where the gradients of these can be had, shaped as what they are views of; empty if
            vectors cannot be pulled back.
        user_gradients: What the user's backward pass brought to the outputs, where it is watched.
        axis: Where its samples lie; None if they are coupled.
        gradients: ``(K, *output.shape)`` of every output.
        apart: ``(N·K, *output.shape)``, every sample's vectors pulled back alone, where the block
            needs it; else ``gradients``.
    """

    call: LayerCall
    kind: LayerKind
    place: Place
    shapes: list[torch.Size]
    alive: list[bool]
    dtypes: list[torch.dtype]
    edges: list[GradientEdge] = field(default_factory=list)
    user_gradients: Gradients = field(default_factory=list)
    axis: SampleAxis | None = SampleAxis()  # noqa: RUF009, frozen
    gradients: Gradients = field(default_factory=list)
    apart: Gradients = field(default_factory=list)

    def spread(self, found: Iterable[Tensor | None]) -> Gradients:
        """Return gradients ``(K, ...)`` at the edges as gradients of the outputs."""
        remaining = iter(found)
        each = [next(remaining) if alive else None for alive in self.alive]
        pairs = zip(each, self.shapes, strict=True)
        return [g if g is None else g.reshape(len(g), *shape) for g, shape in pairs]

    def is_of(self, use: Use) -> bool:
        """Return whether it is one that a use of a parameter speaks of."""
        return self.call.module is use.module and self.call.key in use.keys


class RowSources:
    """What rows are made of, and where samples lie, as far as it is known.

    :class:`natgrad.capture.row_check.RowCheck` finds it out, and
    :class:`natgrad.capture.rows.RowBuilder` goes by it.

    * Samples that lie in another dimension than the first, or interleaved, are brought to it.
    * Layers that couple samples (graph convolutions, routing between experts, a batch norm of
      one's own), or that feed such a layer, get rows per output: every sample's vectors are pulled
      back alone. Where vectors of different samples are independent with mean zero, the sum of
      their rows serves as one row, which is right on average and costs nothing.
    * Products with parameters outside the calls of layers (``F.linear(h, table.weight)``, stacked
      experts, lists of parameters) count as calls of layers where they explain the gradient.
    * Other uses of parameters outside the calls of their modules (``layer.forward(x)``, powers of
      a matrix) get rows from the gradient at the parameter.

    Args:
        model: The model.
        blocks: Its blocks.
        watched: Parameters whose products may be recorded.
        on_finding: Called with one sentence about whatever a user should know.
        tells_coupled: Whether a user should know of modules that couple samples, and of parameters
            used outside the calls of theirs; not where rows are only ever added up.

    Attributes:
        names: Qualified names of modules.
        direct: Block name → why its rows are taken at the parameters.
        by_products: Blocks whose products are, or are among, their rows.
        inseparable: Block name → why the user's own backward pass leaves no rows of single samples.
        unavailable: Block name → why it has no rows at all.
        products: Block name → its uses by products.
        uses: Block name → the uses that make up its rows.
        rerun: Blocks whose modules are run again to make their rows.
        axes: Where the samples of a call lie; None where they are coupled.
        mixed: Calls of matrices ``(T, d)`` of which some position belongs to several samples.
        unreached: Calls that no vector has reached yet.
        silent: Calls of blocks whose gradients were all zero when they were checked.
        constant: Modules whose output depends on no input.
        whole: Modules that are run again on the whole batch.
        time_first: Whether the samples turned out to lie in the output's second dimension.
        most_samples: The most that were in a pass whose rows were checked.
        checks: How often rows were checked.
        checked: Whether those of the last pass are known to be right.
        passes: How many there were since rows were last checked.
        look_due: Whether the present one is to be looked at, though its calls are known,
        compare_due: and its rows compared with gradients.
        graphs: Those of passes (:func:`natgrad.capture.graph.graph_hash`) that all this holds for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Block],
        watched: Sequence[WatchedParameter],
        on_finding: Callable[[str], None],
        tells_coupled: bool = True,
    ) -> None:
        self.blocks: Mapping[str, Block] = blocks
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self._holders: dict[str, tuple[nn.Module, str]] = {
            f"{prefix}.{local}" if prefix else local: (module, local)
            for prefix, module in model.named_modules()
            for local, _ in module.named_parameters(recurse=False, remove_duplicate=False)
        }
        reasons = {name: _only_at_parameters(block) for name, block in blocks.items()}
        self.direct: dict[str, str] = {name: why for name, why in reasons.items() if why}
        self.inseparable: dict[str, str] = dict(self.direct)
        self.unavailable: dict[str, str] = {}
        self.on_finding = on_finding
        self.tells_coupled: bool = tells_coupled
        self.by_products: set[str] = set()
        self.products: dict[str, tuple[Use, ...]] = {one.block: one.uses for one in watched}
        self.uses: dict[str, tuple[Use, ...]] = {name: b.uses for name, b in blocks.items()}
        self._users: dict[nn.Module, list[tuple[str, Use]]] = {}
        self.rerun: list[str] = []
        self.index_uses()
        self.axes: dict[Place, SampleAxis | None] = {}
        self.mixed: set[Place] = set()
        self.unreached: set[Place] = set()
        self.silent: set[Place] = set()
        self.constant: set[nn.Module] = set()
        self.whole: set[nn.Module] = set()
        self.time_first: bool = False
        self.most_samples: int = 0
        self.checks: int = 0
        self.checked: bool = False
        self.passes: int = 0
        self.look_due: bool = False
        self.compare_due: bool = False
        self.graphs: set[int] = set()
        self._begun: Callable[[], Tensor | None] = lambda: None
        self._unspent = 0
        self._of_data: dict[tuple[nn.Module, str], bool] = {}
        self._sizes: dict[Place, set[float]] = {}  # Entries per sample.

    def parameter(self, name: str) -> Tensor:
        """Return the parameter of a name as it is now: in shards, or whole as a pass has it."""
        module, local = self._holders[name]
        found: Tensor = getattr(module, local)
        return found

    @property
    def sums_rows(self) -> bool:
        """Whether rows of some block may be sums over the samples of a batch."""
        return bool(self.direct or self.whole) or None in self.axes.values()

    def are_of_layers(self, name: str) -> bool:
        """Return whether a block's rows come from calls of its layers alone."""
        return name not in self.direct and name not in self.by_products

    def note_inputs(self, recorded: Sequence[RecordedCall]) -> None:
        """Note whether the inputs of calls are data; once they were not, they no longer count."""
        for one in recorded:
            key = one.call.module, one.call.key
            self._of_data[key] = one.call.of_data and self._of_data.get(key, True)

    def reading_data(self) -> set[str] | None:
        """Return the blocks whose inputs are data, in all calls that rows were made of.

        None while there were none.
        """
        if not self._of_data:
            return None
        found = set()
        for name, uses in self.uses.items():
            keys = [(use.module, key) for use in uses for key in use.keys]
            seen = [self._of_data[key] for key in keys if key in self._of_data]
            if seen and all(seen):
                found.add(name)
        return found

    def forget_products(self) -> None:
        """Make rows without products from now on, as of a model that has been compiled."""
        for name in self.by_products:
            self.uses[name] = self.blocks[name].uses
            reason = _only_at_parameters(self.blocks[name])
            if reason is not None:
                self.direct[name] = self.inseparable[name] = reason
        self.by_products.clear()
        self.index_uses()
        self.forget()

    def index_uses(self) -> None:
        """Follow a change of ``uses``."""
        self._users.clear()
        self.rerun = [
            name
            for name, uses in self.uses.items()
            if any(isinstance(use.kind, GenericKind) for use in uses)
        ]
        for name, uses in self.uses.items():
            for use in uses:
                self._users.setdefault(use.module, []).append((name, use))

    def costly(self, products: bool) -> Iterator[str]:
        """Say which rows have no factored form although they are large, if there are some.

        Args:
            products: Whether to speak of blocks whose products may be their rows, or of others.
        """
        found = [
            block
            for name, block in self.blocks.items()
            if (name in self.products) == products
            and block.layout.numel > DENSE_LIMIT
            and name in self.rerun
            and name not in self.direct
            # What serves all samples has one row where rows are only ever added up.
            and (self.tells_coupled or not all(_is_constant(use.module) for use in block.uses))
        ]
        if found:
            shown = ", ".join(f"{block.name!r} ({block.kind})" for block in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            size = sum(block.layout.numel for block in found)
            yield (
                f"{shown}{more} {'are each' if len(found) > 1 else 'is'} of a kind without a "
                f"formula: rows of {size:,} parameters take {size * 4 * 128 / 2**20:,.1f} MiB per "
                "vector at a batch of 128, and a backward pass per sample; natgrad.register_layer "
                "takes a formula"
            )

    def forget(self) -> None:
        """Check again at the next pass. What was coupled once is taken to be so."""
        self.checked, self.passes = False, 0
        self.graphs.clear()
        self._begun = lambda: None
        self.axes = {place: axis for place, axis in self.axes.items() if axis is None}

    def look_at_modes(self) -> None:
        """Run no module again that has become random or coupled since, as in training mode."""
        for name in self.rerun:
            reason = None if name in self.direct else _only_at_parameters(self.blocks[name])
            if reason is not None:
                self.direct[name] = self.inseparable[name] = reason

    def knows(self, recorded: Sequence[RecordedCall]) -> bool:
        """Return whether there is nothing to find out about a pass, as in most of them."""
        # Modules that are run again may have become random or coupled since.
        known = self.checked and not (self.look_due or self.rerun)
        return known and all(one.place in self.axes for one in recorded)

    def begin_pass(self, recorded: Sequence[RecordedCall], output: Tensor) -> None:
        """Say whether there is something to find out about a pass, if it is another one.

        Values may come to mix samples, or to move them, by the same operations: passes 1, 2, 4, 8,
        … after a check are looked at, and at every third of them, at rows.
        """
        if self._begun() is output:
            return
        self._begun = weakref.ref(output)
        self.passes += 1
        if len(output) > self.most_samples:
            self.checked = False  # Of fewer, one alone the least, more layouts are alike.
        self._look_at_sizes(recorded, len(output))
        self.look_due = self.passes & (self.passes - 1) == 0
        self.compare_due = self.passes.bit_length() % 3 == 0
        self._look_at_graph(output)

    def _look_at_sizes(self, recorded: Sequence[RecordedCall], samples: int) -> None:
        """Have samples looked for again when they take more or fewer entries of an output than yet.

        They may be unequally large then, as graphs are, although those of other passes were not.
        """
        for one in recorded:
            axis, known = self.axes.get(one.place), self._sizes.setdefault(one.place, set())
            if axis is None or not (one.edges and samples):
                continue
            size = (_room(one, axis) or 0) / samples
            if size not in known:
                known.add(size)
                if len(known) > 1 and _is_soon_or_rare(len(known)):
                    self.passes = 1

    def _look_at_graph(self, output: Tensor) -> None:
        """Have a pass checked whose graph is none of those known, though its calls may be.

        Samples may be mixed from now on, two views laid otherwise, or weights used once more.
        """
        graph = graph_hash(output)
        self._unspent += 1
        if graph not in self.graphs:
            self.graphs.add(graph)
            if _is_soon_or_rare(len(self.graphs)):
                self.checked = False
            elif self._unspent >= PASSES_PER_LOOK:
                self._unspent -= PASSES_PER_LOOK
                self.look_due = self.compare_due = True

    def explained(self) -> list[str]:
        """Return the blocks whose rows are compared with gradients."""
        return [n for n in self.blocks if n not in self.direct and n not in self.unavailable]

    def available(self, recorded: Sequence[RecordedCall]) -> list[RecordedCall]:
        """Return the calls of layers, and products, whose outputs' gradients can be had.

        Products that no block's rows are known to be made of are among them until rows are checked.
        """
        calls = [one for one in recorded if one.edges]
        used = self.used(calls)
        if self.checked:
            return used
        kept = set(used)
        return [one for one in calls if one in kept or is_product(one.kind)]

    def used(self, calls: Sequence[RecordedCall]) -> list[RecordedCall]:
        """Return those calls that rows of some block are made of."""
        wanted: set[RecordedCall] = set()
        for name, of in self.by_block(calls).items():
            if name not in self.unavailable:
                wanted.update(of)
        return [one for one in calls if one in wanted]

    def by_block(self, calls: Sequence[RecordedCall]) -> dict[str, list[RecordedCall]]:
        """Return the calls of every block, in order of their layers' first call."""
        of_module: dict[nn.Module, list[RecordedCall]] = {}
        for one in calls:
            of_module.setdefault(one.call.module, []).append(one)
        found: dict[str, list[RecordedCall]] = {}
        for module in of_module:
            for name, use in self._users.get(module, ()):
                own = [one for one in of_module[module] if one.call.key in use.keys]
                own = [one for one in own if one not in found.get(name, ())]
                if own:
                    found.setdefault(name, []).extend(own)
        return found

    def axis(self, one: RecordedCall, samples: int) -> SampleAxis | None:
        """Return where the samples of a call lie; None if they are coupled."""
        if one.call.module in self.whole:
            return None
        axis = self.axes.get(one.place, SampleAxis())
        if axis is None or samples == 1:
            return axis
        room = _room(one, axis)
        return axis if room is not None and room % samples == 0 else None

    def are_ragged(self, calls: Sequence[RecordedCall]) -> bool:
        """Return whether every position of some calls belongs to one sample of the batch."""
        matrices = all(len(one.shapes[0]) == 2 and not one.kind.own_layout for one in calls)
        return matrices and not any(one.place in self.mixed for one in calls)

    def find_axes(self, calls: Sequence[RecordedCall], samples: int) -> None:
        """Set where the samples of calls lie.

        What has no room for equally large samples in one pass, as the nodes of unlike graphs have
        not, is coupled from then on: where it has, in another, they need not be equally large.
        """
        ragged: dict[Place, SampleAxis | None] = {}
        for one in calls:
            one.axis = self.axis(one, samples)
            known = self.axes.get(one.place) is None or one.call.module in self.whole
            if one.axis is None and not known:
                ragged[one.place] = None
        if ragged:
            self.axes.update(ragged)
            for name, of in self.by_block(calls).items():
                if any(one.place in ragged for one in of):
                    self.inseparable[name] = COUPLED
            self.tell_coupled(ragged)

    def tried(self, calls: Sequence[RecordedCall]) -> list[tuple[str, list[RecordedCall]]]:
        """Return blocks that have products which are not known to be rows of theirs, and these."""
        found: dict[str, list[RecordedCall]] = {}
        for name, uses in self.products.items():
            if name not in self.by_products and name not in self.unavailable:
                of = [one for one in calls if any(one.is_of(use) for use in uses)]
                if of:
                    found[name] = of
        return list(found.items())

    def distrust(self, name: str, error: Exception) -> None:
        """Take the rows of a block at the parameters, as its kind cannot make them."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        first = str(error).partition("\n")[0].partition(". ")[0]  # Errors of torch may fill pages.
        reason = f"has no rows by its module ({type(error).__name__}: {first})"
        self.take_directly(name, reason, always_told=not isinstance(error, NotRunAgain))

    def take_directly(self, name: str, reason: str, always_told: bool = False) -> None:
        """Take the rows of a block at the parameters, and say why if it matters."""
        self.direct[name] = reason
        if not (always_told or self.tells_coupled):
            return
        block = self.blocks[name]
        names = " and ".join(repr(n) for n in block.layout.names)
        self.on_finding(
            f"the block of {names} ({block.kind}) {reason}: rows are taken from the gradient at "
            "the parameter, exactly, but with a backward pass per sample where the Fisher type is "
            "not 'mc'"
        )

    def tell_uncalled(self) -> None:
        """Say which layers of known kinds are not called, if it has not been said of each."""
        uncalled = [n for n, why in self.direct.items() if why == UNCALLED and n not in self.rerun]
        if uncalled and not self.tells_coupled:
            named = ", ".join(map(repr, uncalled))
            self.on_finding(
                f"{named} take part without being called, so that a batch gives one row for each, "
                "which is right on average but noisy: so do layers inside of torch.vmap, those of "
                "an exported model, and of one compiled and run before it was handed over, if "
                "torch.compiler.reset() was not called"
            )

    def mixing(self, axes: Mapping[Place, SampleAxis | None]) -> list[nn.Module]:
        """Return modules whose samples are coupled although their output serves not all of them."""
        uses = [use for block in self.blocks.values() for use in block.uses]
        shared = {use.module for use in uses if use.kind.may_be_shared} | self.constant
        return [place[0] for place, axis in axes.items() if axis is None and place[0] not in shared]

    def tell_coupled(self, axes: Mapping[Place, SampleAxis | None]) -> None:
        """Say which modules couple samples, if any do and it matters."""
        modules = dict.fromkeys(self.mixing(axes))
        if modules and self.tells_coupled:
            named = ", ".join(f"{self.names.get(m, '')!r} ({type(m).__name__})" for m in modules)
            self.on_finding(
                f"the samples of a batch are coupled in or after {named}: rows are taken output by "
                "output, which costs a backward pass per sample where the Fisher type is not 'mc'"
            )


def _is_soon_or_rare(number: int) -> bool:
    """Return whether the n-th of unlike graphs or sizes is looked at, of many ever fewer."""
    return number <= UNLIKE or number & (number - 1) == 0


def _room(one: RecordedCall, axis: SampleAxis) -> int | None:
    """Return the size of the dimension of a call's output that holds samples, if there is one."""
    shape, kind = one.shapes[0], one.kind
    if not kind.own_layout or isinstance(kind, GenericKind):
        return shape[axis.dim] if len(shape) > axis.dim else None
    laid_out = kind.samples_first(one.call, torch.empty(1, *shape, device="meta"))
    return 0 if laid_out is None else laid_out.shape[1]


def _is_constant(module: nn.Module) -> bool:
    """Return whether a module is called without a sample, or, as a list, not at all."""
    lists = nn.utils.parametrize.ParametrizationList, nn.ParameterList, nn.ParameterDict
    return isinstance(module, lists)


def _only_at_parameters(block: Block) -> str | None:
    """Return why the rows of a block are had at its parameters only, or None."""
    if not block.uses:
        return "belongs to no layer of a known kind"
    for use in block.uses:
        if isinstance(use.kind, GenericKind):
            reason = use.kind.cannot_rerun(use.module)
            if reason is not None:
                return reason
    return None
