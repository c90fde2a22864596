"""The command line. Data goes to stdout, everything said about it to stderr.

Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 name, file or model not found, 4 broken file or pack,
5 model mismatch, 6 runtime or extra missing, 7 steering not applied, 130 interrupted.

Commands import what they need when they run: `mien --help` and `mien list` load no runtime.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import MienError, MienWarning, MissingExtra
from .checking import doctor
from .exchanging import import_
from .making import extract, pack
from .measuring import bench
from .showing import info, list_
from .talking import chat, run

_EXTRAS = {
    "llama_cpp": "llama",
    "matplotlib": "report",
    "safetensors": "hf",
    "torch": "hf",
    "transformers": "hf",
}


def _one_line(show: Any) -> Any:
    """A `showwarning` that prints mien's warnings without a place in the source, and others as `show`."""

    def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, MienWarning):
            click.echo(f"warning: {message}", err=True)
        else:
            show(message, category, *where, **more)

    return show_warning


class _Commands(click.Group):
    """Ends with mien's exit codes. A mistake is one message; only a bug keeps its traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        plain: Callable[..., Any] = super().main
        code = _exit_code(lambda: plain(*args, standalone_mode=False, **extra))
        return sys.exit(code) if standalone_mode else code

    def invoke(self, context: click.Context) -> Any:
        with warnings.catch_warnings():  # restores showwarning
            warnings.showwarning = _one_line(warnings.showwarning)
            return super().invoke(context)


def _exit_code(command: Callable[[], Any]) -> int:
    """Run `command`; the code to end with, the message for it printed."""
    try:
        code = command()
        sys.stdout.flush()  # what can't be written is an error here, and not after the end
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _end("\ninterrupted", 130)
    except click.ClickException as error:
        return _end(error, error.exit_code)
    except BrokenPipeError:  # whoever read the output has enough
        return _end(None, 1)
    except MienError as error:
        return _end(f"{type(error).__name__}: {error}", error.exit_code)
    except ModuleNotFoundError as error:
        if error.name == "mien._engine":  # a checkout that was not installed
            return _end("mien's C engine is not built: install mien again, with a C compiler", 6)
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        missing = MissingExtra(module, _EXTRAS[module])
        return _end(f"MissingExtra: {missing}", missing.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _end(f"Error: {where}{error.strerror or error}", 1)
    except MemoryError:
        return _end("Error: not enough memory", 1)


def _end(message: str | click.ClickException | None, code: int) -> int:
    """Print `message` on stderr; what no stream takes any more is dropped, so that Python's end is quiet."""
    try:
        if isinstance(message, click.ClickException):
            message.show()
        elif message is not None:
            click.echo(message, err=True)
    except OSError:
        pass  # there is nobody left to tell
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mien")
def cli() -> None:
    """Steer a running language model's tone and personality.

    \b
    mien run "How was your day?" --steer "0.8*joy"
    mien list
    """


for command in (run, chat, list_, info, extract, import_, pack, doctor, bench):
    cli.add_command(command)


def main() -> NoReturn:
    """The entry point: the commands, with streams that take any text."""
    _prepare_streams()
    sys.exit(cli.main(standalone_mode=False))


def _prepare_streams() -> None:
    """Write what an encoding lacks as an escape, and read bytes that are no text as surrogates, to be refused
    by name. A stream that is closed is an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # until the end
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
