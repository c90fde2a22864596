"""`mien import`: vectors of other programs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Number, json_option, print_json, require_new

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..interchange import Imported

file = click.Path(path_type=Path)
# Not from interchange, which loads NumPy: `mien --help` must not.
FORMATS = ("auto", "mien", "repeng", "llama.cpp-generator", "steering-vectors", "npz", "safetensors")


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=file, metavar="FILE...")
@click.option(
    "--from", "format", type=click.Choice(FORMATS), default="auto", show_default=True, help="Source format."
)
@click.option("--name", help="The vector's name. Default: the one in the file, or the file's name.")
@click.option("--shift", type=click.IntRange(-9999, 9999), default=0, help="Add this to each row's block.")
@click.option("--architecture", default="", help="Of the model: llama, mistral, ...")
@click.option("--model", type=file, help="The model: its GGUF file, or a transformers model's folder.")
@click.option("--keep-last", is_flag=True, help="Keep repeng's row for the last block.")
@click.option("--scale", type=Number(), default=1.0, help="Bake in this factor.")
@click.option("--out", "-o", type=file, default=Path("."), help="Folder for NAME.gguf. Default: here.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@json_option
def import_(
    files: tuple[Path, ...],
    format: str,
    name: str | None,
    shift: int,
    architecture: str,
    model: Path | None,
    keep_last: bool,
    scale: float,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Import vectors from other tools.

    \b
    mien import happy.gguf --from repeng --model model.gguf --out vectors/
    mien import happy.pt --architecture mistral
    mien import rows.npz --shift -1 --model model.gguf

    Reads GGUF of repeng and of llama.cpp's generator, what torch.save wrote of a SteeringVector (nothing
    in it is executed), .npz and .safetensors. Assumptions are reported on stderr.
    """
    if name is not None and len(files) != 1:
        raise click.UsageError("--name goes with one FILE")
    if name is not None and not name.isidentifier():
        raise click.UsageError(f"{name!r} can't be written in a recipe: letters, digits and _ only")
    from ..interchange import read, rescaled

    fingerprint = _fingerprint(model)
    found: dict[Path, tuple[Path, Imported]] = {}
    for path in files:
        imported = read(
            path,
            format,
            name=name,
            shift=shift,
            architecture=architecture,
            model=fingerprint,
            keep_last=keep_last,
        )
        imported = _fit_to_write(path, imported)
        if scale != 1.0:
            imported = replace(imported, vector=rescaled(imported.vector, scale))
        target = out / f"{imported.vector.name}.gguf"
        if target in found:
            raise click.UsageError(
                f"{found[target][0]} and {path} both become {target}: import one, by --name"
            )
        require_new(target, force, "--out, --name")
        found[target] = path, imported
    report = []
    for target, (path, imported) in found.items():
        vector = imported.vector
        vector.save(target)
        for note in imported.notes:
            click.echo(f"{path}: {note}", err=True)
        report.append(
            {
                "name": vector.name,
                "file": str(target),
                "format": imported.format,
                "architecture": vector.model_hint,
                "n_embd": vector.width,
                "layers": list(vector.layers),
                "notes": list(imported.notes),
                "meta": dict(vector.meta),
            }
        )
        if not as_json:
            click.echo(f"{target}: {vector}, {imported.format}, for {vector.model_hint}")
    if as_json:
        print_json(report)


def _fingerprint(model: Path | None) -> Fingerprint | None:
    if model is None:
        return None
    from ..modelfile import fingerprint_of

    return fingerprint_of(model)


def _fit_to_write(path: Path, imported: Imported) -> Imported:
    """With a name that a recipe can have. Raises VectorError where the architecture is not known."""
    from ..errors import VectorError

    vector, notes = imported.vector, imported.notes
    if not vector.model_hint:
        raise VectorError(
            f"{path}: it does not say for which architecture it is, and the format needs it: give --model, "
            f"or --architecture such as llama"
        )
    if not vector.name.isidentifier():
        name = re.sub(r"\W", "_", vector.name)
        name = name if name.isidentifier() else f"_{name}"
        notes = (*notes, f"{vector.name!r} can't be written in a recipe: it was named {name}")
        vector = replace(vector, name=name)
    return replace(imported, vector=vector, notes=notes)
