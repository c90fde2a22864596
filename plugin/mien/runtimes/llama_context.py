"""llama.cpp's own contexts: what all attachments to llama.cpp share, and attaching to a low-level context.

llama.cpp takes its evaluation callback only when a context is made. A `LlamaContext` of llama-cpp-python's
is given a new one in the place of the old, in the same state; a bare pointer can't be, so it has to be made
by `init_from_model`. `decode` is llama_decode with what acts pinned: which sequence each token belongs to is
in the batch, and each sequence can have a program of its own.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from .. import engine
from ..errors import (
    RecipeError,
    ReplyWarning,
    RuntimeNotSupported,
    SiteNotFound,
    SteeringNotApplied,
    warn,
)
from ..fingerprint import Fingerprint, vocabulary_digest
from ..program import NOTHING, Key, Program
from ..steering import Applied, LayerApplied, Programs, Steering
from ..vector import SITES, Floats
from ..watch import Watch
from .llama_sites import Located, address_of, locate_sites

_FIELDS = {
    name: getattr(api.llama_batch, name).offset
    for name in ("n_tokens", "token", "pos", "n_seq_id", "seq_id", "logits")
}


def new_hook(fingerprint: Fingerprint, path: str) -> engine.Hook:
    addresses = [address_of(name) for name in engine.symbols()]
    return engine.Hook(addresses, fingerprint.n_layer, fingerprint.n_embd, path)


def with_callback(parameters: Any, hook: engine.Hook) -> Any:
    """A copy of context parameters that has `hook` called."""
    parameters = type(parameters).from_buffer_copy(parameters)
    parameters.cb_eval = ctypes.cast(hook.callback, type(parameters.cb_eval))
    parameters.cb_eval_user_data = hook.user_data
    return parameters


@dataclass
class _Made:
    """A context that `init_from_model` has made."""

    hook: engine.Hook
    sites: Located
    runtime: PointerRuntime | None = None  # attached to it


# By pointer. A hook must outlive its context, whose end is not seen from here: an entry stays until `free`,
# or until llama.cpp makes another context at the same address.
_made: dict[int, _Made] = {}


def init_from_model(model: Any, parameters: Any, path: str = "auto") -> Any:
    """As llama_cpp.llama_init_from_model, and the context can be attached to. Free it with `free`.

    model, parameters: of llama_cpp's low-level interface. path: as for `attach`. Returns the context's
    pointer, or None if llama.cpp makes none. One token is evaluated, to find the model's sites, and
    forgotten. Raises RuntimeNotSupported if the parameters have an evaluation callback already.
    """
    require_no_callback(parameters)
    fingerprint = fingerprint_of(model)
    hook = new_hook(fingerprint, path)
    parameters = with_callback(parameters, hook)
    context = api.llama_init_from_model(model, parameters)
    if not context:
        return None
    try:
        set_batching(hook, context, parameters)
        sites = locate_sites(hook, context, fingerprint.n_layer)
    except BaseException:
        api.llama_free(context)
        raise
    _made[_pointer(context)] = _Made(hook, sites)
    return context


def free(context: Any) -> None:
    """As llama_cpp.llama_free, of a context that `init_from_model` has made; its hook goes with it.

    An attached Steering is detached. llama_free alone is safe, too, but leaves the hook in memory (some ten
    kilobytes a layer).
    """
    made = _made.pop(_pointer(context), None)
    if made is not None and made.runtime is not None:
        made.runtime.close()
    api.llama_free(context)


def runtime_of(context: Any) -> PointerRuntime | None:
    """What is attached to that pointer."""
    made = _made.get(_pointer(context))
    return made.runtime if made else None


def require_no_callback(parameters: Any) -> None:
    if ctypes.cast(parameters.cb_eval, ctypes.c_void_p).value:
        raise RuntimeNotSupported(
            "this model's context has an evaluation callback (cb_eval) of somebody else's, and llama.cpp "
            "takes only one"
        )


def set_batching(hook: engine.Hook, context: Any, parameters: Any) -> int:
    """Tell `hook` how the context cuts batches. Returns for how many sequences it has room."""
    n_sequences, model = api.llama_n_seq_max(context), api.llama_get_model(context)
    unified = bool(parameters.kv_unified) or n_sequences == 1
    if api.llama_get_memory(context) is None:
        orders = ["simple"]  # of encoders: the whole batch at once
    elif api.llama_model_is_recurrent(model):
        orders = ["sequential"]
    elif api.llama_model_is_hybrid(model):
        orders = ["equal" if unified else "sequential"]
    else:
        orders = ["simple", "equal"] if unified else ["sequential"]
    hook.set_batching(_FIELDS, n_sequences, api.llama_n_ubatch(context), orders)
    return int(n_sequences)


@dataclass(frozen=True, eq=False)
class Setting:
    """What is set on a context, and what of it acts in one turn of a chat; immutable.

    given: as it was set, for all turns. programs: in this turn, one for all sequences, or one for each.
    alike: the same with one object for equal programs, since the engine steers sequences alike that have the
    same one. generations: of each, a new number whenever its gates start without a state.
    """

    given: Programs
    turn: int
    programs: tuple[Program, ...]
    alike: tuple[Program, ...]
    generations: tuple[int, ...]

    @cached_property
    def acting(self) -> list[engine.Acting]:
        return [
            (one.prompt.compiled, one.response.compiled, generation)
            for one, generation in zip(self.alike, self.generations)
        ]

    @cached_property
    def stacks(self) -> bool:
        """Whether several operations act one after another at any place."""
        return any(
            part.compiled and part.compiled.stacks for program in self.programs for part in program.parts
        )

    @cached_property
    def counts(self) -> bool:
        """Whether it matters what is given and what is a reply."""
        return any(p.prompt is not p.response or p.response.counts for p in self.programs)


class ContextRuntime:
    """Delivers the activations of one llama_context to programs.

    context: its pointer; a subclass says where it is kept, and what `release` does to it. What is set is kept
    in one place, the hook.
    """

    steering: Steering | None = None

    def __init__(self, fingerprint: Fingerprint, hook: engine.Hook, sites: Located, n_sequences: int) -> None:
        self.fingerprint, self.hook, self.sites = fingerprint, hook, sites
        self.n_sequences = n_sequences
        self.takes_rows = n_sequences > 1
        self._generations = itertools.count(1)
        self._warned = False
        self._unsteered = hook.unsteered
        self._watch: Watch | None = None
        self._reading: Watch | None = None  # of the decode under way, with the floats that C writes
        self._readouts = np.empty((2, 0, 0, 0), dtype=np.float32)
        self._counts: npt.NDArray[np.int64] | None = None
        self._counting: npt.NDArray[np.int64] | None = None  # from the next decode on
        self._counted: npt.NDArray[np.int64] | None = None  # in the decode under way: C writes into it
        first = Setting(NOTHING, 1, (NOTHING,), (NOTHING,), (next(self._generations),))
        hook.swap(first, hook.setting)
        hook.begin_anew(0)  # it is what acts, whatever did before
        self.acted = first

    @property
    def context(self) -> Any:
        """The llama_context's pointer; None where it was freed."""
        raise NotImplementedError

    # ---- what acts ----

    @property
    def _setting(self) -> Setting:
        return cast(Setting, self.hook.setting)

    @property
    def setting(self) -> Programs:
        return self._setting.given

    @property
    def programs(self) -> tuple[Program, ...]:
        """What is set, in this turn: one for all sequences, or one for each."""
        return self._setting.programs

    @property
    def _acting(self) -> tuple[Program, ...]:
        return self._setting.alike

    @property
    def turn(self) -> int:
        """The number of the reply in a chat, from 1, that windows by turn go by."""
        return self._setting.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        while (before := self._setting).turn != turn and not self._put(before, before.given, turn):
            pass

    def swap(self, programs: Programs, expected: Programs | None = None) -> bool:
        if self.context is None:
            raise RuntimeNotSupported("this model is closed")
        count = len(programs) if isinstance(programs, tuple) else 1
        if count > self.n_sequences:
            raise RecipeError(
                f"expected at most {self.n_sequences} recipes, one for each sequence of the context "
                f"(n_seq_max), got {count}"
            )
        while True:
            before = self._setting
            if expected is not None and before.given is not expected:
                return False
            if self._put(before, programs, before.turn):
                return True

    def _put(self, before: Setting, given: Programs, turn: int) -> bool:
        """Have `given` act in place of `before`; False if that is not what is set any more."""
        every = given if isinstance(given, tuple) else (given,)
        programs = tuple(one.at_turn(turn) for one in every)
        if turn != before.turn and all(one is old for one, old in zip(programs, before.programs)):
            new = replace(before, turn=turn)
        elif isinstance(given, tuple):
            new = self._of_sequences(before, given, turn, programs)
        else:
            new = Setting(given, turn, programs, programs, (next(self._generations),))
        return self.hook.swap(new, before)

    def _of_sequences(
        self, before: Setting, given: Programs, turn: int, programs: tuple[Program, ...]
    ) -> Setting:
        """Gates keep their state on sequences whose program stays the same."""
        count = self.n_sequences
        programs += (NOTHING,) * (count - len(programs))
        spread = count if len(before.programs) == 1 else 1
        stays = [new is old for new, old in zip(programs, before.programs * spread)]
        old = list(zip(before.alike * spread, before.generations * spread))
        known = {_keys(one): one for (one, _), stay in zip(old, stays) if stay}
        alike, generations = [], []
        for program, stay, (one, generation) in zip(programs, stays, old):
            alike.append(one if stay else known.setdefault(_keys(program), program))
            generations.append(generation if stay else next(self._generations))
        return Setting(given, turn, programs, tuple(alike), tuple(generations))

    def tell_reply(self, position: int | None, sequence: int) -> None:
        self._require_sequence(sequence)
        if position is not None and position < 0:
            raise ValueError(f"position: expected 0 or more, or None, got {position}")
        self.hook.tell_reply(sequence, -1 if position is None else position)

    def shift(self, by: int, sequence: int) -> None:
        self._require_sequence(sequence)
        self.hook.shift(sequence, by)

    def _require_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.n_sequences:
            raise RuntimeNotSupported(f"sequence: expected 0 to {self.n_sequences - 1}, got {sequence}")

    def width(self, site: str, layer: int) -> int:
        return self.sites.at(site, layer).width

    def _require_residual(self, layers: Iterable[int]) -> None:
        """Raises SiteNotFound if the residual stream can't be read at one of those layers."""
        for layer in layers:
            self.sites.at("residual", layer)
            if self.sites.streams > 1:
                raise SiteNotFound(
                    "residual",
                    layer,
                    f"a token has {self.sites.streams} residual streams in {self.fingerprint.architecture} "
                    "models, which can be steered but not read",
                )

    # ---- decoding ----

    def decode(self, batch: Any) -> int:
        """llama_decode of a llama_batch, or LlamaBatch, steered: its status. Raises SteeringNotApplied."""
        given = getattr(batch, "batch", batch)
        raw, _positions = (given, None) if given.pos else self._with_positions(given)
        status = 1
        try:  # also around begin: an interrupt may come as it returns
            self.begin(raw)
            status = int(api.llama_decode(self.context, given))
        finally:
            done = self.hook.end()
        if status == 0:
            self.finish(raw, done)
        return status

    def _with_positions(self, raw: Any) -> tuple[Any, Any]:
        """A batch without positions with those that llama.cpp will count, which must outlive it."""
        memory, first = api.llama_get_memory(self.context), {}
        positions = (ctypes.c_int32 * raw.n_tokens)()
        for i in range(raw.n_tokens):
            sequence = raw.seq_id[i][0] if raw.seq_id else 0
            if sequence not in first:
                first[sequence] = api.llama_memory_seq_pos_max(memory, sequence) + 1
            positions[i] = first[sequence]
            first[sequence] += 1
        copy = type(raw).from_buffer_copy(raw)
        copy.pos = ctypes.cast(positions, type(copy.pos))
        return copy, positions

    def begin(self, raw: Any) -> None:
        """Before a llama_decode of the raw batch. Runs once a token, when everything has left the caches:
        short on purpose, as is `finish`.

        What acts, what is read and what is counted is pinned here until the next decode: any thread may set
        other things meanwhile.
        """
        if self._watch is not None or self._reading is not None:
            self._pin_watch(self._watch, raw.n_tokens)
        if self._counting is not self._counted:
            self._pin_counts(self._counting)
        if self._setting.stacks:
            self.hook.threads(max(api.llama_n_threads(self.context), api.llama_n_threads_batch(self.context)))
        if status := self.hook.begin(ctypes.addressof(raw)):
            self._refuse(status)
        self.acted = cast(Setting, self.hook.acted)

    def finish(self, raw: Any, done: int) -> None:
        """After it has succeeded. done: what the hook's end said. Raises SteeringNotApplied."""
        if done:
            self._raise(done)
        self.note(raw)
        if raw.n_tokens > 1 and not self._warned and self.acted.counts and self.hook.continued:
            self._warn_of_drafts()
        if self._reading is not None:
            self._take_readouts(raw.n_tokens)

    def note(self, raw: Any) -> None:
        """The batch's tokens are in the KV cache now, computed under `acted`."""

    def _warn_of_drafts(self) -> None:
        self._warned = True
        warn(
            ReplyWarning(
                "a reply continued with several tokens at once: they count as the prompt of a new turn. If "
                "they are of that reply (drafts), say where it begins: steering.reply_from(position)"
            )
        )

    def _refuse(self, status: int) -> None:
        try:
            engine.check(status)
        except SteeringNotApplied:
            raise SteeringNotApplied(
                f"the batch has tokens of a sequence that the context has no room for (0 to "
                f"{self.n_sequences - 1}), or a token shared by sequences that are steered differently"
            ) from None

    def _raise(self, status: int) -> None:
        try:
            engine.check(status)
        except SteeringNotApplied as error:
            acting = self._places
            everywhere = [(site, layer) for site in SITES for layer in range(self.fingerprint.n_layer)]
            if not any(self.hook.applied(*place)[3] for place in everywhere):
                raise SteeringNotApplied(
                    "llama.cpp did not call mien while it computed, though it did when this "
                    f"{self.fingerprint.architecture} model was attached: the context was freed, and another "
                    "was made at its address without mien.init_from_model",
                    sorted({layer for _, layer in acting}),
                ) from None
            if self.sites.streams > 1 and "residual" in {site for site, _ in acting}:
                raise SteeringNotApplied(
                    f"a token has {self.sites.streams} residual streams in {self.fingerprint.architecture} "
                    "models. They are steered only if the same acts on all tokens of a batch: without "
                    "windows and gates, and with one recipe for all sequences of the batch",
                    sorted({layer for site, layer in acting if site == "residual"}),
                ) from None
            missing = [(site, layer) for site, layer in acting if not self.hook.applied(site, layer)[3]]
            places = missing or acting
            layers = sorted({layer for _, layer in places})
            sites = ", ".join(sorted({site for site, _ in places}))
            raise SteeringNotApplied(
                f"{error}: {layers} ({sites}). This build of llama.cpp does not compute them in "
                f"{self.fingerprint.architecture} models as expected",
                [layer for _, layer in missing],
            ) from None

    # ---- what was done, and read ----

    @property
    def _last(self) -> Setting:
        """What the last evaluation went by, also one outside of a decode."""
        return cast(Setting, self.hook.acted) or self.acted

    @property
    def _places(self) -> list[tuple[str, int]]:
        """The (site, layer) where anything acted in the last evaluation, in order."""
        every = [part.places for program in self._last.programs for part in program.parts]
        return sorted({(site, n) for places in every for site, layers in places.items() for n in layers})

    def applied(self) -> Applied:
        unsteered, self._unsteered = self._unsteered, self.hook.unsteered
        if self._unsteered != unsteered:
            raise SteeringNotApplied(
                "llama_decode was called directly and was not steered: which sequence its tokens belong to, "
                "or whether they are a reply's, is not known; call steering.decode(batch) instead"
            )
        recipes = tuple(program.recipe for program in self._last.programs)
        result = Applied(recipes if isinstance(self._last.given, tuple) else recipes[0], {})
        for site, layer in self._places:
            rows, moved, path, _ = self.hook.applied(site, layer)
            if rows:
                result.note(site, layer, LayerApplied(rows, float(np.sqrt(moved / rows)), path))
        return result

    def watch(self, watch: Watch | None) -> None:
        if watch is not None:
            self._require_residual(watch.layers)
        self._watch = watch

    def _pin_watch(self, watch: Watch | None, count: int) -> None:
        """Have the next decode of `count` tokens read for `watch`: (before and after, tokens, n_layer,
        vectors)."""
        if watch is None:
            self.hook.watch(None)
            self._readouts = np.empty((2, 0, 0, 0), dtype=np.float32)
        elif watch is not self._reading or self._readouts.shape[1] != count:
            shape = 2, count, self.fingerprint.n_layer, watch.probe.count
            readouts = np.empty(shape, dtype=np.float32)
            before, after = (part.ctypes.data for part in readouts)
            self.hook.watch(watch.probe, before, after, count)
            self._readouts = readouts  # only now: C knew the others up to here
        self._reading = watch
        self._readouts.fill(np.nan)

    def _take_readouts(self, count: int) -> None:
        watch = self._reading
        if watch is not None and watch is self._watch:  # it was not stopped meanwhile
            sequences, replies = self.hook.tokens(count)
            watch.note(sequences, replies, self._readouts.take(watch.layers, axis=2))

    @property
    def experts_used(self) -> int:
        return _integer(_metadata(api.llama_get_model(self.context)), "expert_used_count")

    def count_experts(self, on: bool) -> None:
        if not on:
            self._counting = None
            return
        if not self.sites.chosen:
            why = self.sites.missing.get("experts", "no node tells which are chosen")
            raise SiteNotFound("experts", None, why)
        n_expert = _integer(_metadata(api.llama_get_model(self.context)), "expert_count")
        self._counts = self._counting = np.zeros((self.fingerprint.n_layer, n_expert), dtype=np.int64)

    def _pin_counts(self, counts: npt.NDArray[np.int64] | None) -> None:
        if counts is None:
            self.hook.count(None)
        else:
            self.hook.count(counts, self.experts_used, self.sites.chosen)
        self._counted = counts

    def expert_counts(self) -> dict[int, npt.NDArray[np.int64]]:
        if self._counts is None:
            return {}
        return {layer: row.copy() for layer, row in enumerate(self._counts) if row.any()}

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        self._require_residual(layers)
        tokens, context = list(tokens), self.context
        if len(tokens) > api.llama_n_ctx(context):
            raise ValueError(f"expected at most {api.llama_n_ctx(context)} tokens, got {len(tokens)}")
        n_batch, start = api.llama_n_batch(context), len(tokens) - last
        result = np.empty((len(layers), last, self.fingerprint.n_embd), dtype=np.float32)
        memory = api.llama_get_memory(context)
        batch = api.llama_batch_init(min(n_batch, len(tokens)), 0, 1)
        api.llama_memory_clear(memory, True)
        self.tell_reply(len(tokens), 0)
        try:
            for offset in range(0, len(tokens), n_batch):
                chunk = tokens[offset : offset + n_batch]
                _fill(batch, chunk, offset, all_logits=last > 1)
                wanted = max(start - offset, 0)
                if wanted < len(chunk):
                    rows = self.hook.capture(layers, wanted, len(chunk) - wanted)
                if status := self.decode(batch):
                    raise RuntimeError(f"llama_decode returned {status}")
                self.hook.stop_capture()
                if wanted < len(chunk):
                    to = offset + wanted - start
                    result[:, to : to + rows.shape[1]] = rows
        finally:
            self.hook.stop_capture()
            self.tell_reply(None, 0)
            api.llama_batch_free(batch)
            api.llama_memory_clear(memory, True)
        return result

    def describe(self) -> dict[str, str]:
        sites = {f"site {site}": f"not found: {why}" for site, why in self.sites.missing.items()}
        return {
            "runtime": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "path": self.hook.path,
            "why": self.hook.reason,
            "sites": ", ".join(self.sites.places),
            **sites,
        }

    def release(self) -> None:
        raise NotImplementedError


class PointerRuntime(ContextRuntime):
    """Of a bare pointer that `init_from_model` gave. Its callback stays and does nothing once released."""

    def __init__(self, pointer: Any) -> None:
        made = _made.get(_pointer(pointer))
        if made is None:
            raise RuntimeNotSupported(
                "llama.cpp takes its evaluation callback only when a context is made: make this one with "
                "mien.init_from_model(model, params) in place of llama_cpp.llama_init_from_model"
            )
        self._context = pointer
        fingerprint = fingerprint_of(api.llama_get_model(pointer))
        super().__init__(fingerprint, made.hook, made.sites, api.llama_n_seq_max(pointer))
        made.runtime = self

    @property
    def context(self) -> Any:
        return self._context

    def release(self) -> None:
        made = _made.get(_pointer(self._context))
        if made is not None and made.runtime is self:
            made.runtime = None
            self._let_go()

    def close(self) -> None:
        """The context is freed."""
        self._context = None

    def _let_go(self) -> None:
        super().swap(NOTHING)
        self._watch = self._counting = None
        self.hook.watch(None)
        self.hook.count(None)
        for sequence in range(self.n_sequences):
            self.tell_reply(None, sequence)


def _keys(program: Program) -> tuple[Key, Key]:
    return program.prompt.key, program.response.key


def _pointer(context: Any) -> int:
    return int(getattr(context, "value", context) or 0)


def _fill(batch: Any, tokens: Sequence[int], position: int, all_logits: bool) -> None:
    """Of sequence 0, from `position` on."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
        batch.logits[i] = all_logits or i == len(tokens) - 1


# ---- what is known of a model ----


def _metadata(model: Any) -> dict[str, str]:
    """A model's metadata as text, by key."""
    found = {}
    buffer = ctypes.create_string_buffer(1 << 10)
    for i in range(api.llama_model_meta_count(model)):
        key_size = api.llama_model_meta_key_by_index(model, i, buffer, len(buffer))
        key = buffer.value[:key_size].decode(errors="replace")
        size = api.llama_model_meta_val_str_by_index(model, i, buffer, len(buffer))
        if 0 <= size < len(buffer):  # a chat template may be longer; nothing of that is needed here
            found[key] = buffer.value.decode(errors="replace")
    return found


def _integer(metadata: Mapping[str, str], key: str) -> int:
    return int(metadata.get(f"{metadata.get('general.architecture', '')}.{key}", "0"))


def fingerprint_of(model: Any) -> Fingerprint:
    """What of a loaded model, by its pointer, must agree with a vector.

    Raises RuntimeNotSupported if the model has no blocks.
    """
    metadata = _metadata(model)
    architecture = metadata.get("general.architecture", "unknown")
    n_layer = api.llama_model_n_layer(model)
    if n_layer <= 0:
        blocks = _integer(metadata, "block_count")
        why = "it was opened with vocab_only=True" if blocks else f"its {architecture}.block_count is 0"
        raise RuntimeNotSupported(f"this model has no blocks to steer: {why}")
    return Fingerprint(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=api.llama_model_n_embd(model),
        vocabulary=_vocabulary(model),
        name=metadata.get("general.basename") or metadata.get("general.name", ""),
    )


def _vocabulary(model: Any) -> str:
    """The digest of a model's token texts; empty if it has none, where llama.cpp would end the process."""
    vocabulary = api.llama_model_get_vocab(model)
    if api.llama_vocab_type(vocabulary) == api.LLAMA_VOCAB_TYPE_NONE:
        return ""
    count = api.llama_vocab_n_tokens(vocabulary)
    return vocabulary_digest(api.llama_vocab_get_text(vocabulary, i) for i in range(count))
