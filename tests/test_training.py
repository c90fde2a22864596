"""Directions by gradient, on a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mien.errors import MienError
from mien.evaluation import Text, evaluator
from mien.training import Example, _Steered, train
from mien.vector import Vector

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.build("llama", tmp_path_factory.mktemp("tiny"))


def lessons() -> list[Example]:
    """Prompts of several lengths; one pole answers in low tokens, the other in high ones."""
    random = np.random.default_rng(1)
    found = []
    for k in range(8):
        prompt = random.integers(3, 120, 4 + k % 3).tolist()
        for coefficient, first in ((1.0, 10), (-1.0, 80)):
            reply = random.integers(first, first + 8, 5 + k % 2).tolist()
            found.append(Example("low", coefficient, Text((*prompt, *reply), len(prompt))))
    return found


def test_the_rows_bring_each_pole_about(small: tiny.Tiny) -> None:
    examples = lessons()
    rows = train(small.model, examples, LAYERS, rounds=6, rate=3e-3)["low"]
    assert rows.shape == (2, small.n_embd)
    assert rows.dtype == np.float32
    vector = Vector("low", LAYERS, rows, model_hint="llama")
    many = evaluator(small.model)
    random = np.random.default_rng(2)
    new = [random.integers(3, 120, 5).tolist() for _ in range(6)]  # not among the lessons
    replies = {
        coefficient: [Text((*p, *random.integers(first, first + 8, 6).tolist()), 5) for p in new]
        for coefficient, first in ((1.0, 10), (-1.0, 80))
    }
    for coefficient, texts in replies.items():
        with_, without, against = (
            np.concatenate(many.log_probabilities(texts, programs=[many.compile(recipe)] * 6)).mean()
            for recipe in (vector * coefficient, None, vector * -coefficient)
        )
        assert with_ > without + 0.3 > against
    many.close()


def test_the_model_is_left_as_it_was_and_the_rows_are_the_same_again(small: tiny.Tiny) -> None:
    before = {name: p.detach().clone() for name, p in small.model.named_parameters()}
    first = train(small.model, lessons(), LAYERS, rounds=1)
    second = train(small.model, lessons(), LAYERS, rounds=1)
    np.testing.assert_array_equal(first["low"], second["low"])
    for name, parameter in small.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    assert not any(layer._forward_hooks for layer in small.model.model.layers)


def test_vectors_that_are_trained_together_do_not_touch_each_other(small: tiny.Tiny) -> None:
    """Adam would move on what a step does not touch; here each vector's lessons are steps of its own."""
    mine = lessons()[:10]
    other = [Example("other", 1.0, Text((7, *e.text.tokens), e.text.reply + 1)) for e in lessons()[:10]]
    alone = train(small.model, mine, LAYERS, rounds=1)["low"]
    both = train(small.model, [*mine, *other], LAYERS, rounds=1)
    assert set(both) == {"low", "other"}
    assert np.linalg.norm(both["low"]) < 3 * np.linalg.norm(alone)


def adding(row: torch.Tensor, first: int) -> Any:
    """A hook that adds `row` to the tokens from `first` on."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[:, first:] += row
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def test_the_loss_is_that_of_replies_steered_from_the_last_token_of_the_prompt(small: tiny.Tiny) -> None:
    """Against one text alone, without padding and cache, steered where it should be."""
    texts = [example.text for example in lessons()[:5]]
    random = np.random.default_rng(5)
    deltas = torch.from_numpy(random.standard_normal((5, 2, small.n_embd)).astype(np.float32))
    steered = _Steered(small.model, LAYERS)
    with torch.no_grad():
        found = steered.loss(texts, deltas, 0.0)
    steered.remove()
    total, count = 0.0, 0
    for text, delta in zip(texts, deltas, strict=True):
        hooks = [
            small.model.model.layers[n].register_forward_hook(adding(delta[i], text.reply - 1))
            for i, n in enumerate(LAYERS)
        ]
        with torch.no_grad():
            logits = small.model(torch.tensor([text.tokens]), use_cache=False).logits[0, text.reply - 1 : -1]
        for hook in hooks:
            hook.remove()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(text.answer), reduction="sum"))
        count += len(text.answer)
    assert float(found) == pytest.approx(total / count, abs=1e-4)


def test_repeating_what_was_said_costs(small: tiny.Tiny) -> None:
    """The second term falls where a model shuns the tokens that came before."""
    from mien.training import _said_already

    targets = torch.tensor([[5, 6, 7, -100]])
    logits = torch.zeros(1, 4, 10)
    even = float(_said_already(logits, targets))
    assert even == pytest.approx(-3 * np.log(0.9) / 3, rel=1e-5)  # 5 before 6; 5 and 6 before 7
    logits[0, 2, 5] = 3.0
    assert float(_said_already(logits, targets)) > even
    logits[0, 2, 5] = 0.0
    logits[0, 3] = 9.0  # behind the reply there is nothing to shun
    logits[0, 2, 7] = 3.0  # the right token is not shunned, and leaves less for the others
    assert float(_said_already(logits, targets)) < even


@pytest.mark.parametrize(
    ("examples", "words"),
    [([], "nothing to train on"), ([Example("x", 1.0, Text((3, 4), 2))], "no reply")],
)
def test_nothing_to_train_on(small: tiny.Tiny, examples: list[Example], words: str) -> None:
    with pytest.raises(MienError, match=words):
        train(small.model, examples, LAYERS)
