"""The command line. Data goes to stdout, everything said about it to stderr.

Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 name or model not found, 4 broken file or pack,
5 model mismatch, 6 runtime or extra missing, 7 steering not applied, 130 interrupted.

Commands import what they need when they run: `mien --help` and `mien list` load no runtime.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import MienError, MienWarning, MissingExtra
from .exchanging import import_
from .making import bench, extract, pack
from .showing import doctor, info, list_
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
    """Prints a MienError as one message and ends with its exit code; a bug keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings():  # restores showwarning
                warnings.showwarning = _one_line(warnings.showwarning)
                return super().invoke(context)
        except MienError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            context.exit(error.exit_code)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in _EXTRAS:
                raise
            click.echo(f"MissingExtra: {MissingExtra(module, _EXTRAS[module])}", err=True)
            context.exit(MissingExtra.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mien")
def cli() -> None:
    """Give a running language model a temper.

    \b
    mien run "How was your day?" --steer "0.8*joy"
    mien list
    """


for command in (run, chat, list_, info, extract, import_, pack, doctor, bench):
    cli.add_command(command)


def main() -> NoReturn:
    """The entry point. Ctrl-C ends with 130, a closed pipe quietly."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("\ninterrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
