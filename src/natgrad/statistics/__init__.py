"""What is summed over rows: plain dataclasses of tensors that add, decay, move and are saved."""

from natgrad.statistics.kronecker import KroneckerStatistics
from natgrad.statistics.rows import RowStatistics
from natgrad.statistics.statistics import Statistics

__all__ = ["KroneckerStatistics", "RowStatistics", "Statistics"]
