"""Directions by gradient: what has to be added for the model to write the replies of a pole by itself.

A difference of means tells where two kinds of text lie apart; added to every block it also adds what only
came along. Here the rows of all blocks of a vector are trained together, the model's weights fixed, to make
the replies of the contrast data probable: cross entropy, and unlikelihood of what the reply has said already
(Welleck et al., 2019), since steered text of small models fails by repeating itself. Both poles of a trait
train one vector, with the coefficients 1 and -1.

Vectors that are trained: BiPO (Cao et al., 2024), ReFT (Wu et al., 2024). It takes torch and the model in
transformers; the vectors work in every runtime.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import MienError
from .evaluation import Progress, Text, silent
from .runtimes.hf_layers import find_layers
from .vector import Floats

ROUNDS = 2
RATE = 6e-4  # Adam's step, as a share of the stream's norm and a dimension
REPETITION = 4.0
BATCH = 10  # replies a step
FALL = 0.6  # the last share of the steps, over which their size falls to nothing
NORM_TEXTS = 16


@dataclass(frozen=True)
class Example:
    """A reply that `coefficient` times the vector `name` should bring about."""

    name: str
    coefficient: float
    text: Text


def train(
    model: Any,
    examples: Sequence[Example],
    layers: Sequence[int],
    *,
    rounds: int = ROUNDS,
    rate: float = RATE,
    repetition: float = REPETITION,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Floats]:
    """{name: rows, float32 (len(layers), n_embd)} for every name in `examples`.

    model: a transformers model, whose weights are left alone. layers: blocks at whose output a vector acts.
    rounds: how often every example is gone through. repetition: the weight of the unlikelihood. The same
    arguments give the same rows on the same machine.

    Raises MienError for no examples, or one without a reply.
    """
    if not examples:
        raise MienError("there is nothing to train on: no examples")
    if any(not example.text.answer for example in examples):
        raise MienError("an example has no reply")
    names = sorted({example.name for example in examples})
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    steered = _Steered(model, layers)
    try:
        norms = steered.norms([example.text for example in examples[:: max(len(examples) // NORM_TEXTS, 1)]])
        # A parameter each: Adam leaves those alone that a step does not touch.
        rows = {name: torch.zeros(len(layers), steered.width, requires_grad=True) for name in names}
        optimizer = torch.optim.Adam(rows.values(), lr=rate)
        steps = [batch for turn in range(rounds) for batch in _batches(examples, seed + turn)]
        for step, batch in enumerate(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (1 - step / len(steps)) / FALL)
            deltas = torch.stack([e.coefficient * rows[e.name] for e in batch]) * norms[:, None]
            loss = steered.loss([example.text for example in batch], deltas, repetition)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress(step + 1, len(steps))
        return {
            name: (row.detach() * norms[:, None]).numpy().astype(np.float32) for name, row in rows.items()
        }
    finally:
        steered.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


class _Steered:
    """A model to whose blocks' outputs `deltas` are added while it is set."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        found = find_layers(model)
        self.model = model
        self.deltas: Tensor | None = None  # (replies, layers, n_embd)
        self.width = int(model.config.get_text_config().hidden_size)
        self._seen: dict[int, Tensor] = {}
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # transformers 5 and 4
        self._hooks = [
            found.modules[layer].register_forward_hook(self._hook(i)) for i, layer in enumerate(layers)
        ]

    def _hook(self, i: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            if self.deltas is None:
                self._seen[i] = h
                return output
            h = h + self.deltas[:, i, None, :]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def norms(self, texts: Sequence[Text]) -> Tensor:
        """The median norm of the stream at each layer, float32 (layers,), first tokens left out."""
        found: list[Tensor] = []
        with torch.no_grad():
            for text in texts:
                self.model(input_ids=torch.tensor([text.tokens]), use_cache=False)
                states = [self._seen[i][0, 1:].norm(dim=-1) for i in range(len(self._hooks))]
                found.append(torch.stack(states))
        self._seen.clear()
        return torch.cat(found, dim=1).median(dim=1).values.float()

    def loss(self, texts: Sequence[Text], deltas: Tensor, repetition: float) -> Tensor:
        """Of the replies, steered from the last token of what comes before them on; a mean over tokens."""
        prompts = sorted({text.tokens[: text.reply] for text in texts})
        which = torch.tensor([prompts.index(text.tokens[: text.reply]) for text in texts])
        longest = max(map(len, prompts))
        given = torch.zeros(len(prompts), longest, dtype=torch.long)
        there = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):  # padded on the left, so that replies begin in one column
            given[i, longest - len(prompt) :] = torch.tensor(prompt)
            there[i, longest - len(prompt) :] = 1
        count = max(len(text.answer) for text in texts)
        inputs = torch.zeros(len(texts), count, dtype=torch.long)
        targets = torch.full((len(texts), count), -100)
        for i, text in enumerate(texts):
            inputs[i, : len(text.answer)] = torch.tensor(text.tokens[text.reply - 1 : -1])
            targets[i, : len(text.answer)] = torch.tensor(text.answer)
        positions = there.cumsum(1)
        with torch.no_grad():
            cache = self._prefix(given, there, positions)
        after = positions[which, -1:] - 1 + torch.arange(count)
        mask = torch.cat([there[which], torch.ones(len(texts), count, dtype=torch.long)], dim=1)
        keep = there[which].clone()
        keep[:, -1] = 0  # the last token of the prompt is evaluated again, steered
        mask = torch.cat([keep[:, :-1], mask[:, longest:]], dim=1)

        self.deltas = deltas
        try:
            out = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=after,
                use_cache=True,
                **{self._cache_name: _repeated(cache, which)},
            ).logits
        finally:
            self.deltas = None
        loss = functional.cross_entropy(out.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return loss + repetition * _said_already(out, targets) if repetition else loss

    def _prefix(self, given: Tensor, there: Tensor, positions: Tensor) -> Any:
        """The cache of all tokens of the prompts but the last."""
        if given.shape[1] == 1:
            return None
        return self.model.base_model(
            input_ids=given[:, :-1],
            attention_mask=there[:, :-1],
            position_ids=(positions[:, :-1] - 1).clamp(min=0),
            use_cache=True,
        ).past_key_values


def _repeated(cache: Any, which: Tensor) -> Any:
    """A copy of `cache` with its rows chosen by `which`."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(which)
    return cache


def _batches(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """All examples in an order told by `seed`, those of one prompt together."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(example.text.tokens[: example.text.reply], []).append(example)
    order = np.random.default_rng(seed).permutation(len(groups))
    every = list(groups.values())
    batch: list[Example] = []
    for i in order:
        if batch and len(batch) + len(every[i]) > BATCH:
            yield batch
            batch = []
        batch += every[i]
    if batch:
        yield batch


def _said_already(logits: Tensor, targets: Tensor) -> Tensor:
    """Unlikelihood of a reply's earlier tokens, but for the right one; a mean over tokens."""
    real, tokens = targets >= 0, targets.clamp(min=0)
    count = targets.shape[1]
    earlier = torch.softmax(logits, dim=-1).gather(2, tokens[:, None, :].expand(-1, count, -1))
    before = torch.ones(count, count, dtype=torch.bool).tril(-1)
    asked = before & real[:, None, :] & real[:, :, None] & (tokens[:, :, None] != tokens[:, None, :])
    return -(torch.log1p(-earlier.clamp(max=0.999)) * asked).sum() / real.sum()
