"""llama.cpp through llama-cpp-python: attaching to a `llama_cpp.Llama`, or to its `LlamaContext`.

llama.cpp takes its evaluation callback only when a context is made, so attaching makes a new one in
the place of the old, with the same parameters, state, LoRA and threads. The Llama and LlamaContext
objects stay the same ones; while attached their classes are subclasses that keep the KV cache honest
(`_SteeredLlama`, `_SteeredContext`), and detaching takes all of it back.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as api
from llama_cpp.llama_cache import BaseLlamaCache

from .. import engine
from ..errors import RuntimeNotSupported, SteeringNotApplied
from ..program import NOTHING, Key, Program
from ..vector import Floats
from .llama_context import (
    ContextRuntime,
    Setting,
    fingerprint_of,
    new_hook,
    require_no_callback,
    set_batching,
    with_callback,
)
from .llama_sites import address_of, locate_sites
from .llama_state import take_over

# What each position of the KV cache was computed under; None where that is not known.
Tags: TypeAlias = "list[Key | None]"

# As where a reply begins: nothing that is evaluated is a reply.
_GIVEN = (1 << 31) - 1


def probe_path() -> tuple[str, str]:
    """(path, why) that an attachment would get from the installed llama.cpp; loads no model."""
    hook = engine.Hook([address_of(name) for name in engine.symbols()], n_layer=2, n_embd=64)
    return hook.path, hook.reason


def runtime_of(model: Any) -> WrapperRuntime | None:
    """What is attached to a Llama, or to its LlamaContext."""
    found: WrapperRuntime | None = getattr(model, "_mien", None)
    found = found or getattr(getattr(model, "_ctx", None), "_mien", None)
    return found if found is not None and found.context is not None else None


class WrapperRuntime(ContextRuntime):
    """Of a `LlamaContext`, whose llama_context is replaced by one with the hook."""

    def __init__(self, wrapper: Any, *, path: str = "auto", lora: tuple[Any, float] | None = None) -> None:
        if wrapper.ctx is None:
            raise RuntimeNotSupported("this model is closed; load it again")
        if isinstance(wrapper, _SteeredContext):
            raise RuntimeNotSupported("its LlamaContext is attached by itself: mien.detach(llm._ctx) first")
        require_no_callback(wrapper.params)
        fingerprint = fingerprint_of(wrapper.model.model)
        hook = new_hook(fingerprint, path)
        self._wrapper, self._lora, self._plain = wrapper, lora, wrapper.params
        parameters = with_callback(wrapper.params, hook)
        new = _new_context(wrapper, parameters)
        try:
            n_sequences = set_batching(hook, new, parameters)
            sites = locate_sites(hook, new, fingerprint.n_layer)
            hook.scout()  # so that nothing of what is compared is noted
            take_over(wrapper.ctx, new, lora)
            hook.nodes()
        except BaseException:
            api.llama_free(new)
            raise
        _put_in(wrapper, new, parameters)
        super().__init__(fingerprint, hook, sites, n_sequences)
        wrapper._mien = self  # the model keeps the runtime alive, and with it the hook that its context calls
        vars(wrapper).pop("_mien_hook", None)  # of a context that `release` kept, and that is freed now
        wrapper.__class__ = _subclass(_SteeredContext, type(wrapper))

    @property
    def context(self) -> Any:
        return self._wrapper.ctx

    def release(self) -> None:
        wrapper = self._wrapper
        if wrapper.ctx is not None:
            self.swap(NOTHING)
            self._put_plain_in()
        wrapper.__class__ = wrapper.__class__.__bases__[1]
        del wrapper._mien

    def _put_plain_in(self) -> None:
        """A context without a hook in the place of this one.

        If llama.cpp was told things since that can't be asked for, such as LoRA adapters, or has no memory
        for another context, this one stays: its hook does nothing any more.
        """
        wrapper = self._wrapper
        try:
            new = _new_context(wrapper, self._plain)
        except RuntimeNotSupported:
            self._stay()
            return
        try:
            take_over(wrapper.ctx, new, self._lora)
        except RuntimeNotSupported:
            api.llama_free(new)
            self._stay()
        except BaseException:
            api.llama_free(new)
            raise
        else:
            _put_in(wrapper, new, self._plain)

    def _stay(self) -> None:
        """The context is kept, and with it its hook."""
        self._wrapper._mien_hook, self._wrapper.params = self.hook, self._plain

    def forget(self, position: int = 0) -> None:
        """What the context's cache holds from `position` on is not what it was."""


class LlamaRuntime(WrapperRuntime):
    """Delivers the activations of one `llama_cpp.Llama` to programs.

    tags: what each position of the KV cache was computed under. outside: positions before this one hold what
    was not evaluated through the Llama, such as a picture, and that it can't evaluate again.
    """

    def __init__(self, llm: Any, *, path: str = "auto", mix_cache: bool = False) -> None:
        if getattr(llm, "_ctx", None) is None:
            raise RuntimeNotSupported("this model is closed; load it again")
        self.mix_cache = mix_cache
        self.tags: Tags = [()] * llm.n_tokens
        self.shifted = 0  # by how many positions its tokens have been moved, in all
        self.outside = 0
        self._prompt_end: int | None = None
        self._llm = llm
        wrapper, parameters = llm._ctx, llm.context_params
        wrapper.params = parameters
        lora = None if llm._lora_adapter is None else (llm._lora_adapter, llm.lora_scale)
        llm._requires_eval = bool(llm.n_tokens)  # neither context holds its logits from here on
        super().__init__(wrapper, path=path, lora=lora)
        llm._mien = self
        llm.__class__ = _subclass(_SteeredLlama, type(llm))

    @property
    def program(self) -> Program:
        """What is set for sequence 0, the only one that a Llama uses."""
        return self.programs[0]

    @property
    def prompt_end(self) -> int | None:
        """While something is evaluated whose prompt is known: where what the model was given ends."""
        return self._prompt_end

    @prompt_end.setter
    def prompt_end(self, position: int | None) -> None:
        self._prompt_end = position
        self.tell_reply(position, 0)

    def begin(self, raw: Any) -> None:
        self.note_strays()
        del self.tags[max(self._first(raw), 0) :]  # not known until it has succeeded
        super().begin(raw)

    def note(self, raw: Any) -> None:
        first, count = self._first(raw), raw.n_tokens
        if first >= 0:
            self._tag(first, count, min(max(self.hook.reply(0) - first, 0), count), self.acted)

    def _tag(self, first: int, count: int, given: int, setting: Setting | None) -> None:
        """Tokens from position `first` on were computed under that, `given` of them as a prompt's."""
        tags = self.tags
        del tags[first:]
        tags += [None] * (first - len(tags))
        if setting is None:
            tags += [None] * count
        else:
            program = setting.programs[0]
            tags += [program.prompt.key] * given + [program.response.key] * (count - given)

    def note_strays(self) -> None:
        """Take down what llama.cpp evaluated without the Llama: a picture, or somebody's own llama_decode."""
        strays = self.hook.strays()
        if strays is None:
            self.outside = max(self.outside, self._llm.n_tokens)
        for position, rows, given, setting in strays or ():
            first = position if position >= 0 else len(self.tags)
            self._tag(first, rows, given, setting)  # type: ignore[arg-type]
            self.outside = max(self.outside, first + rows)

    def shift(self, by: int, sequence: int) -> None:
        super().shift(by, sequence)
        self.shifted += by
        if self.prompt_end is not None:
            self.prompt_end += by

    @staticmethod
    def _first(raw: Any) -> int:
        """The batch's first position, -1 where its positions are not in order."""
        count: int = raw.n_tokens
        first: int = raw.pos[0]
        return -1 if count > 1 and raw.pos[count - 1] - first != count - 1 else first

    def forget(self, position: int = 0) -> None:
        self.note_strays()
        del self.tags[position:]
        self.outside = min(self.outside, position)

    def loaded(self, tags: Tags, reply: int, outside: int, silent: bool) -> None:
        """Another state is in the context: its tags, where its reply began, and whether its last token asked
        for no logits. Gates begin anew."""
        self.hook.strays()
        self.tags[:], self.outside = tags, outside
        self.hook.place(0, reply, len(tags), silent)
        self.hook.begin_anew(0)

    def drop_other_recipes(self, prompt: Sequence[int] | None = None) -> None:
        """Shorten what the Llama believes to be cached to what this recipe computes of a prompt.

        prompt: the one that comes next; of what is cached it uses what it begins with, by default all. Raises
        SteeringNotApplied if that would cut what was not evaluated through the Llama.
        """
        self.note_strays()
        if self.mix_cache:
            return
        llm, valid = self._llm, self._valid(self.program.prompt.key)
        if valid < min(self.outside, llm.n_tokens) and self._shared(prompt) > valid:
            raise SteeringNotApplied(
                f"positions {valid} to {self.outside - 1} were computed under another recipe and not by "
                "this Llama (a picture?), which can't evaluate them again: call llm.reset() and evaluate the "
                "whole prompt under this recipe, or attach with mix_cache=True to use them as they are"
            )
        self._cut(valid)

    def _shared(self, prompt: Sequence[int] | None) -> int:
        """How many tokens `prompt` and what is cached begin with alike."""
        cached = self._llm.input_ids[: self._llm.n_tokens].tolist()
        prompt = cached if prompt is None else prompt
        pairs = enumerate(zip(cached, prompt))
        return next((i for i, (a, b) in pairs if a != b), min(len(cached), len(prompt)))

    def _valid(self, key: Key) -> int:
        """How many of the first positions were computed under it."""
        valid, end = 0, min(self._llm.n_tokens, len(self.tags))
        while valid < end and self.tags[valid] == key:
            valid += 1
        return valid

    def untouched(self) -> int:
        """How many of the first positions a model without mien may use: those that no recipe acted on. A
        recurrent memory holds all of them or none."""
        valid = self._valid(NOTHING.prompt.key)
        model = self._llm._model.model
        whole = api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
        return 0 if whole and valid < self._llm.n_tokens else valid

    def _cut(self, valid: int) -> None:
        if valid < self._llm.n_tokens:
            self._llm.n_tokens = valid
            self._llm._requires_eval = True

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        llm = self._llm
        llm.reset()
        self.prompt_end = len(tokens)
        try:
            return super().capture(tokens, layers, last)
        finally:
            self.prompt_end = None
            self.forget()
            llm.reset()

    def release(self) -> None:
        llm = self._llm
        if llm._ctx.ctx is not None:
            self.note_strays()
        super().release()
        if llm._ctx.ctx is not None:
            # What is cached was computed under recipes that the plain model knows nothing of. It can't be
            # told not to evaluate a picture's positions as text, either.
            valid = self.untouched()
            self._cut(valid if valid >= min(self.outside, llm.n_tokens) else 0)
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
        for sequence in range(self._mien.n_sequences):
            self._mien.hook.rewind(sequence, 0)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        removed: bool = super().kv_cache_seq_rm(seq_id, p0, p1)  # type: ignore[misc]
        if removed:
            self._mien.forget(max(p0, 0))
            for sequence in range(self._mien.n_sequences) if p1 < 0 else ():
                if seq_id in (-1, sequence):
                    self._mien.hook.rewind(sequence, max(p0, 0))
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)  # type: ignore[misc]
        self._mien.forget()
        self._mien.hook.rewind(seq_id_dst, 0)  # what it held before it is not what its next token follows

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
            runtime.drop_other_recipes(arguments["tokens"])
        else:
            kept = self.n_tokens  # type: ignore[attr-defined]
        end = kept + len(arguments["tokens"]) - runtime.shifted
        stream, sent = plain(*args, **kwargs), None
        while True:
            runtime.prompt_end = end + runtime.shifted
            try:
                token = stream.send(sent)
            except StopIteration:
                return
            finally:
                runtime.prompt_end = None  # between its tokens others may evaluate
            held = self.n_tokens  # type: ignore[attr-defined]
            sent = yield token
            if self.n_tokens < held:  # type: ignore[attr-defined]
                # llama-cpp-python would evaluate the last token again and again until it is that far.
                raise SteeringNotApplied(
                    f"this reply can't go on: of the {held} tokens before it only {self.n_tokens} "  # type: ignore[attr-defined]
                    "are left in the context (detach(), capture() or reset() between two of its tokens): "
                    "generate it anew"
                )

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
        runtime = self._mien
        runtime.turn = 1 + sum(message.get("role") == "assistant" for message in messages)
        # A chat handler may evaluate the prompt itself, in pieces; `generate` then says where the prompt
        # ends.
        runtime.prompt_end = _GIVEN
        try:
            return super().create_chat_completion(messages, *args, **kwargs)  # type: ignore[misc]
        finally:
            runtime.prompt_end = None

    def save_state(self) -> Any:
        """Its n_tokens are those that no recipe touched: all that a Llama without mien may use of it."""
        runtime = self._mien
        runtime.note_strays()
        state = super().save_state()  # type: ignore[misc]
        known = runtime.tags[: state.n_tokens]
        state.mien_tags = [*known, *[None] * (state.n_tokens - len(known))]
        state.mien_reply, state.mien_outside = runtime.hook.reply(0), min(runtime.outside, state.n_tokens)
        state.mien_silent = runtime.hook.silent(0) and runtime.hook.next(0) == state.n_tokens
        state.mien_n_tokens, state.mien_scores = state.n_tokens, state.scores
        state.n_tokens = runtime.untouched()
        state.scores = state.scores[: state.n_tokens]
        return state

    def load_state(self, state: Any) -> None:
        # A state without tags comes from a model that was not attached: all of it counts as given.
        whole, n_tokens = copy.copy(state), getattr(state, "mien_n_tokens", state.n_tokens)
        whole.n_tokens, whole.scores = n_tokens, getattr(state, "mien_scores", state.scores)
        super().load_state(whole)  # type: ignore[misc]
        self._mien.loaded(
            getattr(state, "mien_tags", [()] * n_tokens),
            getattr(state, "mien_reply", n_tokens),
            getattr(state, "mien_outside", 0),
            getattr(state, "mien_silent", False),
        )

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
        super().__init__(getattr(inner, "capacity_bytes", 0))
        self.inner = inner
        self._runtime = runtime

    @property
    def cache_size(self) -> int:
        return int(getattr(self.inner, "cache_size", 0))

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


def _put_in(wrapper: Any, new: Any, parameters: Any) -> None:
    old = wrapper.ctx
    wrapper.ctx, wrapper.memory, wrapper.params = new, api.llama_get_memory(new), parameters
    api.llama_free(old)
