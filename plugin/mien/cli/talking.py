"""`mien run` and `mien chat`: a steered model answers."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from ..errors import MienError
from .conversation import Conversation
from .options import Number, Text, characters, json_option, model_option, print_json, threads_option
from .speakers import N_CTX, SPEAKERS, Limits, Speaker, load_speaker
from .vectorfiles import (
    VectorFiles,
    read_vectors,
    require_names,
    tell_uncalibrated,
    tell_unused,
    vector_option,
)
from .watching import watch_json, watch_lines

if TYPE_CHECKING:
    from ..steering import Applied, Steering
    from ..watch import Watch

generation_options = [
    click.option(
        "--runtime",
        type=click.Choice(list(SPEAKERS)),
        default="llama",
        show_default=True,
        help="llama: llama-cpp-python. hf: transformers, which also takes a model's folder.",
    ),
    click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True),
    click.option(
        "--temperature",
        type=Number(0),
        default=0.0,
        show_default=True,
        help="0 takes the most probable token, so the same command on the same machine prints the same text.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(1, 2**32 - 1),
        default=1,
        show_default=True,
        help="For temperatures above 0.",
    ),
    click.option(
        "--ctx",
        "n_ctx",
        type=click.IntRange(64, 2**31 - 1),
        help=f"Context, in tokens; at most what the model was trained with. Default: {N_CTX}.",
    ),
    threads_option,
]
MARGIN = 8  # tokens at least that a trimmed history leaves for the reply, and for what a count leaves out


def with_generation_options(command: Any) -> Any:
    for option in reversed(generation_options):
        command = option(command)
    return command


@click.command()
@click.argument("prompt", type=Text())
@click.option(
    "--steer", "-s", type=Text(), default="", metavar="RECIPE", help='Such as "0.8*joy - 0.3*anger".'
)
@click.option("--system", type=Text(), help="System prompt.")
@click.option("--raw", is_flag=True, help="Plain completion: no chat template.")
@click.option("--compare", is_flag=True, help="Show the plain and the steered answer side by side.")
@click.option(
    "--watch",
    "-w",
    "watched",
    multiple=True,
    metavar="NAME",
    help="Plot each token's activation along this vector (repeatable).",
)
@vector_option
@model_option
@with_generation_options
@json_option
def run(
    prompt: str,
    steer: str,
    system: str | None,
    raw: bool,
    compare: bool,
    watched: tuple[str, ...],
    vectors: tuple[str, ...],
    model: str | None,
    runtime: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    n_ctx: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer PROMPT (- reads it from stdin), steered by a recipe.

    \b
    mien run "How was your day?" --steer joy
    mien run "How was your day?" --steer "0.8*joy - 0.3*anger" --compare
    mien run "How was your day?" --steer joy --watch joy --watch anger
    mien run "How was your day?" --vector warm.gguf --steer "0.5*warm"
    """
    if raw and system:
        raise click.UsageError("--system belongs to a chat template; it can't go with --raw")
    if compare and not steer.strip():
        raise click.UsageError("--compare shows what --steer RECIPE changes: give one")
    if prompt == "-":
        prompt = _standard_input()
    if not prompt.strip():
        raise click.UsageError("the prompt is empty: give a text, or - to read it from standard input")
    from ..recipe import names_in, parse

    recipe = parse(steer)  # a mistake shows before a model is loaded
    files, names = read_vectors(vectors), names_in(recipe).union(watched)
    require_names(names, files)
    speaker = load_speaker(runtime, model, n_ctx, threads)
    steering = speaker.steering
    for name, given in files.items():
        steering.define(name, given.vector)
    tell_unused(names, files)
    tell_uncalibrated(recipe, files)
    limits = Limits(max_tokens, temperature, seed)
    program = steering.compile(steer)
    watch = steering.watch(*watched) if watched else None
    if compare:
        steering.clear()
        plain = "".join(answer(speaker, prompt, system, raw, limits))
        if watch:
            watch.clear()
    steering.set(program)
    pieces = answer(speaker, prompt, system, raw, limits)
    if as_json or compare:
        text = "".join(pieces)
        if as_json:
            result = {
                "model": str(speaker.path),
                "runtime": runtime,
                "prompt": prompt,
                "recipe": str(steering.recipe),
                **({"plain": plain} if compare else {}),
                "text": text,
                **({"watch": watch_json(watch)} if watch else {}),
                "applied": applied_json(steering.applied),
            }
            print_json(result)
        else:
            click.echo(side_by_side([("plain", plain), (steer or "plain", text)]))
    else:
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
    if watch and not as_json:
        click.echo("\n" + "\n".join(watch_lines(watch)))


@click.command()
@click.option("--steer", "-s", type=Text(), default="", metavar="RECIPE", help="The recipe to start with.")
@click.option("--system", type=Text(), help="System prompt.")
@vector_option
@model_option
@with_generation_options
def chat(
    steer: str,
    system: str | None,
    vectors: tuple[str, ...],
    model: str | None,
    runtime: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    n_ctx: int | None,
    threads: int | None,
) -> None:
    """Chat, and change the model's mood as you go.

    If the chat outgrows the context, its oldest turns are forgotten.

    \b
    /steer RECIPE   steer from the next reply on; with no argument: show the current recipe
    /clear          stop steering
    /watch NAME ... plot each token's activation along these vectors; with no argument: stop
    /applied        show what the last token's evaluation really did
    /reset          forget the conversation
    /quit           leave (so does Ctrl-D); Ctrl-C stops a reply
    """
    from ..recipe import names_in, parse

    recipe, files = parse(steer), read_vectors(vectors)
    require_names(names_in(recipe), files)
    speaker = load_speaker(runtime, model, n_ctx, threads)
    steering = speaker.steering
    for name, given in files.items():
        steering.define(name, given.vector)
    tell_uncalibrated(recipe, files)
    steering.set(recipe)
    conversation = Conversation(system)
    limits = Limits(max_tokens, temperature, seed)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() line editing

        click.echo(f"{steering.model.name}. /steer RECIPE changes its mood, /quit leaves.", err=True)
    watch: Watch | None = None
    while True:
        try:
            line = characters(_input(f"[{steering.recipe}] > " if steering.recipe.terms else "> ")).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        except UnicodeError:
            click.echo("that line is not text in UTF-8", err=True)
            continue
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line.split(" ")[0] == "/watch":
            watch = _watch(steering, line.split()[1:], watch)
        elif line.startswith("/"):
            _command(steering, line, files)
        elif line:
            if watch:
                watch.clear()
            _exchange(speaker, conversation, line, limits)
            if watch:
                click.echo("\n".join(watch_lines(watch)), err=True)


def _input(prompt: str) -> str:
    """A line of standard input; the prompt is for who types it, and never among the replies in a file."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        click.echo(prompt, nl=False, err=True)
    return input()


def _standard_input() -> str:
    """Raises MienError if it is not text."""
    try:
        return characters(sys.stdin.read())
    except UnicodeError as error:
        raise MienError(f"standard input: expected text in UTF-8, got other bytes ({error})") from error


def _watch(steering: Steering, names: list[str], before: Watch | None) -> Watch | None:
    """Watch these in place of what was watched before."""
    try:
        if names:
            return steering.watch(*names)
    except MienError as error:
        click.echo(str(error), err=True)
        return before
    if before:
        before.stop()
    return None


def _command(steering: Steering, line: str, files: VectorFiles) -> None:
    from ..recipe import names_in, parse

    word, _, rest = line.partition(" ")
    try:
        if word == "/steer" and rest.strip():
            recipe = parse(rest)
            require_names(names_in(recipe), files)
            steering.set(recipe)
            tell_uncalibrated(recipe, files)
        elif word == "/clear":
            steering.clear()
        elif word == "/applied":
            click.echo(str(steering.applied), err=True)
        elif word != "/steer":
            click.echo("/steer RECIPE, /clear, /watch NAME ..., /applied, /reset, /quit", err=True)
            return
        click.echo(f"steering: {str(steering.recipe) or 'nothing'}", err=True)
    except MienError as error:  # a mistyped recipe does not end a conversation
        click.echo(str(error), err=True)


def _exchange(speaker: Speaker, conversation: Conversation, question: str, limits: Limits) -> None:
    """A question and the reply to it, printed as it comes. What can't be answered is said, and forgotten."""
    conversation.ask(question)
    reserve = max(min(limits.max_tokens, speaker.n_ctx // 4), MARGIN)
    try:
        at_limit = speaker.n_ctx == speaker.trained
        dropped = conversation.trim(speaker.count, speaker.n_ctx - reserve, speaker.n_ctx - 1, at_limit)
        if dropped:
            turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
            click.echo(f"the context is full: {turns} forgotten", err=True)
        text = _print(speaker.chat(conversation.messages, limits, conversation.turn))
    except MienError as error:
        click.echo(str(error), err=True)
        conversation.take_back()
    else:
        conversation.answer(text)


def _print(pieces: Iterator[str]) -> str:
    """Print a reply as it comes, and return it; Ctrl-C keeps what there is of it."""
    text = ""
    with closing(pieces):  # type: ignore[type-var]  # they are generators
        try:
            for piece in pieces:
                text += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" [stopped]", err=True, nl=False)
        click.echo()
    return text


def answer(speaker: Speaker, prompt: str, system: str | None, raw: bool, limits: Limits) -> Iterator[str]:
    """The reply, piece by piece."""
    if raw:
        return speaker.complete(prompt, limits)
    messages = [{"role": "system", "content": system}] if system else []
    return speaker.chat([*messages, {"role": "user", "content": prompt}], limits)


def applied_json(applied: Applied) -> list[dict[str, Any]]:
    return [
        {"site": site, "layer": layer, "rows": done.rows, "shift": done.shift, "path": done.path}
        for site, layers in applied.places.items()
        for layer, done in layers.items()
    ]


def side_by_side(columns: list[tuple[str, str]], width: int | None = None) -> str:
    """Texts in columns, each under its title."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    room = max((width - 3 * (len(columns) - 1)) // len(columns), 20)
    wrapped = []
    for title, text in columns:
        body = [line for part in text.strip().split("\n") for line in textwrap.wrap(part, room) or [""]]
        wrapped.append([textwrap.shorten(title, room), "-" * room, *body])
    height = max(map(len, wrapped))
    rows = ([column[i] if i < len(column) else "" for column in wrapped] for i in range(height))
    return "\n".join(" | ".join(f"{cell:{room}}" for cell in row).rstrip() for row in rows)
