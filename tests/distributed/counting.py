"""What operations move between processes, and what they hold."""

from __future__ import annotations

import time
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Seconds that a message may take to let go.
LATE = 0.1


class Held(TorchDispatchMode):
    """Counts the bytes of storages that are alive, of those that operations return inside.

    Messages let go of what they sent in a thread of their own, at times after the program has gone
    on: a level that would be the highest counts once that thread has had its time.

    Args:
        late: Seconds that a message may take to let go.

    Attributes:
        level: Now.
        most: At most. What it is set to at first takes no time to reach.
    """

    def __init__(self, late: float = LATE) -> None:
        super().__init__()
        self.late, self.level, self.most = late, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.level += self._sizes[key]
                    weakref.finalize(storage, self._gone, key)
                    if self.level > self.most:
                        time.sleep(self.late)
                    self.most = max(self.most, self.level)
        return result

    def _gone(self, key: int) -> None:
        self.level -= self._sizes.pop(key)


class Received(TorchDispatchMode):
    """Counts the bytes that gathers and exchanges of pieces leave in this process.

    Attributes:
        sizes: Collective → bytes, what comes from this process itself included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("all_gather_into_tensor", "alltoall_base_"):
            found = result if isinstance(result, Tensor) else args[0]
            self.sizes[name] = self.sizes.get(name, 0) + found.numel() * found.dtype.itemsize
        return result
