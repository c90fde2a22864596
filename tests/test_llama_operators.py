"""What acts on which token of a Llama: operators, windows, gates and readouts, on a tiny model.

The formulas are those of mien.reference, on rows that were captured. Which tokens were acted on is told by a
watch of the vector that is added: what it holds after, less what it held before, is the share of its dose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from llama_batches import Contexts, Row, clear, differing, evaluate, evaluate_all
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from makers import DictRegistry
from mien import reference
from mien.program import Dose, Program
from mien.steering import Steering
from mien.vector import Vector
from mien.watch import Token
from tiny import N_VOCAB, build

N_EMBD, LAYER = 64, 2
PATHS = ["in-graph", "post-compute"]


def make_vector(name: str, seed: int, layers: Sequence[int] = (LAYER,), **meta: Any) -> Vector:
    rows = 0.4 * np.random.default_rng(seed).standard_normal((len(layers), N_EMBD))
    return Vector(name, tuple(layers), rows.astype(np.float32), meta=meta)


A, B, G = (make_vector(name, seed) for seed, name in enumerate("abg"))
REGISTRY = DictRegistry(
    A,
    B,
    G,
    make_vector("probe", 3, bias=[0.5]),
    make_vector("centred", 4, center=[0.25]),
    make_vector("deep", 5, (1, 2, 3)),
    make_vector("last", 6, (3,)),
    Vector("plane", (LAYER,), np.random.default_rng(7).standard_normal((1, 2, N_EMBD)).astype(np.float32)),
)


@pytest.fixture
def tiny(load_tiny: Callable[..., Any]) -> Callable[..., Any]:
    return load_tiny


def attach(llm: Any, recipe: Any = None, **options: Any) -> Steering:
    steering = mien.attach(llm, registry=REGISTRY, **options)
    steering.set(recipe)
    return steering


def text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, N_VOCAB, size=count).tolist()
    return tokens


def logits_of(llm: Any) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


# ---- operators ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "recipe",
    [
        "0.7*a",
        "a - 0.5*b",
        "3*a(keep_norm=True)",
        "ablate(a)",
        "0.4*ablate(a)",
        "ablate(a) + ablate(b)",
        "ablate(plane)",
        "clamp(a, 1.5)",
        "0.5*clamp(centred, -1)",
        "clamp(plane, (0.5, -2))",
        "clamp(a, 1) + clamp(b, -1)",
        "edit(probe)",
        "0.5*edit(probe, margin=-1)",
        "scale(a)",
        "scale(a, -0.5)",
        "gate(a, on=g, above=0)",
        "gate(a, on=g, below=0.5) + gate(ablate(b), on=g, above=-0.5, below=0.5)",
        "gate(gate(a, on=g, above=-1), on=b, below=0.5)",
        "gate(a, on=centred, above=0.1, hysteresis=9, latch=True)",  # a prompt's tokens remember nothing
        "a + 2*b(keep_norm=True) + ablate(g) + 0.5*clamp(centred, 1) + edit(probe, margin=1) + scale(b, 0.1)"
        " + gate(b, on=a, above=0)",
    ],
)
def test_an_operator_is_the_reference_on_captured_rows(
    tiny: Callable[..., Any], path: str, recipe: str
) -> None:
    llm = tiny(n_batch=64, n_ubatch=7)
    steering = attach(llm, path=path)
    tokens = text(40)
    before = steering.capture(tokens, layers=[LAYER - 1, LAYER, LAYER + 1], last=40)
    steering.set(recipe)
    after = steering.capture(tokens, layers=[LAYER - 1, LAYER, LAYER + 1], last=40)
    expected = reference.apply(steering.compile(recipe).prompt.doses, "residual", LAYER, before[1])
    assert np.array_equal(after[0], before[0])
    np.testing.assert_allclose(after[1], expected, rtol=0, atol=4e-6)
    assert not np.array_equal(after[2], before[2])
    changed = (expected != before[1]).any(axis=1)
    assert np.array_equal(after[1][~changed], before[1][~changed])
    done = steering.applied.layers
    assert list(done) == [LAYER]
    moved = np.linalg.norm((after[1].astype(np.float64) - before[1])[changed], axis=1)
    if "edit" not in recipe:  # which acts on a row although that is beyond the margin already
        assert done[LAYER].rows == changed.sum()
        assert done[LAYER].shift == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-5)
    assert done[LAYER].path == path


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("options", [{"n_ubatch": 7}, {"n_threads": 2, "n_ubatch": 7}], ids=str)
def test_both_paths_do_the_same_however_it_is_cut(tiny: Callable[..., Any], options: dict[str, int]) -> None:
    recipe = 'deep + gate(2*b(keep_norm=True), on=g, above=0, hysteresis=1) + ablate(a)(when="response")'
    found = []
    for path in PATHS:
        llm = tiny(**options)
        steering = attach(llm, recipe, path=path)
        stream = llm.generate(text(30), temp=0.0)
        found.append([logits_of(llm) for _ in zip(range(6), stream)])
        assert {done.path for done in steering.applied.layers.values()} == {path}
    assert all(np.array_equal(a, b) for a, b in zip(*found))


# ---- which tokens: what happens to a Llama, and the numbers that its tokens must have ----

PROMPT = text(20)
# The likeliest continuation of a random model says one token over and over.
SAMPLED = {"temp": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def generated(llm: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The next tokens; the last of them is not evaluated."""
    stream = llm.generate(prompt, **SAMPLED, **options)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def fresh(llm: Any, keeps: bool) -> list[int]:
    generated(llm, PROMPT, 9)
    return [-1] * 20 + [*range(8)]


def again(llm: Any, keeps: bool) -> list[int]:
    """The prompt's last token is evaluated once more, for its logits."""
    return fresh(llm, keeps) + fresh(llm, keeps)[19:]


def with_a_prefix(llm: Any, keeps: bool) -> list[int]:
    before = fresh(llm, keeps)
    generated(llm, PROMPT[:12] + text(6, seed=1), 4)
    return before + [-1] * 6 + [0, 1, 2]


def in_turns(llm: Any, keeps: bool) -> list[int]:
    """The reply comes back as prompt: what was computed of it holds where a prompt is steered alike."""
    reply = generated(llm, PROMPT, 9)
    second = generated(llm, [*PROMPT, *reply, *text(5, seed=2)], 5)
    third = [*PROMPT, *reply, *text(5, seed=2), *second, *text(3, seed=3)]
    generated(llm, third, 3)
    new = [1 + 5, 1 + 3] if keeps else [9 + 5, 5 + 3]
    return [-1] * 20 + [*range(8)] + [-1] * new[0] + [*range(4)] + [-1] * new[1] + [0, 1]


def in_two_batches(llm: Any, keeps: bool) -> list[int]:
    """Of which the second has a single token of the prompt."""
    generated(llm, text(33), 4)
    return [-1] * 33 + [0, 1, 2]


def after_a_capture_as_long(llm: Any, keeps: bool) -> list[int]:
    llm._mien.capture(text(33, seed=1), [LAYER], 1)
    return [-1] * 33 + in_two_batches(llm, keeps)


def without_a_reset(llm: Any, keeps: bool) -> list[int]:
    generated(llm, PROMPT, 4)
    generated(llm, text(3, seed=1), 4, reset=False)
    return [-1] * 20 + [0, 1, 2] + [-1] * 3 + [0, 1, 2]


def by_eval(llm: Any, keeps: bool) -> list[int]:
    llm.eval(text(33))
    for token in text(8, seed=1):
        llm.eval([token])
    return [-1] * 33 + [*range(8)]


def completed(llm: Any, keeps: bool) -> list[int]:
    usage = llm.create_completion(PROMPT, max_tokens=9, temperature=2.0)["usage"]
    return [-1] * usage["prompt_tokens"] + [*range(usage["completion_tokens"] - 1)]


def shifted(llm: Any, keeps: bool) -> list[int]:
    """The context is full: a part of the prompt and of the reply is taken out, and it goes on."""
    llm.eval(PROMPT)
    for token in text(8, seed=1):
        llm.eval([token])
    llm._ctx.kv_cache_seq_rm(0, 3, 25)
    llm._ctx.kv_cache_seq_shift(0, 25, -1, -22)
    llm.n_tokens -= 22
    for token in text(4, seed=2):
        llm.eval([token])
    return [-1] * 20 + [*range(12)]


def taken_back(llm: Any, keeps: bool) -> list[int]:
    llm.eval(PROMPT)
    for token in text(8, seed=1):
        llm.eval([token])
    llm.n_tokens -= 5
    for token in text(4, seed=2):
        llm.eval([token])
    return [-1] * 20 + [*range(8)] + [3, 4, 5, 6]


def loaded(llm: Any, keeps: bool) -> list[int]:
    """A state that was saved in a reply goes on, although another text was evaluated meanwhile."""
    llm.eval(PROMPT)
    for token in text(5, seed=1):
        llm.eval([token])
    state = llm.save_state()
    llm.eval(text(30, seed=4))  # given without a reset
    for token in text(2, seed=1):
        llm.eval([token])
    llm.load_state(state)
    for token in text(4, seed=2):
        llm.eval([token])
    return [-1] * 20 + [*range(5)] + [-1] * 30 + [0, 1] + [5, 6, 7, 8]


def from_a_cache(llm: Any, keeps: bool) -> list[int]:
    """A state as a prompt's prefix: then all that it holds is given."""
    generated(llm, PROMPT, 4)
    state = llm.save_state()
    llm.reset()
    generated(llm, text(7, seed=5), 3)
    llm.load_state(state)
    generated(llm, [*PROMPT, *text(4, seed=1)], 4)
    return [-1] * 20 + [0, 1, 2] + [-1] * 7 + [0, 1] + [-1] * 4 + [0, 1, 2]


SCENES = [
    fresh,
    again,
    with_a_prefix,
    in_turns,
    in_two_batches,
    after_a_capture_as_long,
    without_a_reset,
    by_eval,
    completed,
    shifted,
    taken_back,
    loaded,
    from_a_cache,
]
by_scene = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)


def watched(llm: Any, recipe: str, **options: Any) -> tuple[Program, list[Token]]:
    """Attach, and watch what acts and what its gates read."""
    steering = attach(llm, recipe, **options)
    seen: list[Token] = []
    steering.watch("a", "g", on_token=seen.append)
    return steering.compile(recipe), seen


def shares_of(seen: Sequence[Token]) -> list[float]:
    return [token.after["a"] - token.before["a"] for token in seen]


def reuses(program: Program) -> bool:
    """Whether what was computed of a reply is what would be computed of it as a prompt."""
    return program.prompt is program.response and not program.prompt.counts


@by_scene
@pytest.mark.parametrize(
    "recipe",
    [
        "a",
        'a(when="prompt")',
        'a(when="response")',
        "a(start=2, stop=5)",
        "a(ramp=4)",
        "a(decay=3)",
        "a(start=1, stop=7, ramp=3, decay=2)",
    ],
)
def test_windows_act_on_their_tokens(
    tiny: Callable[..., Any], recipe: str, scene: Callable[[Any, bool], list[int]]
) -> None:
    llm = tiny(n_ubatch=7)
    program, seen = watched(llm, recipe)
    expected = scene(llm, reuses(program))
    assert [token.reply for token in seen] == expected
    prompt, response = program.prompt.doses, program.response.doses
    shares = [
        float(bool(prompt)) if reply < 0 else response[0].window.at(reply) if response else 0.0
        for reply in expected
    ]
    np.testing.assert_allclose(shares_of(seen), shares, rtol=0, atol=2e-6)
    assert {token.sequence for token in seen} == {0}


GATES = [
    "gate(a, on=g, above=-0.5)",
    "gate(a, on=g, above=-0.5, hysteresis=0.4)",
    "gate(a, on=g, below=-0.5, hysteresis=0.4)",
    "gate(a, on=g, above=-0.5, latch=True)",
    'gate(a(when="response"), on=g, above=-0.5, hysteresis=0.4)',
    "gate(a(start=2), on=g, above=-0.5, hysteresis=0.4)",
]


@by_scene
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recipe", GATES)
def test_gates_open_on_their_tokens(
    tiny: Callable[..., Any], path: str, recipe: str, scene: Callable[[Any, bool], list[int]]
) -> None:
    llm = tiny(n_ubatch=7)
    program, seen = watched(llm, recipe, path=path)
    expected = scene(llm, reuses(program))
    assert [token.reply for token in seen] == expected
    dose = program.response.doses[0]
    opened = opened_by(dose, seen, anew={len(expected) - 4} if scene is loaded else set())
    for token, share, is_open in zip(seen, shares_of(seen), opened):
        acts = is_open and (dose.window.at(token.reply) > 0 if token.reply >= 0 else program.prompt.doses)
        assert share == pytest.approx(float(bool(acts)), abs=2e-6)
    assert len(set(opened)) == 2, "the gate never changed, so this means little"


def test_gates_begin_anew_where_a_state_is_loaded(tiny: Callable[..., Any]) -> None:
    """What they remember is of the text that was evaluated meanwhile."""
    llm = tiny()
    llm.eval(PROMPT)
    state = llm.save_state()  # before attaching, and so all of it given
    steering = attach(llm)
    seen: list[Token] = []
    steering.watch("a", "g", on_token=seen.append)
    for token in text(8, seed=1):
        llm.eval([token])
    least, most = min(token.before["g"] for token in seen), max(token.before["g"] for token in seen)
    steering.set(f"gate(a, on=g, above={(least + most) / 2}, latch=True)")
    llm.load_state(state)
    for token in text(8, seed=1):
        llm.eval([token])
    halfway = llm.save_state()
    assert shares_of(seen)[-1] == pytest.approx(1, abs=2e-6)  # it has opened, and stays so
    lowest = text(8, seed=1)[[token.before["g"] for token in seen[:8]].index(least)]
    llm.load_state(halfway)
    llm.eval([lowest])
    assert seen[-1].reply == 8
    assert shares_of(seen)[-1] == float(seen[-1].before["g"] > (least + most) / 2)


def opened_by(dose: Dose, seen: Sequence[Token], anew: set[int]) -> list[bool]:
    """Whether the dose's gate must be open on each token. anew: the tokens before which it forgot all."""
    gate, remembered, found = dose.gates[0], {-1: False}, []
    for i, token in enumerate(seen):
        if i in anew:
            remembered = {}
        before = remembered.get(token.reply - 1, False)
        value = np.array([token.before["g"]])
        found.append(bool(reference.is_open(gate, value, [token.reply], before)[0]))
        if token.reply >= 0:
            remembered[token.reply] = found[-1]
    return found


# ---- tokens that are drafted, and given up ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recipe", [*GATES, "a(start=3, stop=12)", "a(ramp=9)"])
@pytest.mark.parametrize("sampling", [SAMPLED, {"temp": 0.0}], ids=["sampled", "greedy"])
def test_drafts_that_are_given_up_leave_nothing_behind(
    tiny: Callable[..., Any], path: str, recipe: str, sampling: dict[str, Any]
) -> None:
    """Each token's last evaluation is as in a run that drafts nothing."""
    prompt, count = text(6) * 4, 16
    found = []
    for draft_model in (None, LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=4)):
        llm = tiny(draft_model=draft_model, n_ubatch=3, logits_all=True)
        program, seen = watched(llm, recipe, path=path)
        stream = llm.generate(prompt, **sampling)
        tokens = [next(stream) for _ in range(count)]
        stream.close()
        last = {token.reply: share for token, share in zip(seen, shares_of(seen))}
        found.append((tokens, [last[reply] for reply in range(-1, count - 1)]))
        if program.response.doses[0].gates:
            opened = dict(zip((t.reply for t in seen), opened_by(program.response.doses[0], seen, set())))
            start = program.response.doses[0].window.start
            for reply in range(count - 1):
                assert last[reply] == pytest.approx(float(opened[reply] and reply >= start), abs=2e-6)
    given_up = len(seen) - len(prompt) - count
    assert given_up > 0, "no draft was given up, so this means little"
    assert found[1][0] == found[0][0]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=0, atol=1e-5)


# ---- windows by turn ----


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        ("a(turn=2)", {1: (0, 0), 2: (1, 1), 3: (0, 0)}),
        ("a(turn=(2, None))", {1: (0, 0), 2: (1, 1), 3: (1, 1)}),
        ("a + a(turn=(1, 2))", {1: (2, 2), 2: (2, 2), 3: (1, 1)}),
        ('a(turn=2, when="response")', {1: (0, 0), 2: (0, 1), 3: (0, 0)}),
        ('a(turn=3, when="response") - a(turn=1)', {1: (-1, -1), 2: (0, 0), 3: (0, 1)}),
    ],
)
def test_windows_by_turn_go_by_the_turn_that_is_set(
    tiny: Callable[..., Any], recipe: str, shares: dict[int, tuple[int, int]]
) -> None:
    llm = tiny()
    steering = attach(llm, recipe)
    seen: list[Token] = []
    steering.watch("a", on_token=seen.append)
    for turn in (1, 2, 3, 2, 1):
        seen.clear()
        steering.turn = turn
        generated(llm, PROMPT, 3)
        expected = [shares[turn][token.reply >= 0] for token in seen]
        np.testing.assert_allclose(shares_of(seen), expected, rtol=0, atol=4e-6)
        assert sum(token.reply >= 0 for token in seen) == 2
        assert str(steering.recipe) == str(mien.parse(recipe))
    steering.set("a(turn=2)")  # the turn stays
    seen.clear()
    generated(llm, text(5, seed=1), 2)
    np.testing.assert_allclose(shares_of(seen), 0, atol=2e-6)
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        steering.turn = 0
    assert steering.turn == 1


@pytest.mark.model
def test_windows_by_turn_go_by_the_messages_of_a_chat(load: Callable[..., Any]) -> None:
    llm = load(n_threads=1)
    rows = 0.05 * np.random.default_rng(0).standard_normal((1, 576))
    steering = mien.attach(llm, registry=DictRegistry(Vector("a", (10,), rows.astype(np.float32))))
    steering.set("a(turn=2) + a(turn=(3, None), start=1)")
    seen: list[Token] = []
    steering.watch("a", on_token=seen.append)
    one = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    for turn in (1, 2, 3, 1):
        seen.clear()
        messages = [{"role": "system", "content": "Be brief."}, *one * (turn - 1), one[0]]
        llm.create_chat_completion(messages, max_tokens=4, temperature=0.0)
        assert steering.turn == turn
        expected = [float(turn == 2 or (turn == 3 and token.reply >= 1)) for token in seen]
        np.testing.assert_allclose(shares_of(seen), expected, rtol=0, atol=1e-4)
        assert seen[-1].reply > 0


# ---- programs that are swapped meanwhile ----


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("path", PATHS)
def test_ten_thousand_swaps_while_it_generates(tiny: Callable[..., Any], path: str) -> None:
    """Each evaluation is under one program, in all of its micro-batches and at all of its sites.

    The programs act in the last block alone, so that what is cached is the same under each.
    """
    llm = tiny(n_ubatch=5, logits_all=True)
    recipes = ["last", "2*heads - 3*last + attention", "ablate(last) + mlp", ""]
    sites = [
        Vector(site, (3,), make_vector(site, 9, (3,)).rows.repeat(width, 1), site=site)
        for site, width in (("heads", 2), ("attention", 1), ("mlp", 1))
    ]
    steering = mien.attach(llm, path=path, registry=DictRegistry(*REGISTRY.vectors.values(), *sites))
    programs = [steering.compile(recipe) for recipe in recipes]
    parts = [text(11, seed=i) if i % 4 == 0 else text(1, seed=i) for i in range(12)]

    def logits(part: list[int], llm: Any = llm) -> bytes:
        llm.eval(part)
        return bytes(llm.scores[llm.n_tokens - len(part) : llm.n_tokens].tobytes())

    allowed = []
    for program in programs:
        steering.set(program)
        llm.reset()
        allowed.append([logits(part) for part in parts])
    assert all(len(set(each)) == len(programs) for each in zip(*allowed))
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        for swaps in range(10_000):
            steering.set(programs[swaps % len(programs)])

    thread = threading.Thread(target=swap)
    thread.start()
    met = set()
    while thread.is_alive():
        llm.reset()
        for i, part in enumerate(parts):
            met.add([each[i] for each in allowed].index(logits(part)))
    thread.join()
    assert swaps == 9_999
    assert len(met) > 1, "no swap was met, so this means little"


# ---- readouts ----


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"n_ubatch": 7}, {"n_threads": 2}], ids=str)
def test_readouts_are_the_reference_on_captured_rows(
    tiny: Callable[..., Any], path: str, options: dict[str, int]
) -> None:
    llm = tiny(**options)
    steering = attach(llm, path=path)
    tokens, names = text(40), ["deep", "centred", "a"]
    plain = steering.capture(tokens, layers=[1, 2, 3], last=40)
    steering.set("deep + ablate(b)")
    watch = steering.watch(*names)
    rows = steering.capture(tokens, layers=[1, 2, 3], last=40)
    assert len(watch) == 40
    assert watch.layers == (1, 2, 3)
    for name in names:
        vector = REGISTRY.vectors[name]
        before, after = (watch.by_layer(name, after=after, prompt=True) for after in (False, True))
        assert before.shape == after.shape == (40, 3)
        for i, layer in enumerate(watch.layers):
            if layer not in vector.layers:
                assert np.isnan(before[:, i]).all()
                assert np.isnan(after[:, i]).all()
                continue
            expected = reference.readout(rows[i], vector, layer)
            np.testing.assert_allclose(after[:, i], expected, rtol=1e-6, atol=1e-6)
            if layer == 1:
                expected = reference.readout(plain[i], vector, layer)
                np.testing.assert_allclose(before[:, i], expected, rtol=1e-6, atol=1e-6)
    moved = watch.by_layer("deep", prompt=True) - watch.by_layer("deep", after=False, prompt=True)
    np.testing.assert_allclose(moved[:, [0, 2]], 1, atol=2e-6)  # where nothing else acts
    # over all layers: the coordinate along the whole vector
    whole = REGISTRY.vectors["deep"].rows.astype(np.float64)
    expected = np.einsum("ltd,ld->t", rows.astype(np.float64), whole) / (whole**2).sum()
    np.testing.assert_allclose(watch.series("deep", prompt=True), expected, rtol=1e-6, atol=1e-6)
    of_one = watch.series("a", prompt=True)
    np.testing.assert_allclose(of_one, watch.by_layer("a", prompt=True)[:, 1], rtol=1e-12)
    assert watch.series("deep").shape == (0,)  # no reply


def test_the_last_block_is_read_where_it_has_logits(tiny: Callable[..., Any]) -> None:
    llm = tiny(n_ubatch=7)
    steering = attach(llm)
    watch = steering.watch("deep", "last")
    llm.eval(PROMPT)
    llm.eval(PROMPT[:1])
    there = ~np.isnan(watch.by_layer("last", prompt=True)[:, 2])
    assert np.flatnonzero(there).tolist() == [19, 20]
    assert not np.isnan(watch.by_layer("deep", prompt=True)[:, :2]).any()
    series = watch.series("last", prompt=True)
    assert np.flatnonzero(~np.isnan(series)).tolist() == [19, 20]
    assert watch.last.after["last"] == series[-1] == watch.series("last")[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recipe", ["", "deep + gate(b, on=g, above=0, hysteresis=1)", "a(start=1)"])
def test_watching_changes_no_bit(tiny: Callable[..., Any], path: str, recipe: str) -> None:
    found = []
    for names in ([], ["deep", "g"], []):
        llm = tiny(n_ubatch=7)
        steering = attach(llm, recipe, path=path)
        if names:
            steering.watch(*names)
        logits = []
        llm.eval(PROMPT)
        logits.append(logits_of(llm))
        for token in text(5, seed=1):
            llm.eval([token])
            logits.append(logits_of(llm))
        found.append(np.stack(logits))
        done = {layer: (at.rows, at.shift) for layer, at in steering.applied.layers.items()}
        found.append(np.array([sum(rows for rows, _ in done.values())], dtype=np.float32))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])
    assert np.array_equal(found[0], found[4])


def test_a_watch_is_stopped_cleared_and_replaced(tiny: Callable[..., Any]) -> None:
    llm = tiny()
    steering = attach(llm, "a")
    seen: list[Token] = []
    with pytest.raises(IndexError):
        _ = steering.watch("a").last
    first = steering.watch("a", on_token=seen.append)
    llm.eval(PROMPT)
    llm.eval(PROMPT[:1])
    assert [token.reply for token in seen] == [-1] * 20 + [0]
    assert first.last == seen[-1]
    first.clear()
    assert len(first) == 0
    llm.eval(PROMPT[:1])
    assert (len(first), first.last.reply, first.last.sequence) == (1, 1, 0)
    second = steering.watch("b")
    llm.eval(PROMPT[:1])
    assert (len(first), len(second), len(seen)) == (1, 1, 22)
    assert second.names == ("b",)
    second.stop()
    second.stop()
    llm.eval(PROMPT[:1])
    assert len(second) == 1
    with steering.watch("a", "b") as third:
        llm.eval(PROMPT[:1])
    llm.eval(PROMPT[:1])
    assert len(third) == 1
    assert set(third.last.after) == {"a", "b"}
    assert sorted(steering.applied.layers) == [LAYER]


def test_an_older_watch_that_is_stopped_late_stops_nothing_of_the_newer(tiny: Callable[..., Any]) -> None:
    llm = tiny()
    steering = attach(llm)
    first, second = steering.watch("a"), steering.watch("a")
    first.stop()
    llm.eval(PROMPT)
    assert (len(first), len(second)) == (0, 20)


def test_a_watch_can_be_stopped_or_cleared_from_its_own_callback(tiny: Callable[..., Any]) -> None:
    llm = tiny()
    steering = attach(llm)
    watch = steering.watch("a", on_token=lambda token: watch.stop())
    llm.eval(PROMPT)
    llm.eval(PROMPT)
    assert len(watch) == 20
    seen: list[Token] = []

    def clear(token: Token) -> None:
        seen.append(token)
        watch.clear()

    watch = steering.watch("a", on_token=clear)
    llm.eval(PROMPT)
    assert (len(watch), len(seen)) == (0, 20)


def test_only_the_newest_tokens_are_kept(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mien.watch.KEPT", 10)
    llm = tiny()
    steering = attach(llm)
    seen: list[Token] = []
    watch = steering.watch("a", on_token=seen.append)
    llm.eval(PROMPT)
    assert len(watch) == 20  # a pass is kept or dropped as a whole
    for token in text(14, seed=1):
        llm.eval([token])
    assert len(watch) == 10
    assert watch.series("a").tolist() == [token.after["a"] for token in seen[-10:]]


def test_what_can_not_be_watched_is_said_and_the_watch_stays(tiny: Callable[..., Any]) -> None:
    llm = tiny()
    steering = attach(llm)
    watch = steering.watch("a")
    with pytest.raises(mien.VectorError, match="at least one vector"):
        steering.watch()
    with pytest.raises(mien.NameNotFound, match="joyful"):
        steering.watch("a", "joyful")
    with pytest.raises(mien.VectorError, match="plane: one direction a layer"):
        steering.watch("a", "plane")
    with pytest.raises(mien.ModelMismatch, match="up to layer 9"):
        steering.watch(make_vector("far", 1, (9,)))
    llm.eval(PROMPT)
    assert len(watch) == 20
    with pytest.raises(mien.NameNotFound, match="no watched vector named 'b'"):
        watch.series("b")


def test_a_decode_that_fails_is_not_read(tiny: Callable[..., Any]) -> None:
    llm = tiny()
    steering = attach(llm)
    watch = steering.watch("a")
    llm.eval(PROMPT)
    llm._batch.set_batch(batch=[5, 6], n_past=3, logits_all=False)  # not consecutive
    with pytest.raises(RuntimeError, match="llama_decode returned"):
        llm._ctx.decode(llm._batch)
    assert len(watch) == 20


# ---- readouts of several sequences ----


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contexts]:
    contexts = Contexts(build("llama", tmp_path_factory.mktemp("quantised"), quantised=True).gguf)
    yield contexts
    contexts.close()


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [5, 256])
def test_the_readouts_of_several_sequences_are_told_apart(
    contexts: Contexts, unified: bool, n_ubatch: int
) -> None:
    """Each has those that it has alone, to the bit; whichever way the batch was cut."""
    recipes = ["a(start=1)", None, "gate(b, on=g, above=0, hysteresis=1)"]
    lengths = {2: 9, 0: 4, 1: 7}
    together = contexts.make(3, unified=unified, n_ubatch=n_ubatch)
    steering = mien.attach(together, registry=REGISTRY)
    steering.set(recipes)
    plain = evaluate_everything(together, steering, lengths)
    clear(together)
    watch = steering.watch("a", "g", "deep")
    assert differing(evaluate_everything(together, steering, lengths), plain) == []
    assert len(watch) == sum(lengths.values()) + 3 * 4
    for sequence, length in lengths.items():
        alone = contexts.make()
        its = mien.attach(alone, registry=REGISTRY)
        its.set(recipes[sequence])
        expected = its.watch("a", "g", "deep")
        rows = [Row(token, i) for i, token in enumerate(text(length + 4, seed=sequence))]
        evaluate_all(alone, its.decode, [rows[:length], *([row] for row in rows[length:])])
        for name in watch.names:
            for after in (True, False):
                for prompt, count in ((True, length + 4), (False, 4)):
                    found = watch.by_layer(name, after=after, sequence=sequence, prompt=prompt)
                    assert found.shape == (count, 3)
                    ours = expected.by_layer(name, after=after, prompt=prompt)
                    np.testing.assert_array_equal(found, ours)
    assert watch.series("a", sequence=None, prompt=True).shape == (len(watch),)
    assert watch.last.sequence == 1
    contexts.free_all()


def evaluate_everything(context: Any, steering: Steering, lengths: dict[int, int]) -> Any:
    """The prompts in one batch, token by token of each in turn; then four batches of their replies."""
    texts = {s: text(length + 4, seed=s) for s, length in lengths.items()}
    first = [
        Row(texts[s][i], i, (s,)) for i in range(max(lengths.values())) for s in lengths if i < lengths[s]
    ]
    batches = [[Row(texts[s][n + i], n + i, (s,)) for s, n in lengths.items()] for i in range(4)]
    return evaluate_all(context, steering.decode, [first, *batches])


def test_a_direct_decode_is_not_read(contexts: Contexts) -> None:
    context = contexts.make()
    steering = mien.attach(context, registry=REGISTRY)
    watch = steering.watch("a")
    evaluate(context, None, [Row(5, 0)])
    assert len(watch) == 0
    evaluate(context, steering.decode, [Row(5, 1)])
    assert (len(watch), watch.last.reply) == (1, 0)
    steering.detach()
    evaluate(context, None, [Row(5, 2)])
    assert len(watch) == 1
    assert api.llama_memory_seq_pos_max(api.llama_get_memory(context), 0) == 2
    contexts.free_all()
