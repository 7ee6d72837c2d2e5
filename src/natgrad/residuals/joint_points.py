"""How many points all processes have together, and each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import Self


@dataclass(frozen=True)
class JointPoints:
    """The points of a residual loss that several processes have together; or one alone.

    Attributes:
        each: Part → number of points, of every process in the order of ranks.
        widths: Part → residuals per point, as far as they are known.
    """

    each: tuple[dict[str, int], ...]
    widths: dict[str, int]

    @classmethod
    def of(cls, *sizes: Mapping[str, tuple[int, int]]) -> Self:
        """Return the points of processes that have told part → points and residuals at each, or 0.

        That processes have other parts, or a part no points, is a ValueError.
        """
        names, counts, widths = list(sizes[0]), [], dict.fromkeys(sizes[0], 0)
        for one in sizes:
            if list(one) != names:
                raise ValueError(
                    "processes must have the same parts in the same order, without points where "
                    f"they have none (points[:0]), got {names} and {list(one)}"
                )
            counts.append({name: points for name, (points, _) in one.items()})
            widths = {name: max(widths[name], width) for name, (_, width) in one.items()}
        empty = [name for name in names if not any(one[name] for one in counts)]
        if empty:
            everywhere = " in any process" if len(sizes) > 1 else ""
            raise ValueError(f"no points{everywhere} in {', '.join(map(repr, empty))}")
        return cls(tuple(counts), widths)

    @property
    def counts(self) -> dict[str, int]:
        """Part → points of all processes."""
        return {name: sum(one[name] for one in self.each) for name in self.widths}

    @property
    def total(self) -> int:
        """Points of all parts and processes."""
        return sum(self.counts.values())

    @property
    def rows(self) -> int:
        """Residuals of all of them."""
        return sum(count * self.widths[name] for name, count in self.counts.items())

    @property
    def least_width(self) -> int:
        """Residuals per point that chunks are padded to, so that those of all processes agree."""
        return max(self.widths.values()) if len(self.each) > 1 else 0
