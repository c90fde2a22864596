"""llama.cpp through llama-cpp-python: attaching to a `llama_cpp.Llama`, or to its `LlamaContext`.

llama.cpp takes its evaluation callback only when a context is made, so attaching makes a new one in
the place of the old, with the same parameters, state, LoRA and threads. The Llama and LlamaContext
objects stay the same ones; while attached their classes are subclasses that keep the KV cache honest
(`_SteeredLlama`, `_SteeredContext`), and detaching takes all of it back.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as api
from llama_cpp.llama_cache import BaseLlamaCache

from .. import engine
from ..errors import RuntimeNotSupported
from ..program import NOTHING, Key, Program
from ..vector import Floats
from .llama_context import (
    ContextRuntime,
    fingerprint_of,
    new_hook,
    require_no_callback,
    set_batching,
    with_callback,
)
from .llama_sites import address_of, locate_sites

# What each position of the KV cache was computed under; None where that is not known.
Tags: TypeAlias = "list[Key | None]"


def probe_path() -> tuple[str, str]:
    """(path, why) that an attachment would get from the installed llama.cpp; loads no model."""
    hook = engine.Hook([address_of(name) for name in engine.symbols()], n_layer=2, n_embd=64)
    return hook.path, hook.reason


class WrapperRuntime(ContextRuntime):
    """Of a `LlamaContext`, whose llama_context is replaced by one with the hook."""

    def __init__(self, wrapper: Any, *, path: str = "auto", lora: tuple[Any, float] | None = None) -> None:
        if isinstance(wrapper, _SteeredContext):
            raise RuntimeNotSupported(
                "this model is attached already; use that Steering, or detach() it first"
            )
        if wrapper.ctx is None:
            raise RuntimeNotSupported("this model is closed; load it again")
        require_no_callback(wrapper.params)
        fingerprint = fingerprint_of(wrapper.model.model)
        hook = new_hook(fingerprint, path)
        self._wrapper, self._lora, self._plain = wrapper, lora, wrapper.params
        parameters = with_callback(wrapper.params, hook)
        new = _new_context(wrapper, parameters)
        try:
            n_sequences = set_batching(hook, new, parameters)
            sites = locate_sites(hook, new, fingerprint.n_layer)
            _carry_over(wrapper.ctx, new, lora)
        except BaseException:
            api.llama_free(new)
            raise
        _put_in(wrapper, new, parameters)
        super().__init__(fingerprint, hook, sites, n_sequences)
        wrapper._mien = self  # the model keeps the runtime alive, and with it the hook that its context calls
        wrapper.__class__ = _subclass(_SteeredContext, type(wrapper))

    @property
    def context(self) -> Any:
        return self._wrapper.ctx

    def release(self) -> None:
        wrapper = self._wrapper
        if wrapper.ctx is not None:
            new = _new_context(wrapper, self._plain)
            try:
                _carry_over(wrapper.ctx, new, self._lora)
            except BaseException:
                api.llama_free(new)
                raise
            _put_in(wrapper, new, self._plain)
        wrapper.__class__ = wrapper.__class__.__bases__[1]
        del wrapper._mien

    def forget(self, position: int = 0) -> None:
        """The context's cache changed from `position` on."""


class LlamaRuntime(WrapperRuntime):
    """Delivers the activations of one `llama_cpp.Llama` to programs."""

    def __init__(self, llm: Any, *, path: str = "auto", mix_cache: bool = False) -> None:
        if isinstance(llm, _SteeredLlama):
            raise RuntimeNotSupported(
                "this model is attached already; use that Steering, or detach() it first"
            )
        if getattr(llm, "_ctx", None) is None:
            raise RuntimeNotSupported("this model is closed; load it again")
        self.mix_cache = mix_cache
        self.tags: Tags = [()] * llm.n_tokens
        # While `generate`, `eval` or `capture` runs: where what the model was given ends. Positions from
        # there on are its own.
        self.prompt_end: int | None = None
        self._told = False
        self._llm = llm
        wrapper, parameters = llm._ctx, llm.context_params
        wrapper.params = parameters
        lora = None if llm._lora_adapter is None else (llm._lora_adapter, llm.lora_scale)
        super().__init__(wrapper, path=path, lora=lora)
        llm._requires_eval = bool(llm.n_tokens)  # the new context holds no logits
        llm._mien = self
        llm.__class__ = _subclass(_SteeredLlama, type(llm))

    @property
    def program(self) -> Program:
        """What acts on sequence 0, the only one that a Llama uses."""
        return self.programs[0]

    def begin(self, raw: Any) -> None:
        if self.prompt_end is not None or self._told:
            self._told = self.prompt_end is not None
            self.tell_reply(self.prompt_end, 0)
        first = self._first(raw)
        del self.tags[max(first, 0) :]  # not known until it has succeeded
        super().begin(raw)

    def finish(self, raw: Any, done: int) -> None:
        super().finish(raw, done)
        first, count = self._first(raw), raw.n_tokens
        if first >= 0:
            tags, program = self.tags, self.program
            tags += [None] * (first - len(tags))
            given = min(max(self.hook.reply(0) - first, 0), count)
            tags += [program.prompt.key] * given
            tags += [program.response.key] * (count - given)

    def shift(self, by: int, sequence: int) -> None:
        super().shift(by, sequence)
        if self.prompt_end is not None:
            self.prompt_end += by

    @staticmethod
    def _first(raw: Any) -> int:
        """The batch's first position, -1 where its positions are not in order."""
        count: int = raw.n_tokens
        first: int = raw.pos[0]
        return -1 if count > 1 and raw.pos[count - 1] - first != count - 1 else first

    def forget(self, position: int = 0) -> None:
        del self.tags[position:]

    def loaded(self, tags: Tags, reply: int) -> None:
        """Another state is in the context: its tags, and where its reply began. Gates begin anew."""
        self.tags[:] = tags
        self.hook.place(0, reply, len(tags))
        self.hook.begin_anew(0)

    def drop_other_recipes(self) -> None:
        """Shorten what the Llama believes to be cached to what this recipe computes of a prompt."""
        if self.mix_cache:
            return
        llm, key = self._llm, self.program.prompt.key
        valid = 0
        while valid < min(llm.n_tokens, len(self.tags)) and self.tags[valid] == key:
            valid += 1
        if valid < llm.n_tokens:
            llm.n_tokens = valid
            llm._requires_eval = True

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        llm = self._llm
        llm.reset()
        self.prompt_end = len(tokens)
        try:
            return super().capture(tokens, layers, last)
        finally:
            self.prompt_end = None
            self.tags.clear()
            llm.reset()

    def release(self) -> None:
        llm = self._llm
        super().release()
        if llm._ctx.ctx is not None:
            # What is cached was computed under recipes that the plain model knows nothing of.
            self.set, self.programs, self.mix_cache = NOTHING, (NOTHING,), False
            self.drop_other_recipes()
            llm._requires_eval = True
        llm.__class__ = llm.__class__.__bases__[1]
        del llm._mien


class _SteeredContext:
    """Over llama_cpp's LlamaContext: pins what acts for each decode, and says what becomes of the cache."""

    _mien: WrapperRuntime

    def decode(self, batch: Any) -> None:
        if status := self._mien.decode(batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def kv_cache_clear(self) -> None:
        super().kv_cache_clear()  # type: ignore[misc]
        self._mien.forget()

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        removed: bool = super().kv_cache_seq_rm(seq_id, p0, p1)  # type: ignore[misc]
        if removed:
            self._mien.forget(max(p0, 0))
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)  # type: ignore[misc]
        self._mien.forget()

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        super().kv_cache_seq_keep(seq_id)  # type: ignore[misc]
        self._mien.forget()

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        super().kv_cache_seq_shift(seq_id, p0, p1, shift)  # type: ignore[misc]
        self._mien.forget()
        sequence = max(seq_id, 0)
        end = self._mien.hook.next(sequence)
        if p0 < end and (p1 < 0 or end <= p1):  # its last tokens are among those that moved
            self._mien.shift(shift, sequence)


class _SteeredLlama:
    """Over llama_cpp's Llama: a cached prefix counts only where this recipe computed it.

    llama-cpp-python compares tokens, and nothing else, in three places: the context's own prefix in
    `generate`, a saved state, and a RAM or disk cache of states.
    """

    _mien: LlamaRuntime

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[int]:
        plain, runtime = super().generate, self._mien  # type: ignore[misc]
        arguments = inspect.signature(plain).bind(*args, **kwargs).arguments
        kept = 0
        if arguments.get("reset", True):
            runtime.drop_other_recipes()
        else:
            kept = self.n_tokens  # type: ignore[attr-defined]
        end, stream, sent = kept + len(arguments["tokens"]), plain(*args, **kwargs), None
        while True:
            runtime.prompt_end = end
            try:
                token = stream.send(sent)
            except StopIteration:
                return
            finally:
                runtime.prompt_end = None  # between its tokens others may evaluate
            sent = yield token

    def eval(self, tokens: Sequence[int]) -> None:
        plain, runtime = super().eval, self._mien  # type: ignore[misc]
        if runtime.prompt_end is not None or len(tokens) == 1:
            return plain(tokens)  # type: ignore[no-any-return]
        runtime.prompt_end = self.n_tokens + len(tokens)  # type: ignore[attr-defined]
        try:
            plain(tokens)
        finally:
            runtime.prompt_end = None

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        self._mien.turn = 1 + sum(message.get("role") == "assistant" for message in messages)
        return super().create_chat_completion(messages, *args, **kwargs)  # type: ignore[misc]

    def save_state(self) -> Any:
        state = super().save_state()  # type: ignore[misc]
        known = self._mien.tags[: state.n_tokens]
        state.mien_tags = [*known, *[None] * (state.n_tokens - len(known))]
        state.mien_reply = self._mien.hook.reply(0)
        return state

    def load_state(self, state: Any) -> None:
        super().load_state(state)  # type: ignore[misc]
        # A state without them comes from a model that was not attached: all of it counts as given.
        tags = getattr(state, "mien_tags", [()] * state.n_tokens)
        self._mien.loaded(tags, getattr(state, "mien_reply", state.n_tokens))

    @property
    def cache(self) -> Any:
        inner = self.__dict__["cache"]
        return None if inner is None else _CacheOfRecipe(inner, self._mien)

    @cache.setter
    def cache(self, cache: Any) -> None:
        self.__dict__["cache"] = cache.inner if isinstance(cache, _CacheOfRecipe) else cache

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle is of the plain model: attaching is not part of its state.
        return _new, (type(self).__bases__[1],), self.__getstate__()


class _CacheOfRecipe(BaseLlamaCache):
    """A user's cache of states, seen under the recipe that is set.

    Keys of steered states begin with a number that no token has, told by the recipe: neither another
    recipe nor the plain model after detach() can meet them. A state that mixes recipes is not kept.
    """

    def __init__(self, inner: Any, runtime: LlamaRuntime) -> None:
        super().__init__(inner.capacity_bytes)
        self.inner = inner
        self._runtime = runtime

    @property
    def cache_size(self) -> int:
        return int(self.inner.cache_size)

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        key = self._runtime.program.prompt.key
        if not key:
            return tuple(tokens)
        digest = hashlib.sha256(repr(key).encode()).digest()
        return (int.from_bytes(digest[:7], "little") + (1 << 32), *tokens)

    def __getitem__(self, tokens: Sequence[int]) -> Any:
        return self.inner[self._key(tokens)]

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._key(tokens) in self.inner

    def __setitem__(self, tokens: Sequence[int], state: Any) -> None:
        if all(tag == self._runtime.program.prompt.key for tag in state.mien_tags):
            self.inner[self._key(tokens)] = state


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _subclass(mixin: type, base: type) -> type:
    return type(f"Steered{base.__name__}", (mixin, base), {"__module__": mixin.__module__})


def _new_context(wrapper: Any, parameters: Any) -> Any:
    """Raises RuntimeNotSupported where it can't be had."""
    new = api.llama_init_from_model(wrapper.model.model, parameters)
    if not new:
        raise RuntimeNotSupported("llama.cpp could not make a second context (out of memory?)")
    return new


def _carry_over(old: Any, new: Any, lora: tuple[Any, float] | None) -> None:
    """Put `new` into the state of `old`. Raises RuntimeNotSupported."""
    api.llama_set_n_threads(new, api.llama_n_threads(old), api.llama_n_threads_batch(old))
    if lora is not None:
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(lora[0])
        if api.llama_set_adapters_lora(new, adapters, 1, (ctypes.c_float * 1)(lora[1])):
            raise RuntimeNotSupported("llama.cpp could not apply the model's LoRA again")
    memory = api.llama_get_memory(old)
    if memory is None or all(
        api.llama_memory_seq_pos_max(memory, i) < 0 for i in range(api.llama_n_seq_max(old))
    ):
        return
    size = api.llama_state_get_size(old)
    state = (ctypes.c_uint8 * size)()
    written = api.llama_state_get_data(old, state, size)
    if api.llama_state_set_data(new, state, written) != written:
        raise RuntimeNotSupported("llama.cpp could not carry the context's state over")


def _put_in(wrapper: Any, new: Any, parameters: Any) -> None:
    old = wrapper.ctx
    wrapper.ctx, wrapper.memory, wrapper.params = new, api.llama_get_memory(new), parameters
    api.llama_free(old)
