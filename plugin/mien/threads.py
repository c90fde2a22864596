"""How many threads a model runs with if nobody says."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Half of the processors that this process may use, at least 1: as in llama-cpp-python.

    Threads of a model wait for each other after every operation. With one for each processor, anything else
    that runs on the machine makes all of them wait.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        count = os.cpu_count() or 1
    return max(count // 2, 1)
