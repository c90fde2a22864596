"""llama.cpp through llama-cpp-python: attaching to a `llama_cpp.Llama`.

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

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np
from llama_cpp.llama_cache import BaseLlamaCache

from .. import engine
from ..errors import RuntimeNotSupported, SteeringNotApplied
from ..fingerprint import Fingerprint, vocabulary_digest
from ..program import NOTHING, Key, Part, Program
from ..steering import Applied, LayerApplied, Programs
from ..vector import Floats

# What each position of the KV cache was computed under; None where that is not known.
Tags: TypeAlias = "list[Key | None]"


def probe_path() -> tuple[str, str]:
    """(path, why) that an attachment would get from the installed llama.cpp; loads no model."""
    hook = engine.Hook([_address(name) for name in engine.symbols()], n_layer=2, n_embd=64)
    return hook.path, hook.reason


class LlamaRuntime:
    """Delivers the activations of one `llama_cpp.Llama` to programs."""

    takes_rows = False

    def __init__(self, llm: Any, *, path: str = "auto", mix_cache: bool = False) -> None:
        _require_attachable(llm)
        self.fingerprint = fingerprint_of(llm)
        self.mix_cache = mix_cache
        self.program = NOTHING
        self.tags: Tags = [()] * llm.n_tokens
        # While `generate`, `eval` or `capture` runs: where what the model was given ends. Positions from
        # there on are its own.
        self.prompt_end: int | None = None
        self._llm = llm
        self._last = NOTHING, NOTHING.prompt
        addresses = [_address(name) for name in engine.symbols()]
        self.hook = engine.Hook(addresses, self.fingerprint.n_layer, self.fingerprint.n_embd, path)

        parameters = _copy(llm.context_params)
        parameters.cb_eval = ctypes.cast(self.hook.callback, type(parameters.cb_eval))
        parameters.cb_eval_user_data = self.hook.user_data
        _replace_context(llm, parameters)
        # The model keeps the runtime alive, and with it the hook that its context calls.
        llm._ctx._mien = llm._mien = self
        llm._ctx.__class__ = _subclass(_SteeredContext, type(llm._ctx))
        llm.__class__ = _subclass(_SteeredLlama, type(llm))

    def swap(self, program: Programs) -> None:
        assert isinstance(program, Program)
        if self._llm._ctx.ctx is None:
            raise RuntimeNotSupported("this model is closed")
        self.hook.swap(program.response.compiled)
        self.program = program

    def begin(self, batch: Any) -> tuple[Program, Part, int]:
        """Before a llama_decode of the raw `batch`: pin the part of this moment's program that acts on it.

        Returns both, and the batch's first position, -1 where its positions are not in order. Runs once
        a token, when everything has left the caches: short on purpose, as is `finish`.
        """
        program, positions, count = self.program, batch.pos, batch.n_tokens
        first: int = positions[0]
        if self.prompt_end is not None:
            part = program.prompt if first < self.prompt_end else program.response
        else:  # somebody's own loop: many tokens, or the first, are given; one more is the model's own
            part = program.prompt if count > 1 or first == 0 else program.response
        if count > 1 and positions[count - 1] - first != count - 1:
            first = -1
        del self.tags[max(first, 0) :]  # not known until it has succeeded
        self.hook.begin(part.compiled)
        return program, part, first

    def finish(self, program: Program, part: Part, first: int, count: int, status: int) -> None:
        """After it has succeeded: tag the KV cache. Raises SteeringNotApplied."""
        self._last = program, part
        if status:
            self._raise(part, status)
        if first == len(self.tags):
            self.tags.extend([part.key] * count)
        elif first >= 0:
            self.tags += [None] * (first - len(self.tags)) + [part.key] * count

    def _raise(self, part: Part, status: int) -> None:
        try:
            engine.check(status)
        except SteeringNotApplied as error:
            missing = [layer for layer in part.layers if not self.hook.applied(layer)[3]]
            raise SteeringNotApplied(
                f"{error}: {missing or list(part.layers)}. This build of llama.cpp does not name the "
                f"block outputs of {self.fingerprint.architecture} models as expected (l_out-N)",
                missing,
            ) from None

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

    def applied(self) -> Applied:
        layers = {}
        program, part = self._last
        for layer in part.layers:
            rows, moved, path, _ = self.hook.applied(layer)
            layers[layer] = LayerApplied(rows, float(np.sqrt(moved / rows)) if rows else 0.0, path)
        return Applied(program.recipe, layers)

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        llm, tokens = self._llm, list(tokens)
        if len(tokens) > llm.n_ctx():
            raise ValueError(f"expected at most {llm.n_ctx()} tokens, got {len(tokens)}")
        result = np.empty((len(layers), last, self.fingerprint.n_embd), dtype=np.float32)
        start = len(tokens) - last
        llm.reset()
        llm._ctx.kv_cache_clear()
        self.prompt_end = len(tokens)
        try:
            for offset in range(0, len(tokens), llm.n_batch):
                chunk = tokens[offset : offset + llm.n_batch]
                llm._batch.set_batch(batch=chunk, n_past=offset, logits_all=last > 1)
                wanted = max(start - offset, 0)
                if wanted < len(chunk):
                    flags = ctypes.addressof(llm._batch.batch.logits.contents)
                    rows = self.hook.capture(layers, wanted, len(chunk) - wanted, flags)
                llm._ctx.decode(llm._batch)
                self.hook.stop_capture()
                if wanted < len(chunk):
                    to = offset + wanted - start
                    result[:, to : to + rows.shape[1]] = rows
        finally:
            self.prompt_end = None
            self.hook.stop_capture()
            llm.reset()
        return result

    def describe(self) -> dict[str, str]:
        return {
            "runtime": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "path": self.hook.path,
            "why": self.hook.reason,
        }

    def release(self) -> None:
        llm = self._llm
        if llm._ctx.ctx is not None:
            _replace_context(llm, llm.context_params)
            # What is cached was computed under recipes that the plain model knows nothing of.
            self.program = NOTHING
            self.mix_cache = False
            self.drop_other_recipes()
        llm.__class__ = llm.__class__.__bases__[1]
        llm._ctx.__class__ = llm._ctx.__class__.__bases__[1]
        del llm._mien, llm._ctx._mien


class _SteeredContext:
    """Over llama_cpp's LlamaContext: pins a program for each decode and keeps the tags in step."""

    _mien: LlamaRuntime

    def decode(self, batch: Any) -> None:
        runtime, raw = self._mien, batch.batch
        program, part, first = runtime.begin(raw)
        try:
            super().decode(batch)  # type: ignore[misc]  # of LlamaContext, the other base
        finally:
            status = runtime.hook.end()
        runtime.finish(program, part, first, raw.n_tokens, status)

    def kv_cache_clear(self) -> None:
        super().kv_cache_clear()  # type: ignore[misc]
        self._mien.tags.clear()

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        removed: bool = super().kv_cache_seq_rm(seq_id, p0, p1)  # type: ignore[misc]
        if removed:
            del self._mien.tags[max(p0, 0) :]
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)  # type: ignore[misc]
        self._mien.tags.clear()

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        super().kv_cache_seq_keep(seq_id)  # type: ignore[misc]
        self._mien.tags.clear()

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        super().kv_cache_seq_shift(seq_id, p0, p1, shift)  # type: ignore[misc]
        self._mien.tags.clear()


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

    def save_state(self) -> Any:
        state = super().save_state()  # type: ignore[misc]
        known = self._mien.tags[: state.n_tokens]
        state.mien_tags = [*known, *[None] * (state.n_tokens - len(known))]
        return state

    def load_state(self, state: Any) -> None:
        super().load_state(state)  # type: ignore[misc]
        # A state without tags comes from a model that was not attached.
        self._mien.tags[:] = getattr(state, "mien_tags", [()] * state.n_tokens)

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


def _require_attachable(llm: Any) -> None:
    if isinstance(llm, _SteeredLlama):
        raise RuntimeNotSupported("this model is attached already; use that Steering, or detach() it first")
    if getattr(llm, "_ctx", None) is None or llm._ctx.ctx is None:
        raise RuntimeNotSupported("this model is closed; load it again")
    if ctypes.cast(llm.context_params.cb_eval, ctypes.c_void_p).value:
        raise RuntimeNotSupported(
            "this model's context has an evaluation callback (cb_eval) of somebody else's, and llama.cpp "
            "takes only one"
        )


def fingerprint_of(llm: Any) -> Fingerprint:
    """What of a loaded `Llama` must agree with a vector."""
    model, metadata = llm._model.model, llm.metadata
    vocabulary = api.llama_model_get_vocab(model)
    texts = (api.llama_vocab_get_text(vocabulary, i) for i in range(api.llama_vocab_n_tokens(vocabulary)))
    return Fingerprint(
        architecture=metadata.get("general.architecture", "unknown"),
        n_layer=api.llama_model_n_layer(model),
        n_embd=api.llama_model_n_embd(model),
        vocabulary=vocabulary_digest(texts),
        name=metadata.get("general.basename") or metadata.get("general.name", ""),
    )


def _address(name: str) -> int:
    """Of a function in the library that llama_cpp has loaded, 0 where it has none of that name."""
    try:
        return ctypes.cast(getattr(api._lib, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _subclass(mixin: type, base: type) -> type:
    return type(f"Steered{base.__name__}", (mixin, base), {"__module__": mixin.__module__})


def _copy(parameters: Any) -> Any:
    return type(parameters).from_buffer_copy(parameters)


def _replace_context(llm: Any, parameters: Any) -> None:
    """Give `llm` a context made with `parameters`, in the state of the one that it has.

    Raises RuntimeNotSupported where it can't be had; the old context is then still in place.
    """
    wrapper, model = llm._ctx, llm._model.model
    old = wrapper.ctx
    new = api.llama_init_from_model(model, parameters)
    if not new:
        raise RuntimeNotSupported("llama.cpp could not make a second context (out of memory?)")
    try:
        api.llama_set_n_threads(new, api.llama_n_threads(old), api.llama_n_threads_batch(old))
        if llm._lora_adapter is not None:
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
            if api.llama_set_adapters_lora(new, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale)):
                raise RuntimeNotSupported("llama.cpp could not apply the model's LoRA again")
        if llm.n_tokens:
            size = api.llama_state_get_size(old)
            state = (ctypes.c_uint8 * size)()
            written = api.llama_state_get_data(old, state, size)
            if api.llama_state_set_data(new, state, written) != written:
                raise RuntimeNotSupported("llama.cpp could not carry the context's state over")
    except BaseException:
        api.llama_free(new)
        raise
    wrapper.ctx, wrapper.memory, wrapper.params = new, api.llama_get_memory(new), parameters
    api.llama_free(old)
    llm._requires_eval = True  # the new context holds no logits
