"""Contrast texts, extraction and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mien
import numpy as np
import pytest
from mien import calibration, contrast, reference
from mien.calibration import Calibration, Dose, bake, calibrate, repetition, within_budget
from mien.contrast import Sample
from mien.errors import MienError
from mien.extraction import extract, extract_group
from mien.runtimes.llama_text import chat_tokens, greedy_reply, log_probabilities
from mien.vector import Vector

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
        np.testing.assert_allclose(row, expected[layer], rtol=1e-6, atol=1e-6)
    # The middle of the two means reads as zero, and they as a half and minus a half.
    sides = {
        -0.5: states[2],
        0.5: (states[0] + states[1]) / 2,
        0.0: (states[0] + states[1]) / 4 + states[2] / 2,
    }
    for layer in vector.layers:
        for readout, side in sides.items():
            found = reference.readout(side[None, layer].astype(np.float32), vector, layer)
            assert found[0] == pytest.approx(readout, abs=1e-4)
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
    from mien.extraction import stream_norms

    llm = load()
    tokens = llm.tokenize(b"The harbour was quiet when the boats came in.")
    with mien.attach(llm) as steering:
        states = steering.capture(tokens, layers=[15], last=len(tokens))[0]
        norms = np.linalg.norm(states.astype(np.float64), axis=1)
        assert norms[0] > 20 * np.median(norms)
        assert stream_norms(steering, [tokens])[15] == pytest.approx(np.median(norms[1:]))


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0.0), ("one two", 0.0), ("a b c a b c", 0.25), ("a a a a a", 2 / 3), ("one two three four", 0.0)],
)
def test_repetition_counts_repeated_trigrams(text: str, expected: float) -> None:
    assert repetition(text) == pytest.approx(expected)


def test_both_measures_have_a_say() -> None:
    plain = Dose(0.0, 5.0, 0.02)
    assert within_budget(Dose(1.0, 12.4, 0.11), plain)
    assert not within_budget(Dose(1.0, 12.6, 0.02), plain)
    assert not within_budget(Dose(1.0, 2.0, 0.13), plain)  # repetitive text has a low perplexity


def fake_measure(curve: dict[float, tuple[float, float]]) -> Callable[..., Dose]:
    return lambda llm, steering, vector, coefficient, prompts: Dose(coefficient, *curve[coefficient])


def some_vector() -> Vector:
    return Vector(
        "v", (1,), np.ones((1, 4), np.float32), model_hint="x", meta={"strength": [0.2], "scale": 1.0}
    )


def test_the_dose_is_the_largest_before_a_budget_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = {0.0: (5.0, 0.0), 0.2: (5.0, 0.0), 0.4: (6.0, 0.05), 0.6: (13.0, 0.0), 0.8: (5.0, 0.0)}
    monkeypatch.setattr(calibration, "_measure", fake_measure(curve))
    found = calibrate(None, None, some_vector(), [], coefficients=[0.2, 0.4, 0.6, 0.8])  # type: ignore[arg-type]
    assert found.chosen == 0.4
    assert [dose.coefficient for dose in found.curve] == [0.0, 0.2, 0.4, 0.6]  # not beyond


def test_no_fluent_dose_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_measure", fake_measure({0.0: (5.0, 0.0), 0.2: (50.0, 0.0)}))
    with pytest.raises(MienError, match=r"already at 0\.2"):
        calibrate(None, None, some_vector(), [], coefficients=[0.2])  # type: ignore[arg-type]


def test_baking_makes_the_chosen_dose_one() -> None:
    curve = (Dose(0.0, 5.0, 0.0), Dose(0.25, 6.0, 0.1), Dose(0.5, 9.0, 0.4))
    baked = bake(some_vector(), Calibration(curve, 0.25))
    assert baked.rows.tolist() == [[0.25] * 4]
    assert baked.meta["scale"] == 0.25
    assert baked.meta["strength"] == [0.05]
    assert baked.meta["calibration.dose"] == [0.0, 1.0, 2.0]
    assert baked.meta["calibration.repetition"] == [0.0, 0.1, 0.4]


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
    reply = greedy_reply(llm, question, 6)
    found = log_probabilities(llm, question, reply)
    llm.reset()
    llm.eval(question)
    for token, expected in zip(reply, found, strict=True):
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).astype(np.float64)
        by_hand = logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert by_hand == pytest.approx(expected, abs=0.15)  # another batch size rounds otherwise
        assert math.exp(expected) <= 1
        llm.eval([token])
