"""Which token each row of a forward pass is: prompt or response, padding or not, of which sequence.

What it goes by: inside of `generate`, the tokens that were passed in are the prompt and all that follow
are the response. In somebody's own loop, a pass over several tokens or from an empty cache is prompt,
and one more token is response; each prompt begins a new reply of its cache. Padding is what the attention
mask leaves out. The tokens of a reply are counted from 0, alike in all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import RuntimeNotSupported
from .hf_caches import held, is_empty, lasts


class Rows(NamedTuple):
    """The rows of one forward pass: `batch` sequences of `tokens` each.

    given: how many of the first tokens are prompt; the others are response. real: bool (batch, tokens),
    false for padding, on the mask's device; None if there is none. fold: how many neighbouring
    sequences came from one that the user passed in (beams and samples). reply: the number in the reply
    of the first token that is response; None if it can't be told. kept: what listeners remember of
    this reply, by their own keys; a new dict for each. untold: why it can't be told which tokens are
    prompt; empty if it can. resumed: whether several tokens are taken for a prompt although a reply of
    the same cache had begun.
    """

    batch: int
    tokens: int
    given: int
    real: Tensor | None = None
    fold: int = 1
    reply: int | None = None
    kept: dict[Any, Any] | None = None
    untold: str = ""
    resumed: bool = False

    @property
    def made(self) -> int:
        """How many of the tokens are response."""
        return self.tokens - self.given

    @property
    def replies(self) -> range:
        """The numbers of the response tokens in their reply.

        Raises RuntimeNotSupported if there are some and it is not known which.
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


PACKED = "several sequences are packed into one row of tokens (as in continuous batching)"


def packed(tokens: int, ends: Tensor) -> Rows:
    """One row in which several sequences follow one another. ends: where each does, (sequences + 1,)."""
    real = torch.arange(tokens, device=ends.device) < ends[-1]  # a graph of fixed size is filled up
    return Rows(1, tokens, tokens, real[None], untold=PACKED)


def traced(batch: int, tokens: int, mask: Any) -> Rows:
    """While a graph is compiled, of which a count would be a constant."""
    flat = tokens > 1 and isinstance(mask, Tensor) and mask.dim() == 2
    return Rows(batch, tokens, tokens if tokens > 1 else 0, real_of(mask, None, tokens) if flat else None)


@dataclass
class Generation:
    """One call of `generate`, or the like, whose passes are counted from when it begins.

    given, batch, mask: columns, rows and attention mask that were passed in. counted: `given` is the
    number of prompt tokens, which may come in several passes; else all of the first pass is prompt,
    which may have fewer tokens than were passed in (in a cache already) or more (pictures, virtual
    tokens). drafts: passes may hold tokens that are taken back later, so that only the cache knows where
    a pass begins.
    """

    given: int
    batch: int
    mask: Tensor | None
    counted: bool = False
    drafts: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)
    _prompt: int | None = None  # tokens of it that are evaluated here; None before the first pass
    _seen: int = 0  # tokens evaluated so far
    _cache: Any = None

    def owns(self, cache: Any) -> bool:
        """Whether a pass with this cache is one of its own; guidance runs the model beside it."""
        cache = getattr(cache, "self_attention_cache", cache)
        if self._cache is None and lasts(cache):
            self._cache = cache
        return self._cache is None or self._cache is cache

    def rows(self, batch: int, tokens: int, cache: Any, mask: Any) -> Rows:
        """The rows of the pass that comes next."""
        given, reply, untold = self._place(tokens, cache, mask)
        fold = max(batch // max(self.batch, 1), 1)
        rows = Rows(batch, tokens, given, None, fold, reply, self.kept, untold)
        if not given:  # `generate` pads prompts only
            return rows
        if not (isinstance(mask, Tensor) and mask.dim() == 2) and self.mask is not None:
            mask = self.mask.repeat_interleave(fold, 0)
        return rows._replace(real=real_of(mask, held(cache), tokens))

    def _place(self, tokens: int, cache: Any, mask: Any) -> tuple[int, int, str]:
        """(how many tokens are prompt, the number in the reply of the first that is not, why unknown)."""
        if self.drafts:
            return self._among_drafts(tokens, cache, mask)
        if self._prompt is None:
            before = 0 if not self.counted or is_empty(cache) else held(cache)
            if before is None:
                return tokens, 0, f"how many tokens of the prompt a {type(cache).__name__} holds is unknown"
            self._prompt = self.given - before if self.counted else tokens
        if 1 < tokens == self._seen + 1 and not self._prompt > self._seen:  # without a cache: all once more
            self._seen = 0
        first, self._seen = self._seen, self._seen + tokens
        given = min(max(self._prompt - first, 0), tokens)
        if tokens > 1 and not given and not self.counted:
            return given, 0, f"generate() evaluated {tokens} tokens at once in the middle of the reply"
        return given, max(first - self._prompt, 0), ""

    def _among_drafts(self, tokens: int, cache: Any, mask: Any) -> tuple[int, int, str]:
        first = held(cache)
        if first is None and isinstance(mask, Tensor) and mask.dim() == 2:
            first = mask.shape[1] - tokens
        if first is None:
            return tokens, 0, f"which tokens a {type(cache).__name__} holds beside drafts is unknown"
        passed = max(self.given, self.mask.shape[1] if self.mask is not None else 0)
        return min(max(passed - first, 0), tokens), max(first - passed, 0), ""


@dataclass
class _Reply:
    """Of one cache in somebody's own loop. began: the tokens that it held then, None if unknown; made:
    tokens of the reply so far."""

    began: int | None
    made: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


class Replies:
    """The replies in somebody's own loop: the cache tells which one a pass goes on with."""

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[Any, _Reply] = WeakKeyDictionary()

    def rows(self, batch: int, tokens: int, cache: Any, mask: Any) -> Rows:
        """The rows of the pass that comes next."""
        length = held(cache)
        begun = self._by_cache.get(cache) if lasts(cache) else None
        empty = length == 0 if length is not None or begun is not None else is_empty(cache)
        rows = Rows(batch, tokens, tokens if tokens > 1 or empty else 0, real_of(mask, length, tokens))
        if not lasts(cache):
            return rows
        if empty is None and not rows.given:
            untold = f"whether a {type(cache).__name__} that mien has not seen before is empty is unknown"
            return rows._replace(untold=untold)
        if begun is None or rows.given:
            self._by_cache[cache] = _Reply(None if length is None else length + rows.given)
        if rows.given:
            return rows._replace(resumed=begun is not None and begun.made > 0 and not empty)
        reply = self._by_cache[cache]
        counted = length is None or reply.began is None
        number = reply.made if counted else max(length - reply.began, 0)  # type: ignore[operator]  # as counted
        reply.made = number + tokens
        return rows._replace(reply=number, kept=reply.kept)


def real_of(mask: Any, length: int | None, tokens: int) -> Tensor | None:
    """The columns of an attention mask that belong to the tokens of this pass, as booleans."""
    if isinstance(mask, dict):  # one a kind of layer; a window would hide tokens that are no padding
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.shape[-1] < tokens:
        return None
    first = mask.shape[-1] - tokens if length is None or mask.shape[-1] < length + tokens else length
    if mask.dim() == 2:
        return mask[:, first : first + tokens] != 0
    if mask.dim() == 4:  # a token that is no padding attends to itself
        own = mask[:, 0, :, first : first + tokens].diagonal(dim1=1, dim2=2)
        return own if own.dtype == torch.bool else own == 0
    return None
