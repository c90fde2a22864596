"""The hooks that say which token each row of a forward pass is, to whoever is attached.

A tracker sits on the module that runs the decoder layers and on the model's `generate`. It tells its
listener of each forward pass before its first layer runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import RuntimeNotSupported
from .hf_caches import cache_in
from .hf_rows import PACKED, Generation, Replies, Rows, packed, traced

_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Listener(Protocol):
    """Who is told of each forward pass."""

    def require(self, rows: Rows) -> None:
        """Raise RuntimeNotSupported if more must be known of such rows than is known."""

    def begin(self, rows: Rows) -> None: ...

    def end(self, output: Any) -> None:
        """output: of the pass; None if it raised."""


class _Method:
    """Over one of the model's methods; a copy of the model gets the plain one.

    own: whether it stands in for an attribute of the model itself, which its user has put there.
    """

    name = ""

    def __init__(self, model: Any, tracker: Tracker) -> None:
        self.original: Callable[..., Any] = getattr(model, self.name)
        self.own = self.name in vars(model)
        self.tracker = tracker
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # the bound method of the copied model

    def __reduce__(self) -> Any:
        if self.own:
            return _itself, (self.original,)
        return getattr, (self.original.__self__, self.name)  # type: ignore[attr-defined]  # it is bound

    def leave(self, model: Any) -> None:
        """Put back what was there."""
        if self.own:
            setattr(model, self.name, self.original)
        else:
            delattr(model, self.name)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


class _Generate(_Method):
    """Says which tokens were passed in."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(self.original).parameters
        given = {**dict(zip(names, args)), **kwargs}
        with self.tracker.during(_generation(getattr(self.original, "__self__", None), given)):
            return self.original(*args, **kwargs)


class _Batching(_Method):
    """Continuous batching packs requests, and fails in a thread: what it can't do is refused beforehand."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for listener in self.tracker.listeners:
            listener.require(Rows(1, 1, 1, untold=PACKED))
        return self.original(*args, **kwargs)


_METHODS = (_Generate, _Batching)


def _generation(model: Any, given: dict[str, Any]) -> Generation:
    """given: the arguments of `generate`, by name."""
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))

    def chosen(name: str) -> Any:
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    names = ("inputs", "input_ids", "inputs_embeds")
    found = [given[name] for name in names if isinstance(given.get(name), Tensor)]
    batch, columns = found[-1].shape[:2] if found else (1, 1)  # it begins with one token of its own
    drafts = any(chosen(name) for name in _DRAFTS)
    counted = bool(chosen("prefill_chunk_size"))
    mask = given.get("attention_mask")
    if counted and isinstance(mask, Tensor) and mask.dim() == 2:  # the cache's tokens may be left out
        columns = max(columns, mask.shape[1])
    return Generation(columns, batch, mask, counted, drafts)


class _Local(threading.local):
    generation: Generation | None = None


class Tracker:
    """Tells its listener what each row of a forward pass is. See `tracker_of`.

    It lives in the hooks of the owner, which is the module that runs the layers, and holds no model.
    """

    def __init__(self) -> None:
        self.local = _Local()
        self.listeners: tuple[Listener, ...] = ()  # one, or none in a copy
        self._replies = Replies()
        self._handles: list[Any] = []
        self._order: tuple[str, ...] = ()

    def join(self, listener: Listener, owner: nn.Module, model: Any) -> None:
        self._order = tuple(inspect.signature(owner.forward).parameters)
        self._handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True),
            owner.register_forward_hook(self.after, always_call=True),
        ]
        for method in _METHODS:
            if callable(getattr(model, method.name, None)):
                setattr(model, method.name, method(model, self))
        self.listeners = (listener,)

    def leave(self, model: Any) -> None:
        self.listeners = ()
        for handle in self._handles:
            handle.remove()
        for method in _METHODS:
            if isinstance(found := vars(model).get(method.name), method):
                found.leave(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracker:
        return Tracker()  # a copy of the model is of the plain one: nobody listens there

    def __reduce__(self) -> Any:
        return Tracker, ()

    def replying(self, given: int, batch: int, mask: Tensor | None) -> Any:
        """A context: passes inside begin with `given` tokens of prompt, in each of `batch` rows."""
        return self.during(Generation(given, batch, mask, counted=True))

    @contextmanager
    def during(self, generation: Generation) -> Iterator[None]:
        """Passes inside are of that generation."""
        before = self.local.generation
        if before is not None and before.drafts:  # a model that drafts for itself is given the reply so far
            generation.given = min(generation.given, before.given)
            generation.counted = True
        self.local.generation = generation
        try:
            yield
        finally:
            self.local.generation = before

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {**dict(zip(self._order, args)), **kwargs}
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            return  # the model says what it misses
        rows = self._rows(tokens, kwargs)
        for listener in self.listeners:
            listener.begin(rows)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for listener in self.listeners:
            listener.end(output)

    def _rows(self, tokens: Tensor, kwargs: dict[str, Any]) -> Rows:
        batch, count = tokens.shape[:2]
        ends, mask = kwargs.get("cu_seq_lens_q"), kwargs.get("attention_mask")
        if ends is not None:
            return packed(count, ends)
        if is_compiling():
            return traced(batch, count, mask)
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeNotSupported(
                "a CUDA graph of an attached model would go on with what is set now: turn CUDA graphs off "
                "(ContinuousBatchingConfig(use_cuda_graph=False)), or detach"
            )
        cache, generation = cache_in(kwargs), self.local.generation
        if generation is not None and generation.owns(cache):
            return generation.rows(batch, count, cache, mask)
        return self._replies.rows(batch, count, cache, mask)


def tracker_of(owner: nn.Module) -> Tracker:
    """The tracker of the module that runs the decoder layers: that of the attachment, if there is one."""
    for hook in owner._forward_pre_hooks.values():
        found = getattr(hook, "__self__", None)
        if isinstance(found, Tracker) and found.listeners:
            return found
    return Tracker()
