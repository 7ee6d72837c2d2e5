"""How far a job of several parts is."""

from __future__ import annotations


class Progress:
    """Told of the parts of a job; one that does something overrides the methods."""

    def begin(self, part: str) -> None:
        """A part of this name begins."""

    def progress(self, share: float) -> None:
        """This share of it is done."""

    def end(self, line: str) -> None:
        """It has ended, or was there already, as the line says."""
