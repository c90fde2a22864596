"""The README's Python runs as written, in order, and does what it says; its commands exist and print that."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import llama_cpp
import mien
import numpy as np
import pytest
from mien.cli import cli
from mien.errors import RuntimeNotSupported

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

# ---- Python ----

Names = dict[str, Any]


def ended_as_it_began(names: Names, printed: str) -> None:
    reply, _, applied = printed.partition("\n")
    assert reply
    assert re.search(r"0\.8\*joy - 0\.3\*anger at \d+ layers", applied)
    assert type(names["llm"]) is llama_cpp.Llama
    with pytest.raises(RuntimeNotSupported):
        names["steering"].set("joy")


def each_row_had_a_recipe(names: Names, printed: str) -> None:
    replies = ast.literal_eval(printed)
    assert len(set(replies)) == 3
    assert all(layer.rows for layer in names["steering"].applied.layers.values())
    assert names["steering"].applied.layers


def two_heads_were_scaled(names: Names, printed: str) -> None:
    _, heads = printed.split("heads")
    assert [int(row.split()[0]) for row in heads.splitlines() if row.strip()] == [14, 15]
    assert type(names["llm"]) is llama_cpp.Llama


def each_token_was_read(names: Names, printed: str) -> None:
    watch = names["watch"]
    before, after = watch.series("anger", after=False), watch.series("anger")
    assert len(before) == len(after) > 1
    assert not np.array_equal(before, after), "read as steered and as it came, it was the same"
    assert len(printed.splitlines()) > len(after)


def sequences_differ(names: Names, printed: str) -> None:
    each, width = names["batch"].n_tokens // 5, names["llm"].n_vocab()
    rows = [llama_cpp.llama_get_logits_ith(names["context"], (i + 1) * each - 1) for i in range(5)]
    logits = [np.ctypeslib.as_array(row, (width,)).copy() for row in rows]
    assert all(np.abs(one - other).max() > 0.1 for k, one in enumerate(logits) for other in logits[k + 1 :])
    assert {layer.rows for layer in names["steering"].applied.layers.values()} == {4}, printed


CHECKS: list[Callable[[Names, str], None]] = [
    ended_as_it_began,
    each_row_had_a_recipe,
    two_heads_were_scaled,
    each_token_was_read,
    sequences_differ,
]


@pytest.mark.model
def test_the_python_runs_in_order_and_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: Names = {}
    found = re.finditer(r"```python\n(.*?)```", README, re.DOTALL)
    for block, check in zip(found, CHECKS, strict=True):
        # Empty lines, so that a traceback names the README's own line.
        code = "\n" * README.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, "README.md", "exec"), names)
        check(names, capsys.readouterr().out)
    names["steering"].detach()
    llama_cpp.llama_free(names["context"])
    llama_cpp.llama_model_free(names["weights"])
    llama_cpp.llama_batch_free(names["batch"])
    names["llm"].close()


def test_a_vector_has_what_the_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paragraph about `mien.load("joy")`."""
    (line,) = (line for line in README.splitlines() if line.startswith('`mien.load("joy")`'))
    monkeypatch.chdir(tmp_path)
    names = {"mien": mien} | {name: mien.load(name) for name in ("joy", "fear", "calm")}
    loaded, mixed, cosine, row, _ = (
        eval(code, names) for code in re.findall(r"`([^`]+)`", line) if code != "Vector"
    )
    assert loaded.digest == names["joy"].digest
    assert mixed.digest == (0.5 * names["joy"] - 0.3 * names["fear"]).digest
    assert -1 <= cosine < 1
    np.testing.assert_array_equal(row, loaded.directions[14])
    assert mien.load("joy.gguf").digest == loaded.digest


# ---- commands ----


def commands() -> list[str]:
    """Every `mien ...` in the text and in blocks of commands, a line of several as several."""
    lines = re.findall(r"(?:^ {4}|^\$ |`|/bin/)(mien [^`\n]*)", README, re.MULTILINE)
    return [part for line in lines for part in re.split(r", (?=mien )", line)]


def named(command: str) -> list[click.Command]:
    """The commands that such a line names: `mien pack make|report` names two."""
    found: list[click.Command] = [cli]
    for word in command.split()[1:]:
        if not isinstance(found[0], click.Group):
            break
        assert len(found) == 1
        found = [found[0].commands[name] for name in word.split("|")]
    return found


def options(command: click.Command) -> set[str]:
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union(*map(options, inner))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_exists_and_takes_its_options(command: str) -> None:
    for one in named(command):
        assert set(re.findall(r"(?<!\S)\(?(--[a-z-]+)", command)) <= options(one), one.name


def test_every_option_in_the_text_is_one_of_mien() -> None:
    of_others = {"--control-vector-scaled", "--no-deps"}
    assert set(re.findall(r"`(--[a-z-]+)", README)) - of_others <= options(cli)


def run(*arguments: str) -> str:
    """What it prints in a terminal as wide as the README's."""
    return subprocess.run(
        [sys.executable, "-m", "mien", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=True,
    ).stdout


def shown(command: str) -> list[str]:
    """What the README shows of its output."""
    _, text = README.split(f"$ {command}\n")
    return re.split(r"\n\n|\n```", text)[0].splitlines()


def test_list_prints_what_is_shown() -> None:
    printed = run("list").splitlines()
    expected = [line for line in shown("mien list") if line.strip() != "..."]
    assert expected == [line for line in printed if line in expected]


@pytest.mark.model
def test_compare_prints_what_is_shown() -> None:
    """Its first three lines: processors round differently, and later a greedy reply goes another way."""
    command = 'mien run "What happened at the party?" --steer "0.8*fear" --compare --max-tokens 32'
    assert run(*shlex.split(command)[1:]).splitlines()[:3] == shown(command)[:3]


def test_files_that_are_linked_exist() -> None:
    files = re.findall(r"\]\(([^)#:]+)\)", README)
    assert files
    assert all((Path(__file__).parents[1] / file).exists() for file in files)
