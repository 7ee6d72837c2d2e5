"""Training by agents that talk to their neighbours only."""

from natgrad.decentralized.decentralized_kfac import DecentralizedKFAC
from natgrad.decentralized.gossip import Gossip, mixing_matrix

__all__ = ["DecentralizedKFAC", "Gossip", "mixing_matrix"]
