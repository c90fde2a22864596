"""Many texts at once in llama.cpp: the tree of their tokens is walked once, each leaf a sequence.

It has a context of its own beside the Llama's, made of the same weights, whose sequences share one KV cache:
a token that several texts begin with belongs to all of their sequences. Under each sequence acts its text's
program. Where a model can't share tokens (recurrent memory), each text is evaluated alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from ..errors import MienError
from ..evaluation import Progress, Text, programs_of, require_room, silent
from ..program import NOTHING, Program
from ..recipe import RecipeLike
from ..steering import Steering
from ..trie import Chunk, Mark, chunks, successors
from ..vector import Floats
from .llama_context import PointerRuntime, free, init_from_model
from .llama_text import chat_tokens, raw_tokens

LEAVES = 32  # sequences at once; more gain nothing on a CPU
CELLS = 512  # tokens of a chunk: attention looks at all cells in use, so that larger ones are slower

Row: TypeAlias = "tuple[int, int, Sequence[int], bool]"  # token, position, sequences, whether with logits


class LlamaEvaluator:
    """Of a llama_cpp.Llama, whose own context is left alone."""

    def __init__(self, llm: Any) -> None:
        if getattr(llm, "_mien", None) is not None or getattr(llm, "_ctx", None) is None:
            raise MienError("expected an open llama_cpp.Llama that is not attached: detach() it first")
        self._llm = llm
        model = llm._model.model
        self._sharing = not (api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model))
        self._room = llm.n_ctx()
        parameters = type(llm.context_params).from_buffer_copy(llm.context_params)
        parameters.n_ctx = self._room + CELLS + 64 * LEAVES
        parameters.n_batch = max(parameters.n_batch, CELLS)
        parameters.n_seq_max = LEAVES + 1 if self._sharing else 1
        parameters.kv_unified, parameters.embeddings = True, False
        self._context = init_from_model(model, parameters)
        if not self._context:
            raise MienError("llama.cpp could not make a context: not enough memory?")
        self._runtime = PointerRuntime(self._context)
        self._steering = Steering(self._runtime)
        self._steering.warns = False
        self.fingerprint = self._runtime.fingerprint
        self._memory = api.llama_get_memory(self._context)
        self._n_batch = int(api.llama_n_batch(self._context))
        self._batch = api.llama_batch_init(self._n_batch, 0, parameters.n_seq_max)
        self._trunk, self._last = LEAVES, 0  # the sequence that keeps the path between two chunks

    def close(self) -> None:
        if self._context:
            self._steering.detach()
            api.llama_batch_free(self._batch)
            free(self._context)
            self._context = None

    # ---- texts ----

    def text(self, messages: Sequence[dict[str, str]], reply: str = "", *, raw: bool = False) -> Text:
        if raw:
            given = raw_tokens(self._llm, "".join(message["content"] for message in messages))
        else:
            given = chat_tokens(self._llm, messages)
        answer = self._llm.tokenize(reply.encode(), add_bos=False, special=False) if reply else []
        return Text((*given, *answer), len(given))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._llm.detokenize(list(tokens)).decode(errors="replace"))

    def compile(self, recipe: RecipeLike) -> Program:
        return self._steering.compile(recipe)

    # ---- what is asked of them ----

    def capture(
        self,
        texts: Sequence[Text],
        layers: Sequence[int],
        *,
        last: bool = False,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Floats]]:
        everything = self.fingerprint.n_layer - 1 in layers  # of the last block only outputs are computed
        path = np.empty((len(layers), 0, self.fingerprint.n_embd), dtype=np.float32)
        every = programs_of(programs, len(texts))
        for chunk in self._walk(self._plan(texts, every), texts, every, progress):
            rows = [
                self._captured(chunk, part, layers, everything) for part in self._parts(len(chunk.tokens))
            ]
            found = np.concatenate(rows, axis=1) if rows else path[:, :0]
            for branch in chunk.branches:
                path = np.concatenate([path[:, : branch.common], found[:, branch.nodes]], axis=1)
                text = texts[branch.text]
                yield branch.text, path[:, len(text.tokens) - 1 if last else text.reply :].copy()

    def log_probabilities(
        self, texts: Sequence[Text], *, programs: Sequence[Program] = (), progress: Progress = silent
    ) -> list[npt.NDArray[np.float64]]:
        result: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(texts)
        plan = self._plan(texts, every := programs_of(programs, len(texts)))
        wanted = successors(plan, texts)
        path: list[dict[int, float]] = []  # by position: {next token: its log-probability}
        for chunk, asked in zip(self._walk(plan, texts, every, progress), wanted):
            found: list[dict[int, float]] = []  # by node
            for part in self._parts(len(chunk.tokens)):
                self._decode(_rows(chunk, part, [bool(asked[node]) for node in part]))
                logits = iter(self._logits(sum(bool(asked[node]) for node in part)))
                found += [_scores(next(logits), asked[node]) if asked[node] else {} for node in part]
            for branch in chunk.branches:
                path = [*path[: branch.common], *(found[node] for node in branch.nodes)]
                text = texts[branch.text]
                after = zip(path[text.reply - 1 :], text.answer)
                result[branch.text] = np.array([scores[token] for scores, token in after])
        return result

    def generate(
        self,
        prompts: Sequence[Text],
        limit: int,
        *,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> list[Text]:
        every = programs_of(programs, len(prompts))
        require_room([Text(p.tokens + (0,) * limit, p.reply) for p in prompts], self._room)
        replies: list[list[int]] = [[] for _ in prompts]
        width, done = (LEAVES if self._sharing else 1), 0
        cells = int(api.llama_n_ctx(self._context))
        longest = max((len(prompt.tokens) + limit for prompt in prompts), default=1)
        width = max(min(width, cells // longest), 1)
        # What is the same up to the reply is evaluated once and copied, so alike prompts go together.
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].tokens, i))
        for start in range(0, len(order), width):
            group = order[start : start + width]
            asked = [prompts[i] for i in group]
            ends = self._begin(asked, [every[i] for i in group])
            for now in self._continue(asked, ends, limit):
                for slot, token in now.items():
                    replies[group[slot]].append(token)
                progress(done + sum(len(replies[i]) for i in group), limit * len(prompts))
            done += limit * len(group)
        progress(limit * len(prompts), limit * len(prompts))
        return [Text((*prompt.tokens, *reply), prompt.reply) for prompt, reply in zip(prompts, replies)]

    # ---- how ----

    def _plan(self, texts: Sequence[Text], programs: Sequence[Program]) -> list[Chunk]:
        """The tree of texts in chunks."""
        require_room(texts, self._room)
        if not self._sharing:
            marks = [Mark(i) for i in range(len(texts))]
        else:
            # Tokens are shared where the same is done to them.
            marks = [
                Mark() if program is NOTHING else Mark(program.prompt.key, text.reply, program.response.key)
                for text, program in zip(texts, programs)
            ]
        leaves = LEAVES if self._sharing else 1
        return list(chunks([text.tokens for text in texts], marks, cells=CELLS, leaves=leaves))

    def _walk(
        self, plan: Sequence[Chunk], texts: Sequence[Text], programs: Sequence[Program], progress: Progress
    ) -> Iterator[Chunk]:
        """The chunks one by one, each ready to be decoded."""
        api.llama_memory_clear(self._memory, True)
        done, total = 0, sum(len(chunk.tokens) for chunk in plan)
        for chunk in plan:
            self._keep(chunk)
            acting: list[Program] = [NOTHING] * len(chunk.shared)
            for branch in chunk.branches:
                acting[branch.slot] = programs[branch.text]
                self._runtime.tell_reply(texts[branch.text].reply, branch.slot)
            self._steer(acting)
            yield chunk
            self._last = len(chunk.shared) - 1
            done += len(chunk.tokens)
            progress(done, total)

    def _keep(self, chunk: Chunk) -> None:
        """Leave of the last path the chunk's first tokens, as its leaves' own."""
        memory = self._memory
        if not chunk.kept:
            api.llama_memory_clear(memory, True)
            return
        api.llama_memory_seq_rm(memory, self._trunk, -1, -1)
        api.llama_memory_seq_cp(memory, self._last, self._trunk, 0, chunk.kept)
        for slot in range(LEAVES):
            api.llama_memory_seq_rm(memory, slot, -1, -1)
        for slot, shared in enumerate(chunk.shared):
            if shared:
                api.llama_memory_seq_cp(memory, self._trunk, slot, 0, shared)

    def _steer(self, programs: Sequence[Program]) -> None:
        same = all(program is programs[0] for program in programs)
        self._runtime.swap(programs[0] if same else tuple(programs))

    def _parts(self, count: int) -> list[range]:
        return [range(i, min(i + self._n_batch, count)) for i in range(0, count, self._n_batch)]

    def _captured(self, chunk: Chunk, nodes: range, layers: Sequence[int], logits: bool) -> Floats:
        """Evaluate those nodes. Returns the outputs of `layers`, float32 (len(layers), nodes, n_embd)."""
        rows = self._runtime.hook.capture(layers, 0, len(nodes))
        try:
            self._decode(_rows(chunk, nodes, [logits] * len(nodes)))
        finally:
            self._runtime.hook.stop_capture()
        return rows

    def _decode(self, rows: Iterable[Row]) -> None:
        """Evaluate tokens, at most a batch of them."""
        batch, count = self._batch, 0
        for token, position, slots, wanted in rows:
            batch.token[count], batch.pos[count], batch.logits[count] = token, position, wanted
            batch.n_seq_id[count], ids = len(slots), batch.seq_id[count]
            for k, slot in enumerate(slots):
                ids[k] = slot
            count += 1
        batch.n_tokens = count
        if status := self._runtime.decode(batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _logits(self, count: int) -> Floats:
        """Of the outputs of the last decode, in the order of its tokens: float32 (count, n_vocab)."""
        if not count:
            return np.empty((0, 0), dtype=np.float32)
        shape = count, int(self._llm.n_vocab())
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), shape=shape)

    def _begin(self, prompts: Sequence[Text], programs: Sequence[Program]) -> list[int]:
        """Evaluate the prompts, each in its sequence. Returns the most probable token after each."""
        api.llama_memory_clear(self._memory, True)
        self._steer(programs)
        firsts: dict[object, int] = {}
        alike = [
            firsts.setdefault((prompt.tokens, prompt.reply, program.prompt.key), slot)
            for slot, (prompt, program) in enumerate(zip(prompts, programs))
        ]
        for slot, prompt in enumerate(prompts):
            self._runtime.tell_reply(prompt.reply, slot)
        rows: list[Row] = []
        for slot in firsts.values():
            last = len(prompts[slot].tokens) - 1
            rows += (
                (token, position, (slot,), position == last)
                for position, token in enumerate(prompts[slot].tokens)
            )
        ends: dict[int, int] = {}
        for part in self._parts(len(rows)):
            self._decode(rows[part.start : part.stop])
            done = [rows[i][2][0] for i in part if rows[i][3]]
            ends |= {slot: int(logits.argmax()) for slot, logits in zip(done, self._logits(len(done)))}
        for slot, first in enumerate(alike):
            if slot != first:
                api.llama_memory_seq_cp(self._memory, first, slot, -1, -1)
        return [ends[first] for first in alike]

    def _continue(self, prompts: Sequence[Text], ends: Sequence[int], limit: int) -> Iterator[dict[int, int]]:
        """The next token of each sequence that goes on, {slot: token}; `ends` are the first."""
        vocabulary = self._llm._model.vocab
        now = dict(enumerate(ends))
        for step in range(limit):
            now = {
                slot: token for slot, token in now.items() if not api.llama_vocab_is_eog(vocabulary, token)
            }
            if not now:
                return
            yield now
            if step == limit - 1:
                return
            self._decode(
                (token, len(prompts[slot].tokens) + step, (slot,), True) for slot, token in now.items()
            )
            now = {slot: int(row.argmax()) for slot, row in zip(now, self._logits(len(now)))}


def _rows(chunk: Chunk, nodes: range, wanted: Sequence[bool]) -> Iterator[Row]:
    """Those nodes of a chunk as rows of a batch."""
    for node, logits in zip(nodes, wanted):
        yield chunk.tokens[node], chunk.positions[node], chunk.slots[node], logits


def _scores(logits: Floats, tokens: Iterable[int]) -> dict[int, float]:
    """The log-probability of each of `tokens`, by logits (n_vocab,)."""
    top = logits.max()
    total = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    return {token: float(logits[token]) - total for token in tokens}
