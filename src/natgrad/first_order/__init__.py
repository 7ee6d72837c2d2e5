"""First-order relatives: rivals that are no natural gradients."""

from natgrad.first_order.implicit_sgd import ImplicitSGD
from natgrad.first_order.padam import Padam

__all__ = ["ImplicitSGD", "Padam"]
