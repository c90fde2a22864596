"""Which token each row of a forward pass is: prompt or response, padding or not, of which sequence.

A tracker sits on the module that runs the decoder layers and on the model's `generate`. Attachments of
one model share it, and are told of each forward pass before its first layer runs.

What it goes by: inside of `generate`, the tokens that were passed in are the prompt and all that follow
are the response. In somebody's own loop, a pass over several tokens or from an empty cache is prompt,
and one more token is response; each prompt begins a new reply of its cache. Padding is what the attention
mask leaves out. The tokens of a reply are counted from 0, alike in all rows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import RuntimeNotSupported


class Rows(NamedTuple):
    """The rows of one forward pass: `batch` sequences of `tokens` each.

    given: how many of the first tokens are prompt; the others are response. real: bool (batch, tokens),
    false for padding, on the mask's device; None where there is none. fold: how many neighbouring
    sequences came from one that the user passed in (beams and samples). reply: the number in the reply
    of the first token that is response; None where it can't be told. kept: what listeners remember of
    this reply, by their own keys; a new dict for each.
    """

    batch: int
    tokens: int
    given: int
    real: Tensor | None = None
    fold: int = 1
    reply: int | None = None
    kept: dict[Any, Any] | None = None

    @property
    def made(self) -> int:
        """How many of the tokens are response."""
        return self.tokens - self.given

    @property
    def replies(self) -> range:
        """The numbers of the response tokens in their reply.

        Raises RuntimeNotSupported where there are some and it is not known which.
        """
        if self.made and self.reply is None:
            raise RuntimeNotSupported(
                "which token of its reply this is can't be told: pass the same transformers cache with "
                "every token, or use generate(); a layer that is called on its own has no reply"
            )
        first = self.reply or 0
        return range(first, first + self.made)

    @property
    def numbered(self) -> list[int]:
        """The number of each token of a sequence in its reply; -1 for the prompt's."""
        return [-1] * self.given + list(self.replies)


class Listener(Protocol):
    """Who is told of each forward pass."""

    def begin(self, rows: Rows) -> None: ...

    def end(self, finished: bool) -> None: ...


@dataclass
class _Generation:
    """One call of `generate`. given, batch: of what was passed in. seen: tokens evaluated so far."""

    given: int
    batch: int
    mask: Tensor | None
    seen: int | None = None
    kept: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _Reply:
    """Of one cache in somebody's own loop. began: the tokens that it held then, None where only a device
    knows; made: tokens of the reply so far."""

    began: int | None
    made: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


class _Generate:
    """Over a model's `generate`: says which tokens were passed in."""

    def __init__(self, original: Callable[..., Any], tracker: Tracker) -> None:
        self.original, self.tracker = original, tracker
        functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.tracker.replying(*_generation(*args, **kwargs)):
            return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # the bound method of the copied model

    def __reduce__(self) -> Any:
        return getattr, (self.original.__self__, "generate")  # type: ignore[attr-defined]  # it is bound


def _generation(*args: Any, **kwargs: Any) -> tuple[int, int, Tensor | None]:
    """(columns, rows, attention mask) that are passed to `generate`."""
    names = ("inputs", "input_ids", "inputs_embeds")
    tensors = [*args[:1], *(kwargs.get(name) for name in names)]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not found:  # `generate` begins with one token of its own
        return 1, 1, None
    return found[-1].shape[1], found[-1].shape[0], kwargs.get("attention_mask")


class _Local(threading.local):
    generation: _Generation | None = None


class Tracker:
    """Tells its listeners what each row of a forward pass is. See `tracker_of`.

    It lives in the hooks of the owner, which is the module that runs the layers, and holds no model.
    """

    def __init__(self) -> None:
        self.local = _Local()
        self.listeners: list[Listener] = []
        self._replies: WeakKeyDictionary[Any, _Reply] = WeakKeyDictionary()
        self._handles: list[Any] = []
        self._order: tuple[str, ...] = ()

    def join(self, listener: Listener, owner: nn.Module, model: Any) -> None:
        if not self.listeners:
            self._order = tuple(inspect.signature(owner.forward).parameters)
            self._handles = [
                owner.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True),
                owner.register_forward_hook(self.after, always_call=True),
            ]
            if callable(getattr(model, "generate", None)):
                model.generate = _Generate(model.generate, self)
        self.listeners = [*self.listeners, listener]

    def leave(self, listener: Listener, owner: nn.Module, model: Any) -> None:
        self.listeners = [other for other in self.listeners if other is not listener]
        if self.listeners:
            return
        for handle in self._handles:
            handle.remove()
        if isinstance(vars(model).get("generate"), _Generate):
            del model.generate

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracker:
        return Tracker()  # a copy of the model is of the plain one: nobody listens there

    def __reduce__(self) -> Any:
        return Tracker, ()

    @contextmanager
    def replying(self, given: int, batch: int, mask: Tensor | None) -> Iterator[None]:
        """Passes inside are of a `generate` that `batch` rows of `given` tokens were passed to."""
        before = self.local.generation
        self.local.generation = _Generation(given, batch, mask)
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
        rows = self._rows(tokens.shape[0], tokens.shape[1], kwargs)
        for listener in self.listeners:
            listener.begin(rows)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for listener in self.listeners:
            listener.end(output is not None)

    def _rows(self, batch: int, tokens: int, kwargs: dict[str, Any]) -> Rows:
        mask = kwargs.get("attention_mask")
        if torch.compiler.is_compiling():  # a count would be a constant of the graph
            flat = tokens > 1 and isinstance(mask, Tensor) and mask.dim() == 2
            return Rows(
                batch, tokens, tokens if tokens > 1 else 0, _real(mask, None, tokens) if flat else None
            )
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        length = _length(cache)
        generation = self.local.generation
        if generation is None:
            rows = self._in_a_loop(batch, tokens, cache, length)
            return rows._replace(real=_real(mask, length, tokens))
        if length is None:  # on a device: count instead of waiting for it
            length = generation.seen if generation.seen is not None else int(cache.get_seq_length())  # type: ignore[union-attr]
        generation.seen = length + tokens
        fold = max(batch // max(generation.batch, 1), 1)
        given = min(max(generation.given - length, 0), tokens)
        number = 0 if given else length - generation.given
        rows = Rows(batch, tokens, given, None, fold, number, generation.kept)
        if not given:  # `generate` pads prompts only
            return rows
        if not (isinstance(mask, Tensor) and mask.dim() == 2) and generation.mask is not None:
            mask = generation.mask.repeat_interleave(fold, 0)
        return rows._replace(real=_real(mask, length, tokens))

    def _in_a_loop(self, batch: int, tokens: int, cache: Any, length: int | None) -> Rows:
        """Outside of `generate`; the cache tells which reply it is."""
        given = tokens if tokens > 1 or length == 0 else 0
        rows = Rows(batch, tokens, given)
        if cache is None or isinstance(cache, (tuple, list)):  # nothing that lasts from token to token
            return rows
        if given or cache not in self._replies:
            self._replies[cache] = _Reply(None if length is None else length + given)
        if given:
            return rows
        reply = self._replies[cache]
        counted = length is None or reply.began is None
        number = reply.made if counted else max(length - reply.began, 0)  # type: ignore[operator]  # as counted
        reply.made = number + tokens
        return rows._replace(reply=number, kept=reply.kept)


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds; None where only a device knows."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):  # before transformers had caches of its own
        return int(cache[0][0].shape[-2]) if cache and cache[0] else 0
    length = cache.get_seq_length()
    return length if isinstance(length, int) else None


def _real(mask: Any, length: int | None, tokens: int) -> Tensor | None:
    """The columns of an attention mask that belong to the tokens of this pass, as booleans."""
    if isinstance(mask, dict):  # one a kind of layer; a window would hide tokens that are no padding
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    first = mask.shape[-1] - tokens if length is None or mask.shape[-1] < length + tokens else length
    if mask.dim() == 2:
        return mask[:, first : first + tokens] != 0
    if mask.dim() == 4:  # a token that is no padding attends to itself
        own = mask[:, 0, :, first : first + tokens].diagonal(dim1=1, dim2=2)
        return own if own.dtype == torch.bool else own == 0
    return None


def tracker_of(owner: nn.Module) -> Tracker:
    """The tracker of the module that runs the decoder layers: one for all attachments."""
    for hook in owner._forward_pre_hooks.values():
        found = getattr(hook, "__self__", None)
        if isinstance(found, Tracker) and found.listeners:
            return found
    return Tracker()
