"""Positions of the KV cache that llama.cpp evaluates without the Llama: pictures, and somebody's own
llama_decode.

The measure is the plain model, and llama.cpp's own control vector on the same evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from llama_batches import own_control_vector
from makers import DictRegistry, make_vector
from tiny import N_VOCAB

N_LAYER, N_EMBD, PICTURE = 4, 64, 6
PATHS = ["in-graph", "post-compute"]
V = make_vector("v", range(1, N_LAYER), 3, fingerprint=None, n_embd=N_EMBD, model_hint="llama")
REGISTRY = DictRegistry(V)


@pytest.fixture
def load(load_tiny: Callable[..., Any]) -> Callable[..., Any]:
    """With micro-batches of 8."""
    return lambda **options: load_tiny(**{"n_ubatch": 8, **options})


def attach(llm: Any, recipe: Any = None, **options: Any) -> mien.Steering:
    steering = mien.attach(llm, registry=REGISTRY, **options)
    steering.set(recipe)
    return steering


def words(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, N_VOCAB, size=count).tolist()
    return tokens


def picture(seed: int, rows: int = PICTURE) -> np.ndarray:
    return (0.5 * np.random.default_rng(1000 + seed).standard_normal((rows, N_EMBD))).astype(np.float32)


def decode_directly(llm: Any, *, rows: np.ndarray | None = None, tokens: list[int] | None = None) -> None:
    """llama_decode past the Llama, without logits but for the last token, as multimodal helpers do."""
    count = len(tokens if rows is None else rows)
    batch = api.llama_batch_init(count, 0 if rows is None else N_EMBD, 1)
    batch.n_tokens = count
    for i in range(count):
        if rows is None:
            batch.token[i] = tokens[i]
        else:
            for j in range(N_EMBD):
                batch.embd[i * N_EMBD + j] = float(rows[i, j])
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = llm.n_tokens + i, 1, 0
        batch.logits[i] = 0
    assert api.llama_decode(llm._ctx.ctx, batch) == 0
    api.llama_batch_free(batch)
    llm.n_tokens += count


class PictureHandler:
    """A chat handler that does what llama-cpp-python's own do with text and pictures, in pieces."""

    def __call__(self, *, llama: Any, messages: Any, max_tokens: int, temperature: float, **_: Any) -> Any:
        llama.reset()
        llama._ctx.kv_cache_clear()
        for message in messages:
            for part in message["content"]:
                if isinstance(part, np.ndarray):
                    decode_directly(llama, rows=part)
                else:
                    llama.eval(part)
        prompt = llama.input_ids[: llama.n_tokens].tolist()
        return llama.create_completion(prompt=prompt, max_tokens=max_tokens, temperature=temperature)


def said(llm: Any, *messages: tuple[str, list[Any]], count: int = 8) -> str:
    llm.chat_handler = PictureHandler()
    found = llm.create_chat_completion(
        [{"role": role, "content": content} for role, content in messages], max_tokens=count, temperature=0.0
    )
    return str(found["choices"][0]["text"])


def chats() -> list[list[tuple[str, list[Any]]]]:
    """Several pictures, several turns, last pieces of one token, and pictures of one row."""
    one = [("user", [words(5, 1), picture(1), words(1, 2)])]
    two = [("user", [picture(2), words(3, 3), picture(3, 11), words(4, 4)])]
    turns = [*one, ("assistant", [words(6, 5)]), ("user", [picture(4, 1), words(1, 6)])]
    return [one, two, turns, [("user", [words(9, 7), picture(5, 1), words(2, 8)])]]


@pytest.mark.parametrize("path", PATHS)
def test_a_picture_in_a_chat_is_as_in_the_plain_model_and_as_llama_cpps_own_vector(
    load: Callable[..., Any], path: str
) -> None:
    plain, own, llm = load(), load(), load()
    own_control_vector(own._ctx.ctx, V, N_LAYER)
    expected = [said(plain, *chat) for chat in chats()]
    steered = [said(own, *chat) for chat in chats()]
    assert len(set(expected)) == len(expected), "the replies don't tell the pictures apart"
    assert all(a != b for a, b in zip(expected, steered)), "the vector is too weak for this test"
    steering = attach(llm, path=path)
    assert [said(llm, *chat) for chat in chats()] == expected
    steering.set("v")
    assert [said(llm, *chat) for chat in chats()] == steered
    assert {done.path for done in steering.applied.layers.values()} == {path}
    steering.clear()
    assert [said(llm, *chat) for chat in chats()] == expected
    steering.set("v")
    said(llm, *chats()[0])
    steering.detach()
    assert [said(llm, *chat) for chat in chats()] == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("when", ["prompt", "response"])
def test_a_picture_is_prompt(load: Callable[..., Any], path: str, when: str) -> None:
    """The measure: recipes without a window, set by hand between the prompt and the reply."""
    llm, hand = load(), load()
    attach(llm, f'v(when="{when}")', path=path)
    steering = attach(hand, path=path, mix_cache=True)
    for chat in chats():
        found = said(llm, *chat)
        steering.set("v" if when == "prompt" else None)
        first = said(hand, *chat, count=1)  # the prompt, and the token drawn from it
        steering.set("v" if when == "response" else None)
        rest = hand.create_completion(
            prompt=[*hand.input_ids[: hand.n_tokens].tolist(), *drawn(hand)], max_tokens=7, temperature=0.0
        )
        assert found == first + rest["choices"][0]["text"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recipe", ['v(when="response")', 'v(when="prompt")'])
def test_a_picture_of_one_row_is_prompt_wherever_it_comes(
    load: Callable[..., Any], path: str, recipe: str
) -> None:
    """Also outside of a chat, where one more token is a reply's."""
    llm, hand = load(), load()
    attach(llm, recipe, path=path)
    by_hand = attach(hand, path=path, mix_cache=True)
    for each in (llm, hand):
        if each is hand:
            by_hand.set("v" if "prompt" in recipe else None)
        each.eval(words(4, 1))
        decode_directly(each, rows=picture(1, 1))
        each.eval(words(1, 2))  # after what asked for no logits, so not drawn
        if each is hand:
            by_hand.set("v" if "response" in recipe else None)
        each.eval(words(1, 3))
    rows = [np.ctypeslib.as_array(api.llama_get_logits(m._ctx.ctx), shape=(N_VOCAB,)) for m in (llm, hand)]
    assert np.array_equal(*rows)


def drawn(llm: Any) -> list[int]:
    """The likeliest next token, which was not evaluated."""
    row = np.ctypeslib.as_array(api.llama_get_logits(llm._ctx.ctx), shape=(llm.n_vocab(),))
    return [int(row.argmax())]


@pytest.mark.parametrize("path", PATHS)
def test_a_handlers_own_decodes_keep_their_place(load: Callable[..., Any], path: str) -> None:
    """Text, picture, text past the chat interface, then a completion of what is in the context."""

    def run(llm: Any) -> list[int]:
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(words(4, 1))
        decode_directly(llm, rows=picture(1))
        decode_directly(llm, tokens=words(3, 2))
        llm.eval(words(1, 3))  # alone it counts as a reply's, until `generate` says otherwise
        stream = llm.generate(llm.input_ids[: llm.n_tokens].tolist(), temp=0.0)
        return [int(next(stream)) for _ in range(8)]

    plain, own, llm = load(), load(), load()
    own_control_vector(own._ctx.ctx, V, N_LAYER)
    expected, steered = run(plain), run(own)
    assert expected != steered
    steering = attach(llm, path=path)
    for recipe, what in ((None, expected), ("v", steered), (None, expected), ('v(when="response")', None)):
        steering.set(recipe)
        found = run(llm)
        assert what is None or found == what
    assert llm._mien.tags[:14] == [()] * 14  # prompt: the picture, the words, and the last word alone


def test_what_can_not_be_evaluated_again_is_not_cut(load: Callable[..., Any]) -> None:
    llm = load()
    steering = attach(llm)
    llm.eval(words(4, 1))
    decode_directly(llm, rows=picture(1))
    llm.eval(words(2, 2))
    steering.set("v")
    with pytest.raises(mien.SteeringNotApplied, match=r"positions 0 to 9 .* llm.reset\(\)"):
        next(llm.generate(llm.input_ids[: llm.n_tokens].tolist(), temp=0.0))
    steering.clear()
    next(llm.generate(llm.input_ids[: llm.n_tokens].tolist(), temp=0.0))
    steering.set("v")
    fresh = load()
    attach(fresh, "v")
    prompt = words(5, 9)  # which begins otherwise: nothing that was kept is used
    assert next(llm.generate(prompt, temp=0.0)) == next(fresh.generate(prompt, temp=0.0))
    llm.reset()
    next(llm.generate(words(4, 1), temp=0.0))  # what is forgotten can't be cut


def test_a_steered_picture_is_not_left_to_the_plain_model(load: Callable[..., Any]) -> None:
    llm, plain = load(), load()
    steering = attach(llm, "v")
    llm.eval(words(4, 1))
    decode_directly(llm, rows=picture(1))
    steering.detach()
    assert llm.n_tokens == 0
    tokens = words(7, 2)
    assert next(llm.generate(tokens, temp=0.0)) == next(plain.generate(tokens, temp=0.0))


def test_an_unsteered_picture_stays_after_detach(load: Callable[..., Any]) -> None:
    llm, plain = load(), load()
    steering = attach(llm)
    for each in (llm, plain):
        each.eval(words(4, 1))
        decode_directly(each, rows=picture(1))
        each.eval(words(2, 2))
    steering.detach()
    replies = [next(m.generate(m.input_ids[: m.n_tokens].tolist(), temp=0.0)) for m in (llm, plain)]
    assert replies[0] == replies[1]
    assert llm.n_tokens == plain.n_tokens == 12


@pytest.mark.parametrize("path", PATHS)
def test_tokens_of_a_reply_decoded_directly_are_a_replys(load: Callable[..., Any], path: str) -> None:
    """A prompt of several micro-batches whose last one is a single token, then a loop of one's own."""

    def run(llm: Any) -> list[int]:
        found = []
        llm.reset()
        llm._ctx.kv_cache_clear()
        decode_directly_with_logits(llm, words(17, 1))  # 8, 8 and 1
        for _ in range(4):
            found += drawn(llm)
            decode_directly_with_logits(llm, found[-1:])
        return found

    llm, plain = load(), load()
    attach(llm, 'v(when="response")', path=path)
    first, *_ = run(llm)
    assert first == run(plain)[0]
    assert [tag == () for tag in llm_tags(llm)] == [True] * 17 + [False] * 4


def decode_directly_with_logits(llm: Any, tokens: list[int]) -> None:
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, llm.n_tokens + i, 1, 0
        batch.logits[i] = i == len(tokens) - 1
    assert api.llama_decode(llm._ctx.ctx, batch) == 0
    api.llama_batch_free(batch)
    llm.n_tokens += len(tokens)


def llm_tags(llm: Any) -> list[Any]:
    llm._mien.note_strays()
    return list(llm._mien.tags)


@pytest.mark.parametrize("recipe", ['v(when="response")', 'v(when="prompt")'])
def test_a_token_after_a_state_is_what_it_was_without(load: Callable[..., Any], recipe: str) -> None:
    """Given, if it comes after a picture, and else a reply's: whatever was evaluated before it was loaded."""
    llm = load()
    attach(llm, recipe)
    states, rows = [], []
    for pictured in (True, False):
        llm.reset()
        llm.eval(words(4, 1))
        if pictured:
            decode_directly(llm, rows=picture(1, 2))
        else:
            llm.eval(words(2, 2))
        states.append(llm.save_state())
        llm.eval(words(1, 3))
        rows.append(np.ctypeslib.as_array(api.llama_get_logits(llm._ctx.ctx), shape=(N_VOCAB,)).copy())
    for state, expected in zip(states, rows):
        for other in states:
            llm.load_state(other)
            llm.load_state(state)
            llm.eval(words(1, 3))
            found = np.ctypeslib.as_array(api.llama_get_logits(llm._ctx.ctx), shape=(N_VOCAB,))
            assert np.array_equal(found, expected)


def test_a_state_with_a_picture_keeps_it(load: Callable[..., Any]) -> None:
    llm = load()
    steering = attach(llm, "v")
    llm.eval(words(4, 1))
    decode_directly(llm, rows=picture(1))
    llm.eval(words(2, 2))
    prompt = llm.input_ids[: llm.n_tokens].tolist()
    state = llm.save_state()
    expected = next(llm.generate(prompt, temp=0.0))
    llm.reset()
    llm.load_state(state)
    assert next(llm.generate(prompt, temp=0.0)) == expected
    steering.clear()
    llm.load_state(state)
    with pytest.raises(mien.SteeringNotApplied, match="positions 0 to 9"):
        next(llm.generate(prompt, temp=0.0))
