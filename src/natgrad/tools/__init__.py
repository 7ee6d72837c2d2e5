"""What else the Fisher matrix is used for: one file per use."""

from natgrad.tools.influence import influence

__all__ = ["influence"]
