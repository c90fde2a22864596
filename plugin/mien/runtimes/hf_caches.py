"""How many tokens a transformers cache holds, whatever its class.

Caches of attention know it. Those of recurrent models do not: of some it can be told only whether they are
empty, of others nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_NAMES = ("cache", "past_key_values", "cache_params", "state")  # as families and versions call it


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass or of `generate`; None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def lasts(cache: Any) -> bool:
    """Whether it is an object that is passed again with every token; legacy tuples and lists are not."""
    return cache is not None and not isinstance(cache, (tuple, list))


def held(cache: Any) -> int | None:
    """How many tokens it holds; None if it does not know, or only a device does."""
    longest = None
    for length in _lengths(cache):
        if isinstance(length, Tensor) and length.device.type != "cpu":
            return None
        longest = int(length)
        if longest:  # a layer that keeps no keys says 0
            break
    return longest


def is_empty(cache: Any) -> bool | None:
    """Whether it holds no token; None if that can't be told. May wait for a device."""
    lengths = [int(length) for length in _lengths(cache)]
    if lengths:
        return not any(lengths)
    if isinstance(cache, (tuple, list)):  # RWKV's states
        return False
    state = getattr(cache, "has_previous_state", None)
    if state is None:
        return None
    return not (state() if callable(state) else state)


def _lengths(cache: Any) -> Iterator[int | Tensor]:
    """By layer, as far as its layers know. No cache holds 0 tokens."""
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None or (isinstance(cache, (tuple, list)) and not cache):
        yield 0
    elif isinstance(cache, (tuple, list)):
        if isinstance(cache[0], (tuple, list)):  # keys and values, before transformers had caches of its own
            yield cache[0][0].shape[-2] if cache[0] else 0
    elif isinstance(getattr(cache, "layers", None), list):
        if not cache.layers:  # they are made when the first token comes
            yield 0
        yield from (layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length"))
    elif isinstance(keys := getattr(cache, "key_cache", None), list):
        # Hybrid caches of transformers 4, whose get_seq_length takes an empty tensor's batch for a length.
        yield from (key.shape[-2] if key.numel() else 0 for key in keys)
    elif hasattr(cache, "get_seq_length"):
        yield cache.get_seq_length()
