"""Watching on the command line, and what a watch makes of readouts."""

from __future__ import annotations

import json
import math
from typing import Any

import mien
import numpy as np
import pytest
from click.testing import CliRunner
from makers import DictRegistry, make_vector
from mien import reference
from mien.cli import cli
from mien.cli.watching import sparkline, watch_json, watch_lines
from mien.errors import NameNotFound, VectorError
from mien.runtimes.fake import NumpyModel
from mien.vector import Vector
from mien.watch import KEPT, Token, Watch

NAN = math.nan


def make_watch(**options: Any) -> Watch:
    """Of two vectors of the layers 1 to 3, the second of which has none at layer 1."""
    rows = {1: [3.0, 0.0], 2: [0.0, 1.0], 3: [0.0, 2.0]}
    long = Vector.from_directions("long", rows)
    short = Vector.from_directions("short", {2: [1.0, 0.0], 3: [1.0, 1.0]})
    return Watch(["long", "short"], [long, short], 4, **options)


def read(*values: float) -> Any:
    """The readouts of one token: before, then after, of (layer, vector) in order."""
    return np.array(values, dtype=np.float32).reshape(2, 1, 3, 2)


# ---- what is made of readouts ----


def test_layers_count_by_the_squared_length_of_their_direction() -> None:
    watch = make_watch()
    watch.note([0], [0], read(1, NAN, 2, 4, 3, 7, 10, NAN, 20, 40, 30, 70))
    assert watch.layers == (1, 2, 3)
    assert watch.series("long", after=False) == pytest.approx([(9 * 1 + 1 * 2 + 4 * 3) / 14])
    assert watch.series("short", after=False) == pytest.approx([(1 * 4 + 2 * 7) / 3])
    assert watch.series("long") == pytest.approx([(90 + 20 + 120) / 14])
    assert watch.by_layer("long").tolist() == [[10, 20, 30]]
    assert watch.last.before == pytest.approx({"long": 23 / 14, "short": 6.0})


def test_that_is_the_coordinate_of_all_layers_along_the_whole_vector() -> None:
    """Adding c times the vector moves it by c, whatever there was."""
    model = NumpyModel()
    joy = make_vector("joy", [1, 2, 3], 1, model.fingerprint)
    rows = {
        layer: np.random.default_rng(layer).standard_normal((1, 8)).astype(np.float32) for layer in (1, 2, 3)
    }
    watch = Watch(["joy"], [joy], 4)
    both = [
        np.stack([reference.readout(rows[n] + c * joy.directions[n], joy, n) for n in (1, 2, 3)])
        for c in (0.0, 0.7)
    ]
    watch.note([0], [0], np.array(both, dtype=np.float32).reshape(2, 1, 3, 1))
    before, after = watch.series("joy", after=False)[0], watch.series("joy")[0]
    products = sum(float(rows[n][0] @ joy.directions[n]) for n in (1, 2, 3))
    assert before == pytest.approx(products / joy.norm() ** 2, rel=1e-5)
    assert after - before == pytest.approx(0.7, rel=1e-5)


def test_a_layer_that_was_not_computed_is_left_out_and_a_token_without_any_is_no_number() -> None:
    watch = make_watch()
    watch.note([0], [3], read(1, NAN, 2, 4, NAN, NAN, *[NAN] * 6))
    assert watch.series("long", after=False) == pytest.approx([(9 * 1 + 1 * 2) / 10])
    assert watch.series("short", after=False) == pytest.approx([4.0])
    assert np.isnan(watch.series("long"))


def test_tokens_are_told_apart_by_sequence_and_by_what_they_are() -> None:
    seen: list[Token] = []
    watch = make_watch(on_token=seen.append)
    values = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) * np.ones((2, 4, 3, 2), np.float32)
    watch.note([0, 1, 1, 0], [-1, -1, 0, 0], values)
    assert len(watch) == len(seen) == 4
    assert [(token.sequence, token.reply) for token in seen] == [(0, -1), (1, -1), (1, 0), (0, 0)]
    assert watch.series("long").tolist() == [3]
    assert watch.series("long", prompt=True).tolist() == [0, 3]
    assert watch.series("long", sequence=1, prompt=True).tolist() == [1, 2]
    assert watch.series("long", sequence=None, prompt=True).tolist() == [0, 1, 2, 3]
    watch.clear()
    assert len(watch) == 0
    assert watch.series("long").shape == (0,)
    with pytest.raises(IndexError):
        _ = watch.last


def test_the_oldest_tokens_are_forgotten() -> None:
    watch = make_watch()
    for i in range(KEPT + 10):
        watch.note([0], [i], np.full((2, 1, 3, 2), i, np.float32))
    assert len(watch) == KEPT
    assert watch.series("short")[[0, -1]].tolist() == [10, KEPT + 9]


def test_what_can_not_be_watched_is_refused() -> None:
    model = NumpyModel()
    joy = make_vector("joy", [1, 2], 1, model.fingerprint)
    plane = Vector("plane", (1,), np.ones((1, 2, 8), np.float32), model.fingerprint)
    mlp = Vector("mlp", (1,), np.ones((1, 8), np.float32), model.fingerprint, site="mlp")
    with mien.attach(model, registry=DictRegistry(joy)) as steering:  # type: ignore[arg-type]  # find() alone
        for vector in (plane, mlp):
            with pytest.raises(VectorError, match="one direction a layer of the residual stream"):
                steering.watch(vector)
        with pytest.raises(VectorError, match="at least one"):
            steering.watch()
        with pytest.raises(NameNotFound):
            steering.watch("jy")
        with steering.watch("joy") as watch, pytest.raises(NameNotFound, match="Did you mean joy"):
            watch.series("jy")


def test_a_watch_that_is_stopped_reads_no_further() -> None:
    model = NumpyModel()
    joy = make_vector("joy", [1, 2], 1, model.fingerprint)
    with mien.attach(model) as steering:
        with steering.watch(joy) as watch:
            model.forward([1, 2, 3])
        model.forward([1, 2])
        assert len(watch) == 3
        watch.stop()
        first = steering.watch(joy)
        second = steering.watch(joy)  # in the place of the first
        model.forward([1])
        assert (len(first), len(second)) == (0, 1)
        first.stop()  # takes nothing from the second
        model.forward([1])
        assert len(second) == 2


# ---- on a terminal ----


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([0, 1], 10, "▁█"),
        ([0, 0.5, 1], 10, "▁▅█"),
        ([NAN, 1], 10, "·█"),
        ([0, 0, 1, 1], 2, "▁█"),
        ([0, 1, NAN, NAN], 2, "▅·"),
        ([0, 0.2, 0.4, 0.6, 0.8, 1.0], 4, "▁▃▅█"),
    ],
)
def test_a_bar_is_the_mean_of_its_share(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width, 0, 1) == expected


def test_bars_of_one_value_are_in_the_middle() -> None:
    assert sparkline([2, 2], 5, 2, 2) == "▅▅"


def test_lines_have_one_scale_with_zero_in_it() -> None:
    watch = make_watch()
    watch.note([0, 0], [0, 1], np.array([[[1, -1]], [[2, -2]]], np.float32).repeat(3, 1)[None].repeat(2, 0))
    assert watch_lines(watch) == [
        "long   ▇█  mean +1.50 (+1.50 before steering), +1.00 to +2.00",
        "short  ▃▁  mean -1.50 (-1.50 before steering), -2.00 to -1.00",
    ]
    assert watch_json(watch)["short"] == {"before": [-1.0, -2.0], "after": [-1.0, -2.0]}


def test_without_tokens_a_line_says_so() -> None:
    assert watch_lines(make_watch())[0].split() == ["long", "no", "tokens"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


@pytest.mark.model
def test_run_prints_bars_after_the_reply_and_the_series_as_json() -> None:
    told = (
        "run",
        "How was your day?",
        "--steer",
        "joy",
        "--max-tokens",
        "12",
        "-w",
        "joy",
        "--watch",
        "anger",
    )
    lines = invoke(*told).stdout.splitlines()
    assert lines[-3] == ""
    assert [line.split()[0] for line in lines[-2:]] == ["joy", "anger"]
    found = json.loads(invoke(*told, "--json").stdout)
    assert set(found["watch"]) == {"joy", "anger"}
    series = found["watch"]["joy"]
    assert len(series["before"]) == len(series["after"]) == 11  # the last token of a reply is not evaluated
    moved = np.subtract(series["after"], series["before"])
    assert moved == pytest.approx(np.ones(11), abs=1e-3)  # dose 1 is 1 in the readout's units
    assert found["text"].split()[0] in " ".join(lines)


@pytest.mark.model
def test_a_mistyped_name_is_said_before_anything_is_generated() -> None:
    found = invoke("run", "Hello", "--steer", "joy", "--compare", "--watch", "jy")
    assert found.exit_code == 3
    assert "Did you mean joy" in found.stderr
    assert found.stdout == ""


@pytest.mark.model
def test_a_chat_watches_what_it_is_told_to() -> None:
    lines = "/watch joy nobody\n/watch joy\nHi\n/watch\nHi\n"
    found = CliRunner().invoke(cli, ["chat", "--max-tokens", "5"], input=lines, catch_exceptions=False)
    assert "no vector named 'nobody'" in found.stderr
    assert found.stderr.count("before steering") == 1
