"""The command line with ordinary mistakes, odd terminals and full contexts, on a little model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from little import N_EMBD, N_LAYER, WORDS, write_model
from mien.bench import run as measure
from mien.cli import cli
from mien.cli.conversation import Conversation
from mien.errors import ContextNotMade, ModelFileError, PromptTooLong
from mien.fingerprint import Fingerprint
from mien.modelfile import fingerprint_of
from mien.pack import Pack
from mien.runtimes.llama_text import load_llama, prompt_length
from mien.threads import default_threads
from mien.timing import TOO_FEW, line, row
from mien.vector import Vector

SENTENCE = "Grüße, 喜び 😀!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("little") / "größe 喜び.gguf")


@pytest.fixture
def odd(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is easily mistaken for something else, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdfe\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-1000])
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03")
    for name in ("mine", "mine-1", "my-mine", "4mine"):
        make_pack(tmp_path / name, fingerprint_of(model))
    return tmp_path


def make_pack(folder: Path, fingerprint: Fingerprint) -> Pack:
    folder.mkdir()
    rows = np.full((N_LAYER - 1, N_EMBD), 20.0, np.float32)
    layers = tuple(range(1, N_LAYER))
    Vector("glad", layers, rows, fingerprint, meta={"positive": SENTENCE}).save(folder / "glad.gguf")
    return Pack.build(folder, name=folder.name, version="1.0", licence="MIT")


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin, catch_exceptions=False)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`mien` as a shell runs it; options: of subprocess.run, and env: more variables, None removes one."""
    environment = {**os.environ, **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **options}
    return subprocess.run(
        [sys.executable, "-m", "mien", *arguments],
        env={key: value for key, value in environment.items() if value is not None},
        check=False,
        **options,
    )


# ---- exit codes ----


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("run Hi --model MODEL --steer glad --max-tokens 2", 0, ""),
        # 1: failed
        ("run Hi --model MODEL --ctx 200000000", 1, "200000000 tokens"),
        ("extract x --positive folder --negative text.txt", 1, "Is a directory"),
        ("extract x --positive latin.txt --negative text.txt", 1, "UTF-8"),
        (
            "extract x --positive text.txt --negative a.txt --layers 28-99 --model MODEL --raw",
            1,
            "28, 29, 30 ",
        ),
        # 2: usage or recipe
        ("run Hi --model MODEL --steer 1e39*glad", 2, "NaN or infinity"),
        ("run Hi --model MODEL --steer 1e38*glad", 2, "NaN or infinity"),
        ("run Hi --model MODEL --steer ablate(1e38*glad)", 2, "NaN or infinity"),
        ("run Hi --model MODEL --steer edit(glad)", 2, "no probe"),
        ("run Hi --max-tokens 0", 2, "--max-tokens"),
        ("run Hi --model MODEL --compare", 2, "--steer"),
        ("run Hi --model MODEL --steer abblate(glad)", 2, "Did you mean ablate?"),
        ("run Hi --model MODEL --steer clmp(glad,1.0)", 2, "Did you mean clamp?"),
        ("run Hi --model MODEL --steer gatee(glad,on=glad,above=1)", 2, "Did you mean gate?"),
        ("run Hi --model MODEL --steer mine-1.glad", 2, "Did you mean mine_1.glad?"),
        ("run Hi --model MODEL --steer my-mine.glad", 2, "Did you mean my_mine.glad?"),
        ("run Hi --model MODEL --steer 0.5*my-mine.glad-my.2nd.glad", 2, "my_"),
        ("run Hi --model MODEL --steer 4mine.glad", 2, "Did you mean _4mine.glad?"),
        ("run Hi --max-tokens many", 2, "--max-tokens"),
        ("run Hi --temperature nan", 2, "--temperature"),
        ("run Hi --temperature inf", 2, "--temperature"),
        ("run Hi --temperature -1", 2, "--temperature"),
        ("run Hi --seed 99999999999", 2, "--seed"),
        ("run Hi --threads 100000", 2, "--threads"),
        ("run Hi --ctx 99999999999", 2, "--ctx"),
        ("extract x --positive a --negative b --scale nan", 2, "--scale"),
        ("extract x --positive text.txt --negative text.txt --layers ²-³", 2, "6-28"),
        ("extract x --positive text.txt --negative text.txt --layers 1-99999999999", 2, "6-28"),
        ("import mine/glad.gguf --scale inf", 2, "--scale"),
        ("bench --out folder", 2, "--out"),
        ("bench --rounds 0", 2, "--rounds"),
        ("pack build mine --name mine --version x --licence MIT", 2, "1.0.0"),
        ("pack build mine --name mine --version 1..0 --licence MIT", 2, "1.0.0"),
        ("pack build mine --name Mine --version 1.0 --licence MIT", 2, "a-z"),
        ("pack make MODEL --version v1", 2, "1.0.0"),
        ("pack make MODEL --name ../x", 2, "a-z"),
        # 3: name or model not found
        ("run Hi --model nothing.gguf", 3, "no such file"),
        ("run Hi --steer nothing --model MODEL", 3, "nothing"),
        ("extract x --positive nothing.txt --negative text.txt", 3, "nothing.txt"),
        ("extract x --group nothing", 3, "nothing"),
        ("extract x --positive text.txt --negative text.txt --calibrate nothing.txt", 3, "nothing.txt"),
        ("pack make --data nothing --model MODEL", 2, "--model"),
        ("pack make MODEL --data nothing", 3, "nothing"),
        ("pack verify nothing", 3, "nothing"),
        ("pack report nothing", 3, "nothing"),
        ("list --model nothing", 3, "nothing"),
        ("info nothing", 3, "nothing"),
        ("info nothing.gguf", 3, "nothing.gguf"),
        ("info folder/nothing", 3, "folder/nothing"),
        ("import nothing.gguf", 3, "nothing.gguf"),
        ("import nothing.npz", 3, "nothing.npz"),
        ("import nothing.pt --from steering-vectors", 3, "nothing.pt"),
        ("run Hi --model MODEL --vector nothing.gguf --steer glad", 3, "nothing.gguf"),
        ("chat --model MODEL --vector nothing.gguf", 3, "nothing.gguf"),
        ("doctor --model nothing.gguf", 3, "no such file"),
        # 4: broken file or pack
        ("run Hi --model text.txt", 4, "not a GGUF file"),
        ("run Hi --model cut.gguf", 4, "cut.gguf"),
        ("run Hi --model short.gguf", 4, "short.gguf"),
        ("run Hi --model cut.gguf --runtime hf", 4, "cut.gguf"),
        ("doctor --model cut.gguf", 4, "cut short"),
        ("import mine/glad.gguf --model cut.gguf --out folder", 4, "cut short"),
        ("info folder/", 4, "Is a directory"),
        ("info text.txt", 4, "not a GGUF file"),
        ("info ./text.txt", 4, "not a GGUF file"),
        ("info cut.gguf", 4, "cut.gguf"),
        ("run Hi --model MODEL --vector text.txt", 4, "not a GGUF file"),
        ("import text.txt --out folder", 4, "text.txt"),
        ("pack remove mine", 4, "was not installed by mien"),
        ("pack verify text.txt", 4, "text.txt"),
        ("pack verify folder", 4, "pack.toml"),
        ("pack export text.txt", 4, "text.txt"),
        # 5: wrong model
        ("run Hi --model MODEL --steer joy", 5, "joy"),
    ],
)
def test_exit_codes_are_those_of_the_readme(
    odd: Path, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, words: str
) -> None:
    (odd / "a.txt").write_text("another text\n")
    monkeypatch.setenv("MIEN_PATH", str(odd))
    before = sorted(odd.rglob("*"))
    found = invoke(*(str(model) if word == "MODEL" else word for word in arguments.split()))
    assert found.exit_code == code, found.stderr
    assert words in found.stderr
    if code:
        assert found.stdout == ""
        assert len(found.stderr.splitlines()) <= 6
        assert sorted(odd.rglob("*")) == before


def test_a_missing_default_model_is_3_for_doctor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIEN_MODEL", "/no/such/model.gguf")
    found = invoke("doctor", "--json")
    assert found.exit_code == invoke("run", "Hi").exit_code == 3
    assert "/no/such/model.gguf" in json.loads(found.stdout)["model"]["default"]


def test_facts_of_errors_are_attributes(odd: Path, model: Path) -> None:
    with pytest.raises(ModelFileError) as broken:
        load_llama(odd / "cut.gguf")
    assert broken.value.path == str(odd / "cut.gguf")
    assert "not within the file bounds" in broken.value.problem  # llama.cpp's own words
    with pytest.raises(ContextNotMade) as context:
        load_llama(model, n_ctx=200_000_000)
    assert context.value.n_ctx == 200_000_000
    assert "trained with 512 tokens" in context.value.cause


def test_an_engine_that_is_not_built_is_6(model: Path) -> None:
    code = "import sys; sys.modules['mien._engine'] = None; from mien.cli import main; main()"
    arguments = [sys.executable, "-c", code, "run", "Hi", "--model", str(model)]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert found.returncode == 6
    assert len(found.stderr.splitlines()) == 1
    assert "C compiler" in found.stderr


# ---- terminals ----


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize(
    "command", ["run", "run --json", "info", "info --json", "list", "list --json", "verify"]
)
def test_a_terminal_may_lack_any_character(odd: Path, model: Path, encoding: str, command: str) -> None:
    name, *options = command.split()
    arguments = {
        "run": ["run", SENTENCE, "--model", str(model), "--max-tokens", "4"],
        "info": ["info", "mine/glad.gguf"],
        "list": ["list"],
        "verify": ["pack", "verify", "mine"],
    }[name]
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "MIEN_PATH": str(odd)}
    found = process(*arguments, *options, env=env)
    assert found.returncode == 0, found.stderr
    if options:
        data = json.loads(found.stdout.decode("utf-8" if encoding == "ascii" else encoding))
        said = (
            data["prompt"]
            if name == "run"
            else data["meta"]["positive"]
            if name == "info"
            else data[-1]["positive"]
        )
        assert said == SENTENCE
        if encoding != "utf-8":
            assert found.stdout.isascii()


def test_a_locale_of_ascii_reads_text_and_paths_as_utf_8(model: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    arguments = ["run", SENTENCE, "--model", str(model), "--max-tokens", "12", "--json"]
    found = process(*arguments, env=plain)
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    assert data["prompt"] == SENTENCE
    assert data["text"] == json.loads(process(*arguments).stdout)["text"]
    assert any(word in data["text"] for word in WORDS)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_a_models_name_may_be_any_bytes(tmp_path: Path, model: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    path.write_bytes(model.read_bytes())
    found = process("run", "Hi", "--model", str(path), "--max-tokens", "2", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["model"] == str(path)


@pytest.mark.parametrize("command", [["run", "-"], ["run", "-", "--raw"], ["run", b"\xff"], ["chat"]])
def test_what_is_not_text_is_refused(model: Path, command: list[Any]) -> None:
    found = process(*command, "--model", str(model), "--max-tokens", "2", input=b"\xff\xfe\n/quit\n")
    assert b"UTF-8" in found.stderr
    assert b"Traceback" not in found.stderr
    assert found.returncode == (0 if command == ["chat"] else 2 if command[1] == b"\xff" else 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has such a device")
@pytest.mark.parametrize(
    "command", [["list"], ["--help"], ["run", "--help"], ["list", "--json"], ["--version"]]
)
def test_a_full_disk_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        found = process(*command, stdout=full)
    assert found.returncode == 1
    assert found.stderr.decode().splitlines() == ["Error: No space left on device"]
    with open("/dev/full", "wb") as full:
        assert process(*command, stdout=full, stderr=full).returncode == 1


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        found = process("list", stdout=closed)
    assert (found.returncode, found.stderr) == (1, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="shells of Windows can't close a stream")
@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [("<&-", "run - --max-tokens 2", 2), ("<&-", "chat", 0), (">&-", "list", 0), ("2>&-", "list", 0)],
)
def test_a_closed_stream_is_an_empty_one(model: Path, closed: str, arguments: str, code: int) -> None:
    found = subprocess.run(
        f"{sys.executable} -m mien {arguments} {closed}",
        shell=True,
        capture_output=True,
        check=False,
        env={**os.environ, "MIEN_MODEL": str(model)},
    )
    assert found.returncode == code, found.stderr
    assert b"Traceback" not in found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals are Unix's")
def test_a_chat_whose_replies_go_to_a_file_prompts_on_stderr(model: Path) -> None:
    master, terminal = os.openpty()
    os.write(master, b"/steer\n/quit\n")
    found = process("chat", "--model", str(model), stdin=terminal)
    os.close(terminal)
    os.close(master)
    assert (found.returncode, found.stdout) == (0, b"")
    assert found.stderr.count(b"> ") == 2


# ---- contexts ----


@pytest.mark.parametrize("runtime", ["llama", "hf"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_a_prompt_that_is_too_long_says_by_how_much(
    tmp_path: Path, model: Path, runtime: str, raw: list[str]
) -> None:
    # llama.cpp rounds 128 up to 256: what was asked for counts.
    arguments = ["--model", str(model), "--ctx", "128", "--max-tokens", "2", "--runtime", runtime, *raw]
    assert invoke("run", "a" * 100, *arguments).exit_code == 0
    found = invoke("run", "a" * 150, *arguments)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("PromptTooLong: the prompt has 15")
    assert "at most 127 fit" in found.stderr
    assert "--ctx" in found.stderr


@pytest.mark.parametrize("runtime", ["llama", "hf"])
def test_a_context_is_at_most_what_the_model_was_trained_with(model: Path, runtime: str) -> None:
    arguments = ["--model", str(model), "--max-tokens", "2", "--runtime", runtime]
    (line,) = invoke("run", "Hi", *arguments, "--ctx", "1000").stderr.splitlines()
    assert "512" in line
    assert "--ctx 1000" in line
    for fits in ([], ["--ctx", "512"], ["--ctx", "256"]):  # what nobody asked for is not told
        assert invoke("run", "Hi", *arguments, *fits).stderr == ""
    for command, stdin in ((["run", "a" * 600], None), (["chat"], "a" * 600 + "\n")):
        told = invoke(*command, *arguments, stdin=stdin).stderr
        assert "at most 511 fit" in told
        assert "--ctx" not in told


def test_the_length_of_a_prompt_is_what_the_chat_makes_of_it(tmp_path: Path, model: Path) -> None:
    for path in (model, write_model(tmp_path / "plain.gguf", template="")):
        llm = load_llama(path, n_ctx=256)
        messages = [{"role": "user", "content": "Hello there"}]
        usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
        assert abs(prompt_length(llm, messages) - usage["prompt_tokens"]) <= 1
        llm.close()


@pytest.mark.parametrize("runtime", ["llama", "hf"])
def test_a_chat_forgets_its_oldest_turns(model: Path, runtime: str) -> None:
    lines = ["one " * 8, "two " * 8, "three " * 6, "x" * 200, "four", "/quit"]
    arguments = ["--model", str(model), "--ctx", "128", "--max-tokens", "8", "--runtime", runtime]
    found = invoke("chat", *arguments, "--system", "kind", stdin="\n".join(lines) + "\n")
    assert found.exit_code == 0
    told = found.stderr.splitlines()
    assert sum("forgotten" in line for line in told) >= 1
    assert sum("at most 127 fit" in line for line in told) == 1
    replies = [line for line in found.stdout.splitlines() if line]
    assert not any(line.startswith("> ") for line in replies)
    assert len(replies) == 4, found.stdout  # the chat went on after the message that does not fit


def tokens(messages: Any) -> int:
    return sum(len(message["content"]) for message in messages)


def test_a_conversation_keeps_its_system_prompt_and_its_count_of_turns() -> None:
    talk = Conversation("sys")
    for i in range(4):
        talk.ask(f"question{i}")
        talk.answer(f"reply{i}")
    talk.ask("last")
    assert talk.trim(tokens, room=1000, most=2000) == 0
    assert talk.trim(tokens, room=50, most=100) == 2
    assert [message["content"] for message in talk.messages] == [
        "sys",
        *("question2", "reply2", "question3", "reply3"),
        "last",
    ]
    assert talk.turn == 5  # joy(turn=2) does not act again
    assert talk.trim(tokens, room=1, most=100) == 2
    assert [message["role"] for message in talk.messages] == ["system", "user"]
    talk.reset()
    assert (talk.turn, len(talk.messages)) == (1, 1)


def test_a_question_that_does_not_fit_costs_nothing_else() -> None:
    talk = Conversation(None)
    talk.ask("short")
    talk.answer("yes")
    talk.ask("q" * 30)
    with pytest.raises(PromptTooLong) as caught:
        talk.trim(tokens, room=10, most=20)
    assert (caught.value.tokens, caught.value.room) == (30, 20)
    talk.take_back()
    assert [message["content"] for message in talk.messages] == ["short", "yes"]


# ---- threads ----


def test_half_of_the_processors_run_a_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        for count, expected in ((1, 1), (2, 1), (3, 1), (8, 4)):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: set(range(count)))
            assert default_threads() == expected
    llm = load_llama(model, n_ctx=64)
    assert llm.n_threads == llm.n_threads_batch == default_threads()
    llm.close()


# ---- packs and models ----


@pytest.mark.parametrize("command", ["verify", "export", "report"])
def test_a_pack_is_a_name_a_folder_or_a_zip(odd: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    archive = invoke("pack", "export", "mine", "-o", "mine.zip").stdout.strip()
    options = {"verify": [], "export": ["-o", "out", "--force"], "report": ["-o", "out"]}[command]
    monkeypatch.setenv("MIEN_PATH", str(odd / "mine"))
    for name in ("mine", "./mine", str(odd / "mine"), archive):
        found = invoke("pack", command, name, *options, "--json")
        assert found.exit_code == 0, found.stderr
        assert json.loads(found.stdout)["name"] == "mine"


def test_verify_names_the_zip_whose_vector_was_changed(odd: Path) -> None:
    data = bytearray((odd / "mine" / "glad.gguf").read_bytes())
    invoke("pack", "export", "mine", "-o", "mine.zip")
    whole = (odd / "mine.zip").read_bytes()
    assert bytes(data) in whole  # stored, not deflated
    data[-1] ^= 1
    with zipfile.ZipFile("bad.zip", "w") as bad:
        bad.write("mine/pack.toml", "mine/pack.toml")
        bad.writestr("mine/glad.gguf", bytes(data))
    found = invoke("pack", "verify", "bad.zip")
    assert found.exit_code == 4
    assert "bad.zip/glad.gguf" in found.stderr


def test_installing_says_what_comes_first(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = invoke("pack", "install", "mine")
    assert (alone.exit_code, alone.stderr) == (0, "")
    monkeypatch.setenv("MIEN_PATH", str(odd / "mine"))
    shadowed = invoke("pack", "install", "mine", "--force")
    assert shadowed.exit_code == 0
    assert str(odd / "mine") in shadowed.stderr


def test_doctor_describes_a_model(odd: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(invoke("doctor", "--model", str(model), "--json").stdout)["model"]
    fingerprint = fingerprint_of(model)
    assert (facts["architecture"], facts["layers"], facts["n_embd"]) == ("llama", N_LAYER, N_EMBD)
    assert facts["vocabulary"] == fingerprint.vocabulary != ""
    assert (facts["context_length"], facts["size"]) == (512, model.stat().st_size)
    assert (facts["steerable"], facts["path"]) == (True, "in-graph")
    assert facts["packs"] == []
    assert "mien pack make" in facts["next"]
    monkeypatch.setenv("MIEN_PATH", str(odd / "mine"))
    found = invoke("doctor", "--model", str(model))
    assert found.exit_code == 0
    assert "mine 1.0" in found.stdout
    assert "mien pack make" not in found.stdout
    monkeypatch.delenv("MIEN_PATH")
    plain = write_model(odd / "plain.gguf", template="")
    assert (
        "mien extract"
        in json.loads(invoke("doctor", "--model", str(plain), "--json").stdout)["model"]["next"]
    )


# ---- measuring ----


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a measurement, as Ctrl-C does, after so many rounds."""

    def stop_after(rounds: int) -> None:
        def run(*arguments: Any) -> Any:
            *rest, tell = arguments

            def telling(progress: Any) -> None:
                tell(progress)
                nonlocal rounds
                rounds -= 1
                if not rounds:
                    raise KeyboardInterrupt

            return measure(*rest, telling)

        monkeypatch.setattr("mien.bench.run", run)

    return stop_after


def test_a_measurement_that_is_stopped_gives_what_there_is(
    odd: Path, model: Path, stopped: Callable[[int], None]
) -> None:
    stopped(13)  # decode has 10 rounds, prefill 4
    found = invoke("bench", "--model", str(model), "--rounds", "10", "--json", "--out", "bench.json")
    assert found.exit_code == 130
    data = json.loads(found.stdout)
    assert data == json.loads((odd / "bench.json").read_text())
    assert data["complete"] is False
    assert data["threads"] == default_threads()
    samples = {row["what"]: row["samples"] for row in data["rows"]}
    assert samples["decode, in-graph"] == 10
    assert samples["prefill of 400, in-graph"] == 3

    stopped(3)
    lines = invoke("bench", "--model", str(model), "--rounds", "10").stdout.splitlines()
    assert len(lines) == 1 + 5
    assert all(line.startswith("decode, ") for line in lines[1:])


# ---- vector files ----


@pytest.fixture
def file(odd: Path, model: Path) -> Path:
    """`glad` in a file of another name; it was not calibrated."""
    return (odd / "mine" / "glad.gguf").rename(odd / "x.gguf")


def notes(found: Result) -> list[str]:
    assert found.exit_code == 0, found.stderr
    return [line for line in found.stderr.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("command", ["run Hi", "chat"])
def test_a_files_name_in_place_of_the_vectors_is_told(file: Path, model: Path, command: str) -> None:
    arguments = [*command.split(), "--model", str(model), "--max-tokens", "2", "--vector", "x.gguf"]
    found = invoke(*arguments, "--steer", "0.1*x", stdin="")
    assert found.exit_code == 3
    assert "x.gguf holds the vector 'glad': write glad, or --vector x=x.gguf" in found.stderr
    assert "--vector x.gguf, or" not in found.stderr
    arguments[-1] = "x=x.gguf"
    assert invoke(*arguments, "--steer", "0.1*x", stdin="").exit_code == 0


def test_a_chat_tells_it_too(file: Path, model: Path) -> None:
    found = invoke("chat", "--model", str(model), "--vector", "x.gguf", stdin="/steer x\n/steer glad\n")
    assert "x.gguf holds the vector 'glad'" in found.stderr
    assert "steering: glad" in found.stderr


def test_a_watched_file_is_named_as_a_steering_one(file: Path, model: Path) -> None:
    arguments = ["run", "Hi", "--model", str(model), "--max-tokens", "2", "--vector", "x.gguf"]
    assert invoke(*arguments, "--watch", "x").exit_code == 3
    assert notes(invoke(*arguments, "--watch", "glad")) == []


def test_a_file_that_steers_nothing_is_told(file: Path, model: Path) -> None:
    arguments = ["run", "Hi", "--model", str(model), "--max-tokens", "2"]
    (line,) = notes(invoke(*arguments, "--vector", "x.gguf"))
    assert "x.gguf" in line
    assert "--steer glad" in line
    (line, *_) = notes(invoke(*arguments, "--vector", "x.gguf", "--vector", "y=x.gguf", "--steer", "0.1*y"))
    assert "--steer glad" in line


def test_a_vector_without_a_measured_dose_is_told(odd: Path, file: Path, model: Path) -> None:
    arguments = ["run", "Hi", "--model", str(model), "--max-tokens", "2", "--vector", "x.gguf"]
    (line,) = notes(invoke(*arguments, "--steer", "0.1*glad"))
    assert "not calibrated" in line
    assert "0.1*glad" in line
    assert notes(invoke(*arguments, "--steer", "ablate(glad)")) == []  # it has no dose
    from mien.vectorfile import load

    vector = load("x.gguf")
    dosed = Vector(
        "glad", vector.layers, vector.rows, vector.fingerprint, meta={"calibration.dose": [0.0, 1.0]}
    )
    dosed.save("x.gguf")
    assert notes(invoke(*arguments, "--steer", "glad")) == []


@pytest.mark.parametrize(
    ("values", "target", "verdict"),
    [
        ([1.0] * 5, {"reach": 1.01}, "ok"),
        ([1.02] * 5, {"reach": 1.01}, "MISSED"),
        ([1.0], {"reach": 1.01}, TOO_FEW),  # nobody knows how far it spreads
        ([0.9, 0.95, 1.0, 1.05, 1.1], {"reach": 1.01}, TOO_FEW),
        ([0.9, 0.95, 1.0, 1.05, 1.1] * 200, {"reach": 1.01}, "ok"),
        ([0.9, 0.95, 1.0, 1.05, 1.1] * 200, {"reach": 0.99}, "MISSED"),
        ([0.9, 0.95, 1.0, 1.05, 1.1], {"at_least": 0.6}, "ok"),
        ([0.9, 0.95, 1.0, 1.05, 1.1], {"at_least": 1.6}, "MISSED"),
        ([0.9, 0.95, 1.0, 1.05, 1.1], {"at_least": 0.99}, TOO_FEW),
        ([0.9, 1.1], {}, ""),
    ],
)
def test_a_verdict_needs_rounds_enough(values: list[float], target: dict[str, float], verdict: str) -> None:
    found = replace(row("decode", values, "x"), **target)  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert line(found, 20).endswith(verdict)


def test_the_margin_is_the_medians_95_percent_interval() -> None:
    random = np.random.default_rng(0)
    draws = random.standard_normal((2000, 51))
    rows = [row("drawn", list(values), "x") for values in draws]
    covered = np.mean([found.margin is not None and abs(found.value) <= found.margin for found in rows])
    assert 0.93 <= covered <= 0.98


def test_one_round_is_measured(odd: Path, model: Path, stopped: Callable[[int], None]) -> None:
    stopped(2)  # decode has one round, prefill 4
    found = invoke("bench", "--model", str(model), "--rounds", "1", "--json")
    rows = {measured["what"]: measured for measured in json.loads(found.stdout)["rows"]}
    assert rows["decode, in-graph"]["samples"] == 1
    assert rows["decode, in-graph"]["margin"] is None
