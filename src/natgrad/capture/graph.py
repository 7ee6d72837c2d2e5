"""Which graphs of passes are alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def graph_hash(output: Tensor) -> int:
    """Return a number that graphs of unlike operations, or unlike ways between them, differ in.

    What the operations are given, sizes and places among them, makes no difference.
    """
    root: Any = output.grad_fn
    numbers = {root: 0}
    waiting, met = [root], []
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        following = [one for one, _ in node.next_functions]
        for one in following:
            if one not in numbers:
                numbers[one] = len(numbers)
                waiting.append(one)
        met.append((type(node), *map(numbers.__getitem__, following)))
    return hash(tuple(met))
