"""Contrast texts, extraction, calibration and whole packs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mien
import numpy as np
import pytest
import torch
from mien import calibration, contrast, reference
from mien.calibration import BUDGETS, Budget, Calibration, Dose, Poles, bake, calibrate, measure
from mien.contrast import Sample
from mien.corpus import Corpus, Pair
from mien.errors import MienError
from mien.evaluation import Evaluator, Text, evaluator
from mien.extraction import extract, extract_group, held_out_accuracy, read_states, stream_norms
from mien.making import TRAIT_ROUNDS, Maker, Settings
from mien.methods import METHODS
from mien.pack import Pack
from mien.program import NOTHING
from mien.runtimes.fake import NumpyModel
from mien.runtimes.llama_text import chat_tokens
from mien.training import Example, train
from mien.vector import Vector
from transformers import LlamaConfig, LlamaForCausalLM

# ---- texts ----


def test_lines_leave_out_comments_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("# a comment\n\n  one => two \n#\nthree\n", encoding="utf-8")
    assert contrast.read_lines(path) == ["one => two", "three"]


@pytest.mark.parametrize(
    ("data", "words"), [(b"# only\n\n", "no text"), (b"\xff\xfe", "UTF-8"), (None, "can't")]
)
def test_a_file_without_texts_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "texts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(MienError, match=words):
        contrast.read_lines(path)


def test_templates_multiply() -> None:
    found = contrast.samples(["happy", "glad"], ["Be {}. => I", "Now {}"])
    assert found == [
        Sample("Be happy.", "I"),
        Sample("Now happy"),
        Sample("Be glad.", "I"),
        Sample("Now glad"),
    ]


@pytest.mark.parametrize("pattern", ["no place", "{} and {}"])
def test_a_template_needs_one_place(pattern: str) -> None:
    with pytest.raises(MienError, match="exactly one"):
        contrast.samples(["x"], [pattern])


def test_the_digest_tells_groups_and_openings_apart() -> None:
    a, b = Sample("a", "b"), Sample("ab", "")
    digests = {
        contrast.digest([a], [b]),
        contrast.digest([a, b]),
        contrast.digest([b], [a]),
        contrast.digest([Sample("a b")], [b]),
    }
    assert len(digests) == 4


# ---- extraction ----


@pytest.mark.model
def test_a_direction_is_the_difference_of_means_at_the_same_block(load: Callable[..., Any]) -> None:
    positive, negative = ["Be glad. => I", "Be merry. => We"], ["Be sad. => I"]
    llm = load()
    vector = extract(llm, "glad", positive, negative, meta={"kind": "emotion"})
    assert vector.layers == tuple(range(1, 30))
    with mien.attach(llm) as steering:
        states = []
        for line in (*positive, *negative):
            sample = Sample.parse(line)
            tokens = chat_tokens(llm, [{"role": "user", "content": sample.user}], sample.opening)
            states.append(steering.capture(tokens)[:, 0].astype(np.float64))
    expected = (states[0] + states[1]) / 2 - states[2]
    for layer, row in vector.directions.items():
        # Quantised products round otherwise in another batch; the block next to it is off by a quarter.
        assert np.linalg.norm(row - expected[layer]) < 0.1 * np.linalg.norm(row)
    # The middle of the two means reads as zero, and they as a half and minus a half.
    sides = {
        -0.5: states[2],
        0.5: (states[0] + states[1]) / 2,
        0.0: (states[0] + states[1]) / 4 + states[2] / 2,
    }
    for layer in vector.layers:
        for readout, side in sides.items():
            found = reference.readout(side[None, layer].astype(np.float32), vector, layer)
            assert found[0] == pytest.approx(readout, abs=0.03)
    assert vector.meta["samples"] == [2, 1]
    assert vector.meta["kind"] == "emotion"
    assert type(llm).__name__ == "Llama"  # detached again


@pytest.mark.model
def test_members_of_a_group_add_up_to_nothing(load: Callable[..., Any]) -> None:
    groups = {"a": ["Be glad. => I"], "b": ["Be sad. => I"], "c": ["Be cross. => I"]}
    vectors = extract_group(load(), groups, layers=[5, 20])
    total = vectors["a"] + vectors["b"] + vectors["c"]
    assert total.norm() < 1e-4 * vectors["a"].norm()
    assert sum(vector.readouts[0, 0] @ vector.rows[0] for vector in vectors.values()) == pytest.approx(3)
    means = [vector._means() for vector in vectors.values()]  # of one centre, whose parts add up to nothing
    assert np.abs(np.sum(means, axis=0)).max() < 1e-4 * np.abs(means).max()
    strength = vectors["a"].meta["strength"]
    norms = vectors["a"].meta["stream_norm"]
    assert isinstance(strength, list)
    assert isinstance(norms, list)
    for row, s, n in zip(vectors["a"].rows, strength, norms, strict=True):
        assert s == pytest.approx(float(np.linalg.norm(row)) / float(n), rel=1e-5)


@pytest.mark.model
def test_the_stream_norm_leaves_the_first_token_out(load: Callable[..., Any]) -> None:
    """The first token's norm is an outlier by a factor of a hundred at this block."""
    llm = load()
    tokens = llm.tokenize(b"The harbour was quiet when the boats came in.")
    with closing(evaluator(llm)) as many:
        ((_, states),) = many.capture([Text(tuple(tokens), 0)], [15])
        norms = np.linalg.norm(states[0].astype(np.float64), axis=1)
        assert norms[0] > 20 * np.median(norms)
        assert stream_norms(many, [Text(tuple(tokens), 3)], [15])[0] == pytest.approx(np.median(norms[1:]))


# On the NumPy model, whose texts are words: what one side says differs from what the other says by a word.
ASKS = [
    f"question {k} about {thing}" for k, thing in enumerate(("sea", "sky", "tree", "wall", "lamp", "door"))
]
GLAD = [f"{ask} => glad indeed {ask}" for ask in ASKS]
GRIM = [f"{ask} => grim indeed {ask}" for ask in ASKS]


@pytest.fixture
def numpy_model() -> NumpyModel:
    return NumpyModel(n_layer=4, n_embd=16, n_vocab=64)


@pytest.fixture
def many(numpy_model: NumpyModel) -> Iterator[Evaluator]:
    with closing(evaluator(numpy_model)) as found:
        yield found


@pytest.mark.parametrize("read", ["last", "mean", "every"])
def test_what_is_read_of_a_text(many: Evaluator, read: str) -> None:
    vector = extract(many, "glad", GLAD, GRIM, read=read)
    assert vector.layers == (1, 2, 3)
    texts = [
        many.text([{"role": "user", "content": s.user}], s.opening) for s in map(Sample.parse, GLAD + GRIM)
    ]
    rows = [states.astype(np.float64) for _, states in many.capture(texts, vector.layers)]
    if read == "every":
        up, down = (np.concatenate(part, axis=1) for part in (rows[:6], rows[6:]))
    else:
        each = [r[:, -1:] if read == "last" else r.mean(axis=1, keepdims=True) for r in rows]
        up, down = (np.concatenate(part, axis=1) for part in (each[:6], each[6:]))
    expected = up.mean(axis=1) - down.mean(axis=1)
    np.testing.assert_allclose(np.stack(list(vector.directions.values())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_vector_that_tells_the_sides(many: Evaluator, method: str) -> None:
    vector = extract(many, "glad", GLAD, GRIM, method=method, read="mean")
    again = extract(many, "glad", GLAD, GRIM, method=method, read="mean")
    assert vector.digest == again.digest
    assert vector.meta == again.meta
    accuracy = vector.meta["accuracy"]
    assert isinstance(accuracy, list)
    assert max(float(a) for a in accuracy) > 0.7  # the questions differ as much as the sides
    assert ("bias" in vector.meta) == (method in ("logistic", "lda"))


def test_accuracy_is_of_scenarios_that_were_left_out(many: Evaluator) -> None:
    """Sides that differ by which scenario got which word are told apart where seen, not where new."""
    swap = [(glad, grim) if k % 2 else (grim, glad) for k, (glad, grim) in enumerate(zip(GLAD, GRIM))]
    sides = {
        "positive": [Sample.parse(a) for a, _ in swap],
        "negative": [Sample.parse(b) for _, b in swap],
    }
    reading = read_states(many, sides, read="mean")
    assert max(held_out_accuracy(reading, "positive", "mean")) < 0.6
    sides = {"positive": list(map(Sample.parse, GLAD)), "negative": list(map(Sample.parse, GRIM))}
    assert max(held_out_accuracy(read_states(many, sides, read="mean"), "positive", "mean")) > 0.8
    alone = {name: samples[:1] for name, samples in sides.items()}
    assert held_out_accuracy(read_states(many, alone, read="mean"), "positive", "mean") == []


@pytest.mark.parametrize(
    ("positive", "negative", "options", "words"),
    [
        ([], GRIM, {}, "at least one text"),
        (GLAD, [], {}, "at least one text"),
        (GLAD + GLAD[:1], GRIM, {}, "stands there twice"),
        (GLAD, GRIM + GLAD[2:3], {}, "said both by positive and by negative"),
        (GLAD, GRIM, {"method": "guess"}, "expected one of mean, pca_diff"),
        (GLAD, GRIM, {"read": "first"}, "expected one of last, mean, every"),
        (GLAD, GRIM[:2], {"method": "pca_diff"}, "as many positive"),
        (["only a question"], GRIM, {"read": "mean"}, "needs a reply"),
        (GLAD, GRIM, {"layers": [9]}, "some of 1 to 3"),
    ],
)
def test_contrasts_that_say_nothing(
    many: Evaluator, positive: list[str], negative: list[str], options: Any, words: str
) -> None:
    with pytest.raises(MienError, match=words):
        extract(many, "x", positive, negative, **options)


def test_a_group_has_no_pairs(many: Evaluator) -> None:
    with pytest.raises(MienError, match="takes pairs"):
        extract_group(many, {"a": GLAD, "b": GRIM}, method="pca_center")


@pytest.mark.model
@pytest.mark.parametrize(
    ("positive", "negative", "options", "words"),
    [
        ([], ["x"], {}, "at least one text"),
        (["x"], ["y"], {"layers": [0, 1]}, "expected some of 1 to 29"),
        (["x"], ["y"], {"layers": []}, "got none"),
        (["word " * 400], ["y"], {}, "expected at most"),
    ],
)
def test_what_can_not_be_extracted(
    load: Callable[..., Any], positive: list[str], negative: list[str], options: Any, words: str
) -> None:
    llm = load()
    with pytest.raises(MienError, match=words):
        extract(llm, "x", positive, negative, **options)
    assert type(llm).__name__ == "Llama"


@pytest.mark.model
def test_a_group_needs_two(load: Callable[..., Any]) -> None:
    with pytest.raises(MienError, match="at least two"):
        extract_group(load(), {"a": ["x"]})


# ---- doses ----


def test_all_measures_have_a_say() -> None:
    plain = Dose(0.0, 5.0, 10.0, 0.02, 1.0)
    budget = Budget(perplexity=2.5, perplexity_alone=1.5, repetition=0.1)
    assert budget.holds(Dose(1.0, 12.4, 14.9, 0.11, 1.0), plain)
    assert not budget.holds(Dose(1.0, 12.6, 9.0, 0.02, 1.0), plain)
    assert not budget.holds(Dose(1.0, 12.4, 15.1, 0.02, 1.0), plain)  # an answer, and broken text
    assert not budget.holds(Dose(1.0, 2.0, 2.0, 0.13, 1.0), plain)  # repetitive text has a low perplexity


class Scripted:
    """Stands in for `calibration.measure`: what each coefficient was said to cost, and which were asked."""

    def __init__(self, curve: dict[float, tuple[float, float, float]]) -> None:
        self.curve, self.asked = curve, list[float]()

    def __call__(self, many: Any, programs: Any, *_: Any) -> list[Dose]:
        names = [0.0 if program is NOTHING else float(program) for program in programs]
        self.asked += names
        return [Dose(1.0, *self.curve[name], 1.0) for name in names]


class Compiles:
    """Gives the scale of a vector of ones in place of a program."""

    def compile(self, vector: Vector) -> float:
        return round(float(vector.rows[0, 0]), 6)


def some_vector() -> Vector:
    return Vector(
        "v", (1,), np.ones((1, 4), np.float32), model_hint="x", meta={"strength": [0.2], "scale": 1.0}
    )


# Perplexity of answers, of the replies alone, and repetition.
CURVE = {
    0.0: (5.0, 9.0, 0.0),
    0.2: (5.0, 8.0, 0.3),
    0.3: (5.5, 9.0, 0.05),
    0.4: (6.0, 9.0, 0.05),
    0.5: (7.0, 30.0, 0.0),
    0.6: (99.0, 9.0, 0.0),
    0.8: (5.0, 9.0, 0.0),
}


def test_the_dose_is_the_largest_before_a_budget_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(CURVE)
    monkeypatch.setattr(calibration, "measure", scripted)
    monkeypatch.setattr(calibration, "AT_ONCE", 2)
    doses = [0.8, 0.2, 0.4, 0.6, 0.3, 0.5, 1.0]
    found = calibrate(Compiles(), some_vector(), [], coefficients=doses)  # type: ignore[arg-type]
    # 0.2 repeats itself; 0.5 is broken text; 0.8 keeps to the budget again, by chance
    assert found.chosen == 0.4
    assert found.holds
    measured = [dose.coefficient for dose in found.curve]
    assert measured == [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]  # and not beyond
    assert measured == scripted.asked
    assert [dose.perplexity for dose in found.curve] == [CURVE[c][0] for c in measured]


def test_no_fluent_dose_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "measure", Scripted({0.0: (5.0, 9.0, 0.0), 0.2: (50.0, 9.0, 0.0)}))
    with pytest.raises(MienError, match=r"no dose keeps to the budget; already at 0\.2"):
        calibrate(Compiles(), some_vector(), [], coefficients=[0.2])  # type: ignore[arg-type]


def test_where_none_is_fluent_the_least_repetitive_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = {0.0: (5.0, 9, 0.0), 0.2: (6.0, 9, 0.4), 0.4: (7.0, 9, 0.3), 0.6: (99.0, 9, 0.0)}
    monkeypatch.setattr(calibration, "measure", Scripted(curve))
    doses = [0.2, 0.4, 0.6]
    found = calibrate(Compiles(), some_vector(), [], coefficients=doses, strict=False)  # type: ignore[arg-type]
    assert (found.chosen, found.holds) == (0.4, False)


def test_what_is_measured_of_replies(many: Evaluator) -> None:
    prompts = [many.text([{"role": "user", "content": ask}]) for ask in ASKS[:3]]
    vector = extract(many, "glad", GLAD, GRIM)
    program = many.compile(vector)
    (plain, steered) = measure(many, [NOTHING, program], prompts, 8)
    replies = many.generate(prompts, 8, programs=[program] * 3)
    scores = np.concatenate(many.log_probabilities(replies))  # by the unsteered model
    assert steered.perplexity == pytest.approx(math.exp(-scores.mean()))
    alone = [Text(reply.answer, 1) for reply in replies]  # this model wants no beginning of sequence
    scores = np.concatenate(many.log_probabilities(alone))
    assert steered.perplexity_alone == pytest.approx(math.exp(-scores.mean()))
    assert plain != steered
    assert plain.perplexity <= steered.perplexity, "greedy replies are the most probable"


def test_an_effect_is_by_how_much_one_pole_gains(many: Evaluator) -> None:
    def texts(lines: list[str]) -> list[Text]:
        samples = map(Sample.parse, lines)
        return [many.text([{"role": "user", "content": s.user}], s.opening) for s in samples]

    vector = extract(many, "glad", GLAD, GRIM, read="mean")
    poles = Poles(texts(GLAD), texts(GRIM))
    programs = [NOTHING, many.compile(vector), many.compile(-1.0 * vector)]
    effects = poles.effect(many, programs)
    alone = [np.mean(many.log_probabilities([t], programs=[programs[1]])[0]) for t in poles.high + poles.low]
    assert effects[1] == pytest.approx(np.mean(alone[:6]) - np.mean(alone[6:]))
    found = calibrate(
        many, vector, poles.high[:2], poles=poles, coefficients=[0.01, 0.02], budget=Budget(9, 9, 1)
    )
    assert found.curve[0].effect == 0.0
    assert [dose.coefficient for dose in found.curve] == [0.0, 0.01, 0.02]


def test_baking_makes_the_chosen_dose_one() -> None:
    curve = (
        Dose(0.0, 5.0, 8.0, 0.0, 1.0),
        Dose(0.25, 6.0, 8.5, 0.1, 0.9),
        Dose(0.5, 9.0, 9.5, 0.4, 0.8),
    )
    baked = bake(some_vector(), Calibration(curve, 0.25, Budget()))
    assert baked.rows.tolist() == [[0.25] * 4]
    assert baked.meta["scale"] == 0.25
    assert baked.meta["strength"] == [0.05]
    assert baked.meta["calibration.dose"] == [0.0, 1.0, 2.0]
    assert baked.meta["calibration.repetition"] == [0.0, 0.1, 0.4]
    assert baked.meta["calibration.perplexity"] == [5.0, 6.0, 9.0]
    assert baked.meta["calibration.perplexity_alone"] == [8.0, 8.5, 9.5]
    assert baked.meta["calibration.distinct"] == [1.0, 0.9, 0.8]
    assert "calibration.effect" not in baked.meta


@pytest.mark.parametrize("scale", [0.25, -2.0])
def test_baking_keeps_what_is_read_and_decided(scale: float) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)
    meta: dict[str, Any] = {"center": [0.5, -1.0, 3.0, 0.0], "kind": "trait", "samples": 3}
    plane = Vector("v", (0, 1), rows, model_hint="x", meta=meta, site="mlp")
    baked = calibration.bake_scale(plane, scale)
    assert (baked.name, baked.site, baked.rank) == ("v", "mlp", 2)
    assert baked.meta["center"] == [value / scale for value in meta["center"]]
    assert (baked.meta["kind"], baked.meta["samples"], baked.meta["scale"]) == ("trait", 3, scale)
    # The same activations are at zero, and on the probe's plane.
    np.testing.assert_allclose(
        (baked.center[..., None] * baked.spans).sum(1), (plane.center[..., None] * rows).sum(1), rtol=1e-6
    )
    probe = Vector("p", (1,), rows[:1, 0], model_hint="x", meta={"bias": [1.5]})
    assert calibration.bake_scale(probe, scale).meta["bias"] == [1.5 * scale]


def test_baking_nothing_leaves_nothing_to_read() -> None:
    probe = Vector("p", (1,), np.ones((1, 4)), model_hint="x", meta={"bias": [1.5], "center": [2.0]})
    baked = calibration.bake_scale(probe, 0.0)
    assert "center" not in baked.meta
    assert baked.meta["bias"] == [0.0]


@pytest.mark.model
def test_log_probabilities_agree_with_decoding_token_by_token(load: Callable[..., Any]) -> None:
    llm = load(n_batch=64, n_ubatch=64)
    question = chat_tokens(llm, [{"role": "user", "content": "Say hello."}])
    with closing(evaluator(llm)) as many:
        (text,) = many.generate([Text(tuple(question), len(question))], 6)
        (found,) = many.log_probabilities([text])
    reply = text.answer
    llm.reset()
    llm.eval(question)
    for token, expected in zip(reply, found, strict=True):
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).astype(np.float64)
        by_hand = logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert by_hand == pytest.approx(expected, abs=0.15)  # another batch size rounds otherwise
        assert math.exp(expected) <= 1
        llm.eval([token])


# ---- packs ----


def corpus(folder: Path) -> Corpus:
    """Two traits and a group of three, in the words of the NumPy model."""
    from test_corpus import write

    def trait(high: str, low: str) -> str:
        pairs = [
            f'[[pair]]\nsplit = "{split}"\nask = "{split} {k} about {ask}"\n'
            f'high = "{high} indeed {ask}"\nlow = "{low} indeed {ask}"\n'
            for split, count in (("train", 6), ("calibration", 3), ("test", 4))
            for k, ask in enumerate(ASKS[:count])
        ]
        return f'positive = "{high}"\nnegative = "{low}"\n' + "".join(pairs)

    events = [
        f'[[event]]\nsplit = "{split}"\nscenario = "{split}{k}"\n'
        f'text = "{split} {k} told {ask}"\n'
        + "".join(f'{m} = "{m} so {m} {ask}"\n' for m in ("red", "blue", "tan"))
        for split, count in (("train", 5), ("calibration", 3), ("test", 4))
        for k, ask in enumerate(ASKS[:count])
    ]
    members = "".join(f'[{m}]\npositive = "{m}"\n' for m in ("red", "blue", "tan"))
    files = {
        "manner/glad.toml": trait("glad", "grim"),
        "manner/loud.toml": trait("loud", "hush"),
        "tints/group.toml": members,
        "tints/all.toml": "".join(events),
    }
    return Corpus.read(write(folder, files))


def maker(many: Evaluator, data: Corpus, folder: Path, **options: Any) -> Maker:
    settings = Settings("mean", (1, 2), dict.fromkeys(BUDGETS, Budget(50.0, 50.0, 1.0)))
    return Maker(many, data, folder, settings=settings, **options)


KNOWN = {"name": "small", "version": "1.0", "licence": "MIT"}


@pytest.fixture
def data(tmp_path: Path) -> Corpus:
    (tmp_path / "data").mkdir()
    return corpus(tmp_path / "data")


def effect(many: Evaluator, vector: Vector, pairs: Sequence[Pair]) -> float:
    """By how much full dose raises the GAP of given pairs."""
    texts = [
        [many.text([{"role": "user", "content": pair.ask}], reply) for pair, reply in zip(pairs, side)]
        for side in ([pair.high for pair in pairs], [pair.low for pair in pairs])
    ]
    before, after = Poles(*texts).effect(many, [NOTHING, many.compile(vector)])
    return after - before


def test_a_pack_is_made_and_says_what_its_vectors_are_worth(
    many: Evaluator, data: Corpus, tmp_path: Path
) -> None:
    pack = maker(many, data, tmp_path / "pack").make(**KNOWN)
    assert pack.verify() == []
    assert set(pack.entries) == {"glad", "loud", "red", "blue", "tan"}
    for name in pack.entries:
        vector = pack.load(name)
        meta: Any = vector.meta
        assert vector.layers == (1, 2)
        # Its claims, measured again from the file.
        entry = next((t for t in data.traits if t.name == name), None)
        assert meta["data_digest"] == (entry or data.groups[0]).digest
        if entry is not None:
            assert meta["test.effect"] == pytest.approx(effect(many, vector, entry.of("test")), abs=1e-4)
            assert meta["test.effect"] > max(meta["test.random_effect"])
            assert "weak" not in meta
            own = meta["leakage.effect"][meta["leakage.names"].index(name)]
            assert own == pytest.approx(effect(many, vector, entry.of("calibration")), abs=1e-4)
        doses = meta["calibration.dose"]
        assert any(abs(dose - 1) < 1e-6 for dose in doses), "full dose was not measured"
        assert meta["readout.moved"][meta["readout.names"].index(name)] > 0
        assert len(meta["example.reply"]) == len(meta["example.dose"]) == 5


def test_what_is_trained_is_trained_once_and_acts_on_the_reply(
    many: Evaluator, data: Corpus, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    loaded: list[Any] = []

    def trainable() -> Any:
        loaded.append(model)
        return model

    settings = Settings("trained", (1, 2), dict.fromkeys(BUDGETS, Budget(1e9, 1e9, 1.0, 0.0)))
    pack = Maker(many, data, tmp_path, settings=settings, trainable=trainable).make(**KNOWN)
    assert len(loaded) == 1, "the model was loaded for each family"
    examples = [
        Example(trait.name, sign, many.text([{"role": "user", "content": pair.ask}], reply))
        for trait in data.traits
        for pair in trait.of("train")
        for sign, reply in ((1.0, pair.high), (-1.0, pair.low))
    ]
    expected = train(model, examples, [1, 2], rounds=TRAIT_ROUNDS)["glad"]
    for name in pack.entries:
        assert pack.load(name).when == "response"
    glad = pack.load("glad")
    scale: Any = glad.meta["scale"]
    np.testing.assert_allclose(glad.rows / scale, expected, rtol=1e-5)
    again = Maker(many, data, tmp_path, settings=settings, trainable=lambda: pytest.fail("trained again"))
    assert again.make(**KNOWN).load("glad").digest == glad.digest


def test_what_a_vector_shares_with_another_is_taken_out_where_that_helps(
    many: Evaluator, numpy_model: NumpyModel, data: Corpus, tmp_path: Path
) -> None:
    """At the last block a row adds to the logits what it shares with a word's embedding."""

    def toward(word: str, other: str) -> Any:
        up, down = (many.text([{"role": "user", "content": w}], raw=True).tokens[-1] for w in (word, other))
        row = numpy_model.embeddings[up] - numpy_model.embeddings[down]
        return 0.2 * row / float(np.linalg.norm(row))

    glad, loud = toward("glad", "grim"), toward("loud", "hush")
    loud -= (loud @ glad) / (glad @ glad) * glad
    rows = {"glad": glad, "loud": loud + 4 * glad}
    given = {
        name: Vector(name, (3,), row[None], many.fingerprint, meta={"stream_norm": [4.0]})
        for name, row in rows.items()
    }
    vectors = dict(given)
    settings = Settings("mean", (3,), dict.fromkeys(BUDGETS, Budget(50.0, 50.0, 1.0)))
    Maker(many, data, tmp_path, settings=settings)._purify(["glad", "loud"], vectors)
    assert "purified" not in vectors["glad"].meta
    np.testing.assert_array_equal(vectors["glad"].rows, given["glad"].rows)
    meta: Any = vectors["loud"].meta
    before, after = (
        dict(zip(meta["leakage.names"], meta[key], strict=True))
        for key in ("leakage.before", "leakage.effect")
    )
    assert meta["purified"] == meta["leakage.tried"] == "glad"
    assert before["glad"] > 0.5 * before["loud"] > 0
    assert after["loud"] >= 0.9 * before["loud"]
    assert abs(after["glad"]) / after["loud"] <= 0.7 * before["glad"] / before["loud"]
    # What it says is what the vector does, at a dose of its own.
    pairs = data.traits[0].of("calibration")
    assert before["glad"] == pytest.approx(effect(many, given["loud"], pairs), abs=1e-6)
    assert after["glad"] == pytest.approx(effect(many, vectors["loud"], pairs), abs=1e-6)
    assert any(abs(dose - 1) < 1e-6 for dose in meta["calibration.dose"])
    row = vectors["loud"].directions[3]
    assert abs(row @ glad) < 1e-6 * np.linalg.norm(row)


def test_an_interrupted_run_goes_on_and_ends_the_same(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    whole = maker(many, data, tmp_path / "whole").make(**KNOWN)
    begun: list[str] = []

    def stop(stage: str) -> Any:
        begun.append(stage)
        if stage == "testing red":
            raise KeyboardInterrupt
        return lambda done, total: None

    with pytest.raises(KeyboardInterrupt):
        maker(many, data, tmp_path / "parts", stage=stop).make(**KNOWN)
    assert not (tmp_path / "parts" / "pack.toml").exists()
    begun.clear()

    def note(stage: str) -> Any:
        return lambda done, total: begun.append(stage)

    parts = maker(many, data, tmp_path / "parts", stage=note).make(**KNOWN)
    assert not any(stage.startswith("dosing") for stage in begun), "what was done was done again"
    for entry in whole.entries.values():
        assert (whole.path / entry.file).read_bytes() == (parts.path / entry.file).read_bytes()


def changed(folder: Path, name: str, old: str, new: str) -> Corpus:
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Corpus.read(folder)


def again(many: Evaluator, data: Corpus, folder: Path) -> tuple[Pack, set[str]]:
    """The pack, made once more, and the stages for which something was measured."""
    measured = set()

    def note(stage: str) -> Any:
        return lambda done, total: measured.add(stage)

    pack = maker(many, data, folder, stage=note).make(**KNOWN)
    # These two show progress for what was kept as well.
    return pack, {s for s in measured if s != "reading across" and not s.startswith("crossing")}


def test_what_was_made_of_other_data_is_not_taken(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    first = maker(many, data, tmp_path / "pack").make(**KNOWN)
    glad, loud = first.load("glad"), first.load("loud")
    other = changed(tmp_path / "data", "manner/loud.toml", "hush indeed", "hush never")
    second, measured = again(many, other, tmp_path / "pack")
    assert second.load("loud").digest != loud.digest
    assert second.load("loud").meta["data_digest"] == other.traits[1].digest
    assert second.load("glad").digest == glad.digest
    assert measured == {"reading loud", "dosing loud", "testing loud"}


def test_a_comment_measures_nothing_again(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    first = maker(many, data, tmp_path / "pack").make(**KNOWN)
    before = {name: entry.sha256 for name, entry in first.entries.items()}
    path = tmp_path / "data" / "manner" / "glad.toml"
    path.write_text(f"# Glad.\n{path.read_text()}")
    second, measured = again(many, Corpus.read(tmp_path / "data"), tmp_path / "pack")
    assert not measured
    assert {name: entry.sha256 for name, entry in second.entries.items()} == before


def test_another_trait_leaves_the_others_as_they_were(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    first = maker(many, data, tmp_path / "pack").make(**KNOWN)
    shutil.copy(tmp_path / "data" / "manner" / "loud.toml", tmp_path / "data" / "manner" / "slow.toml")
    other = changed(tmp_path / "data", "manner/slow.toml", "hush", "rest")
    second, measured = again(many, other, tmp_path / "pack")
    assert {stage for stage in measured if "purified" not in stage} == {
        "reading slow",
        "dosing slow",
        "testing slow",
    }
    assert set(second.entries) == {*first.entries, "slow"}


def test_a_new_test_text_measures_the_claims_and_no_dose(
    many: Evaluator, data: Corpus, tmp_path: Path
) -> None:
    before = maker(many, data, tmp_path / "pack").make(**KNOWN).load("loud")
    other = changed(tmp_path / "data", "manner/loud.toml", "test 1 about", "test one about")
    second, measured = again(many, other, tmp_path / "pack")
    assert measured == {"reading loud", "testing loud"}
    after = second.load("loud")
    assert after.digest == before.digest
    assert after.meta["test.effect"] != before.meta["test.effect"]


def test_a_vector_that_does_nothing_is_marked_as_weak(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    """Of what it was made from, the test split says the opposite."""
    trait = data.traits[0]
    turned = tuple(replace(p, high=p.low, low=p.high) if p.split == "test" else p for p in trait.pairs)
    data = replace(data, traits=(replace(trait, pairs=turned), *data.traits[1:]))
    pack = maker(many, data, tmp_path / "pack").make(**KNOWN)
    weak = pack.load("glad").meta["weak"]
    assert isinstance(weak, str)
    assert "not told from none" in weak
    assert "weak" not in pack.load("loud").meta


@pytest.mark.parametrize(
    ("settings", "words"),
    [(Settings("guess"), "expected one of trained, mean"), (Settings("trained"), "in transformers, too")],
)
def test_what_can_not_be_made(
    many: Evaluator, data: Corpus, tmp_path: Path, settings: Settings, words: str
) -> None:
    with pytest.raises(MienError, match=words):
        Maker(many, data, tmp_path, settings=settings)


def test_a_report_is_one_file_with_all_that_is_known(many: Evaluator, data: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report draws with it")
    from mien.report import write_report

    pack = maker(many, data, tmp_path / "pack").make(**KNOWN)
    written = write_report(Pack.read(pack.path), tmp_path / "report.html", tmp_path / "figures")
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    for name in pack.entries:
        meta: Any = pack.load(name).meta
        assert f"id='{name}'" in page
        assert f"{meta['test.effect']:.2f} [" in page
        assert meta["example.reply"][-1] in page
    assert page.count("data:image/png;base64,") == len(written) - 1 == len(pack.entries) + 3
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:])
