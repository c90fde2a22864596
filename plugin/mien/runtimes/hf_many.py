"""Many texts at once in transformers: the tree of their tokens as one row with a mask that follows it.

A token sees the tokens on its path alone. Where a model can't be masked so (a recurrence, a sliding window
that the texts outgrow), and under programs, texts are rows of their own, padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import MienError
from ..evaluation import Progress, Text, programs_of, require_room, silent
from ..program import NOTHING, Program
from ..recipe import RecipeLike
from ..trie import Chunk, chunks
from ..vector import Floats
from . import attach, steering_of
from .hf_layers import find_layers, text_config
from .hf_text import chat_inputs
from .hf_tracker import tracker_of

CELLS = 512
ROWS = 16
_RECURRENT = ("mamba", "rwkv", "linear_attention", "recurrent", "conv")


class HFEvaluator:
    """Of a transformers model that is not attached, and its tokenizer, without which there is no text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if steering_of(model) is not None:  # its Steering would be detached with the evaluator
            raise MienError("expected a model that is not attached: mien.detach(model) first")
        self._model, self._given = model, tokenizer
        self._steering = attach(model, tokenizer=tokenizer)
        self._steering.warns = False
        self.fingerprint = self._steering.model
        found = find_layers(model)
        self._layers, self._tracker = found.modules, tracker_of(found.owner)
        self._room = int(getattr(text_config(model), "max_position_embeddings", 1 << 20))

    def close(self) -> None:
        self._steering.detach()

    # ---- texts ----

    @property
    def _tokenizer(self) -> Any:
        if self._given is None:
            raise MienError("a transformers model does not know its tokenizer: pass it (tokenizer=...)")
        return self._given

    def text(self, messages: Sequence[dict[str, str]], reply: str = "", *, raw: bool = False) -> Text:
        if raw:
            given = self._tokenizer("".join(message["content"] for message in messages)).input_ids
        else:
            given = chat_inputs(self._tokenizer, messages)[0].tolist()
        answer = self._tokenizer(reply, add_special_tokens=False).input_ids if reply else []
        return Text((*given, *answer), len(given))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

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
        for numbers, paths, states, _ in self._evaluate(texts, programs, layers, progress):
            for i, path in zip(numbers, paths):
                first = len(texts[i].tokens) - 1 if last else texts[i].reply
                yield i, states[:, path[first:]]

    def log_probabilities(
        self, texts: Sequence[Text], *, programs: Sequence[Program] = (), progress: Progress = silent
    ) -> list[npt.NDArray[np.float64]]:
        result: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(texts)
        for numbers, paths, _, logits in self._evaluate(texts, programs, (), progress):
            for i, path in zip(numbers, paths):
                text = texts[i]
                rows = torch.log_softmax(logits[path[text.reply - 1 : -1]].double(), dim=-1)
                chosen = rows.gather(1, torch.tensor(text.answer, dtype=torch.long)[:, None])
                result[i] = chosen[:, 0].numpy()
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
        result: list[Text] = []
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        filler = next(iter(ends - {None}), 0)
        for start in range(0, len(prompts), ROWS):
            part = prompts[start : start + ROWS]
            self._steering.set(every[start : start + ROWS])
            rows = [prompt.tokens for prompt in part]
            tokens, there = _padded(rows, [len(row) for row in rows])
            with torch.no_grad():
                out = self._model.generate(
                    input_ids=tokens.to(self._model.device),
                    attention_mask=there.to(self._model.device),
                    max_new_tokens=limit,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=filler,
                ).tolist()
            for prompt, row in zip(part, out):
                reply: list[int] = []
                for token in row[tokens.shape[1] :]:
                    if token in ends:
                        break
                    reply.append(token)
                result.append(Text((*prompt.tokens, *reply), prompt.reply))
            progress(min(start + ROWS, len(prompts)) * limit, len(prompts) * limit)
        self._steering.clear()
        return result

    # ---- how ----

    def _evaluate(
        self,
        texts: Sequence[Text],
        programs: Sequence[Program],
        layers: Sequence[int],
        progress: Progress,
    ) -> Iterator[tuple[list[int], list[list[int]], Floats, Tensor]]:
        """(numbers of texts, for each the rows of its tokens, block outputs, logits), a chunk at a time.

        Block outputs: float32 (len(layers), rows, n_embd). logits: (rows, n_vocab), for no layers alone.
        """
        require_room(texts, self._room)
        every = programs_of(programs, len(texts))
        steered = any(program is not NOTHING for program in every)
        longest = max((len(text.tokens) for text in texts), default=0)
        if steered or not self._masks(longest):
            yield from self._by_rows(texts, every, layers, progress)
            return
        plan = list(chunks([text.tokens for text in texts], cells=CELLS, leaves=CELLS))
        done, total = 0, sum(len(chunk.tokens) for chunk in plan)
        for chunk in plan:
            tokens, positions, mask, paths = _tree(chunk, texts, self._model.dtype)
            states, logits = self._forward(tokens, mask, positions, layers)
            done += len(chunk.tokens)
            yield [branch.text for branch in chunk.branches], paths, states[:, 0], logits[0]
            progress(done, total)

    def _by_rows(
        self, texts: Sequence[Text], programs: Sequence[Program], layers: Sequence[int], progress: Progress
    ) -> Iterator[tuple[list[int], list[list[int]], Floats, Tensor]]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            self._steering.set([programs[i] for i in part])
            try:
                replies = [texts[i].reply for i in part]
                tokens, there = _padded([texts[i].tokens for i in part], replies)
                given = max(replies)
                positions = (there.cumsum(1) - 1).clamp(min=0)
                with self._tracker.replying(given, len(part), there):
                    states, logits = self._forward(tokens, there, positions, layers)
            finally:
                self._steering.clear()
            firsts = [row * tokens.shape[1] + given - texts[i].reply for row, i in enumerate(part)]
            paths = [[*range(first, first + len(texts[i].tokens))] for first, i in zip(firsts, part)]
            flat = states.reshape(len(layers), tokens.numel(), -1) if layers else states[:, 0]
            yield part, paths, flat, logits.flatten(0, 1)
            progress(start + len(part), len(order))

    def _masks(self, longest: int) -> bool:
        """Whether a mask says all of what a token of the model sees."""
        config = text_config(self._model)
        kinds = " ".join([config.model_type, *(getattr(config, "layer_types", None) or ())])
        window = getattr(config, "sliding_window", None)
        return not any(word in kinds for word in _RECURRENT) and (not window or longest <= window)

    def _forward(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, layers: Sequence[int]
    ) -> tuple[Floats, Tensor]:
        """(block outputs, logits) of rows of tokens; no logits where layers are asked for."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                h = output[0] if isinstance(output, tuple) else output
                found[layer] = h.detach().to("cpu", torch.float32, copy=True)

            return hook

        hooks = [self._layers[layer].register_forward_hook(keep(layer)) for layer in layers]
        run = self._model.base_model if layers else self._model
        device = self._model.device
        try:
            with torch.no_grad():
                out = run(
                    input_ids=tokens.to(device),
                    attention_mask=mask.to(device),
                    position_ids=positions.to(device),
                    use_cache=False,
                )
        finally:
            for hook in hooks:
                hook.remove()
        if layers:
            return torch.stack([found[layer] for layer in layers]).numpy(), torch.empty(*tokens.shape, 0)
        return np.empty((0, *tokens.shape, 0), dtype=np.float32), out.logits.float().cpu()


def _padded(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(tokens, which are there), padded so that token starts[i] of each row i comes in the same column."""
    column = max(starts)
    width = column + max(len(row) - start for row, start in zip(rows, starts))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    there = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows, starts)):
        place = slice(column - start, column - start + len(row))
        tokens[i, place] = torch.tensor(row)
        there[i, place] = 1
    return tokens, there


def _tree(
    chunk: Chunk, texts: Sequence[Text], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """(tokens, positions, mask, for each branch the rows of its path); what is kept is evaluated again."""
    kept = chunk.kept
    tokens = [*texts[chunk.branches[0].text].tokens[:kept], *chunk.tokens]
    positions = [*range(kept), *chunk.positions]
    path, paths = list(range(kept)), []
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    seen[:kept, :kept] = torch.ones(kept, kept, dtype=torch.bool).tril()
    for branch in chunk.branches:
        del path[branch.common :]
        for node in branch.nodes:
            path.append(kept + node)
            seen[kept + node, path] = True
        paths.append(list(path))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return torch.tensor([tokens]), torch.tensor([positions]), mask[None, None], paths
