"""Training in several processes: statistics reduced, values measured over the joint batch."""

from natgrad.distributed.replicas import Replicas

__all__ = ["Replicas"]
