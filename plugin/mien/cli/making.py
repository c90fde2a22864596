"""`mien extract`, `mien pack` and `mien bench`: making vectors and packs, and measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, model_option, print_json, progress, threads_option

if TYPE_CHECKING:
    from ..vector import Vector

file = click.Path(path_type=Path)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--positive", type=file, multiple=True, help="Texts of the positive pole, one a line.")
@click.option("--negative", type=file, multiple=True, help="Texts of the negative pole. May be repeated.")
@click.option("--group", type=file, help="Folder with NAME.txt for each NAME: each against the mean of all.")
@click.option("--template", type=file, help="Lines with {} where each text goes.")
@click.option("--raw", is_flag=True, help="Take the texts as they stand: no chat template.")
@click.option("--layers", metavar="A-B", help="Blocks to keep. Default: all but block 0.")
@click.option("--calibrate", type=file, help="Prompts, one a line: measure the dose and bake it in as 1.0.")
@click.option("--scale", type=float, help="Bake in this factor instead of measuring one.")
@click.option("--kind", type=click.Choice(["emotion", "trait"]), default="trait", show_default=True)
@click.option("--licence", default="", help="SPDX identifier to record.")
@click.option("--out", "-o", type=file, default=Path("."), help="Folder for NAME.gguf. Default: here.")
@model_option
@threads_option
@json_option
def extract(
    names: tuple[str, ...],
    positive: tuple[Path, ...],
    negative: tuple[Path, ...],
    group: Path | None,
    template: Path | None,
    raw: bool,
    layers: str | None,
    calibrate: Path | None,
    scale: float | None,
    kind: str,
    licence: str,
    out: Path,
    model: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make vectors from contrast texts: a difference of means, a block.

    \b
    mien extract warm --positive warm.txt --negative cold.txt
    mien extract joy fear anger --group contrast/ --template template.txt

    A line is "USER TEXT => REPLY OPENING", or the user's text alone; the last token is read.
    """
    pairs = bool(positive and negative)
    if pairs == bool(group) or (pairs and len(names) != 1) or (bool(positive) != bool(negative)):
        raise click.UsageError("give one NAME with --positive and --negative, or several with --group")
    if calibrate and scale is not None:
        raise click.UsageError("--calibrate measures what --scale would set: give one of them")
    for name in names:
        if not name.isidentifier():
            raise click.UsageError(f"{name!r} can't be written in a recipe: letters, digits and _ only")
    from .. import contrast
    from ..extraction import extract as extract_pair
    from ..extraction import extract_group
    from ..models import find_model

    patterns = contrast.read_lines(template) if template else ["{}"]

    def read(paths: tuple[Path, ...]) -> list[contrast.Sample]:
        return contrast.samples([line for path in paths for line in contrast.read_lines(path)], patterns)

    members = {name: read((group / f"{name}.txt",)) for name in names} if group else {}
    poles = (read(positive), read(negative)) if pairs else ([], [])
    prompts = contrast.read_lines(calibrate) if calibrate else []
    from ..runtimes.llama_text import load_llama

    path = find_model(model)
    llm = load_llama(path, n_ctx=1024, n_threads=threads, n_batch=1024)
    kept = _layers(layers)
    meta: dict[str, Any] = {"kind": kind, **({"licence": licence} if licence else {})}
    if group:
        vectors = extract_group(
            llm,
            members,
            layers=kept,
            raw=raw,
            meta={name: {**meta, "positive": name, "negative": "the mean of the group"} for name in names},
            progress=progress("reading"),
        )
    else:
        name = names[0]
        poles_meta = {"positive": positive[0].stem, "negative": negative[0].stem}
        made = extract_pair(
            llm, name, *poles, layers=kept, raw=raw, meta={**meta, **poles_meta}, progress=progress("reading")
        )
        vectors = {name: made}
    if prompts:
        vectors = _calibrated(llm, vectors, prompts)
    elif scale is not None:
        vectors = {name: _scaled(vector, scale) for name, vector in vectors.items()}
    report = []
    for name, vector in vectors.items():
        target = out / f"{name}.gguf"
        vector.save(target)
        report.append(
            {"name": name, "file": str(target), "layers": list(vector.layers), "meta": dict(vector.meta)}
        )
        if not as_json:
            click.echo(f"{target}: {vector}, scale {vector.meta['scale']:.3g} of the raw difference")
    if as_json:
        print_json(report)


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
        raise click.UsageError(f"--layers: expected a range such as 6-28, got {text!r}")
    return list(range(int(first), int(last or first) + 1))


def _scaled(vector: Vector, scale: float) -> Vector:
    from ..calibration import bake_scale

    return bake_scale(vector, scale)


def _calibrated(llm: Any, vectors: dict[str, Vector], prompts: list[str]) -> dict[str, Vector]:
    from ..calibration import bake, calibrate
    from ..runtimes import attach

    with attach(llm) as steering:
        return {
            name: bake(vector, calibrate(llm, steering, vector, prompts, progress=progress(f"dosing {name}")))
            for name, vector in vectors.items()
        }


@click.group()
def pack() -> None:
    """Build, check, install and export packs of vectors."""


@pack.command()
@click.argument("folder", type=file)
@click.option("--name", required=True, help="Such as smollm2-135m-instruct.")
@click.option("--version", required=True)
@click.option("--licence", required=True, help="SPDX identifier.")
@click.option("--description", default="")
@json_option
def build(folder: Path, name: str, version: str, licence: str, description: str, as_json: bool) -> None:
    """Write pack.toml for the vectors in FOLDER."""
    from ..pack import Pack

    built = Pack.build(folder, name=name, version=version, licence=licence, description=description)
    _report(built, as_json, "built")


@pack.command()
@click.argument("folder", type=file)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check every vector of the pack in FOLDER against its manifest."""
    from ..errors import PackError
    from ..pack import Pack

    found = Pack.read(folder)
    problems = [str(problem) for problem in found.verify()]
    if as_json:
        print_json({"name": found.name, "version": found.version, "problems": problems})
        if problems:
            click.get_current_context().exit(PackError.exit_code)
    elif problems:
        raise PackError("\n".join(problems))
    else:
        click.echo(f"{found.name} {found.version}: {len(found.entries)} vectors, all as the manifest says")


@pack.command()
@click.argument("source", type=file)
@click.option("--force", is_flag=True, help="Replace an installed pack of the same name.")
@json_option
def install(source: Path, force: bool, as_json: bool) -> None:
    """Install the pack in SOURCE, a folder or a zip, for this user."""
    from ..install import install as install_pack

    _report(install_pack(source, force=force), as_json, "installed")


@pack.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Remove an installed pack."""
    from ..install import remove as remove_pack

    path = remove_pack(name)
    if as_json:
        print_json({"removed": name, "path": str(path)})
    else:
        click.echo(f"removed {path}")


@pack.command()
@click.argument("name")
@click.option(
    "--format",
    type=click.Choice(["zip", "llama.cpp", "repeng", "steering-vectors", "npz", "safetensors"]),
    default="zip",
    show_default=True,
    help="A zip for mien, or a folder with a file for each vector.",
)
@click.option("--out", "-o", type=file, help="Default: NAME-VERSION.zip here, or the folder NAME-FORMAT.")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier export.")
@json_option
def export(name: str, format: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a pack as a zip that `mien pack install` takes, or for other programs.

    NAME may be a pack's folder.
    """
    from ..errors import NameNotFound
    from ..install import export as export_pack
    from ..pack import Pack
    from ..registry import Registry

    known = {found.name: found for found in reversed(Registry().packs())}
    if name in known:
        found = known[name]
    elif Path(name).is_dir():
        found = Pack.read(name)
    else:
        raise NameNotFound(name, known, what="pack")
    if format == "zip":
        target = export_pack(found, out or Path(f"{found.name}-{found.version}.zip"))
    else:
        from ..exporting import export as export_folder

        target = export_folder(found, out or Path(f"{found.name}-{format}"), format, force=force)
    if as_json:
        data: dict[str, Any] = {"name": found.name, "version": found.version, "format": format}
        data["file"] = str(target)
        if format != "zip":
            data["files"] = sorted(str(path) for path in target.iterdir())
        print_json(data)
    else:
        click.echo(str(target))


def _report(found: Any, as_json: bool, verb: str) -> None:
    if as_json:
        print_json(
            {
                "name": found.name,
                "version": found.version,
                "path": str(found.path),
                "vectors": list(found.entries),
            }
        )
    else:
        click.echo(f"{verb} {found.name} {found.version}: {', '.join(found.entries)} ({found.path})")


@click.command()
@model_option
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(10), default=200, show_default=True, help="Tokens a case.")
@click.option("--out", "-o", type=file, help="Write the figures as JSON to this file, too.")
@json_option
def bench(model: str | None, threads: int, rounds: int, out: Path | None, as_json: bool) -> None:
    """Measure what steering costs, as ratios in one process."""
    from .. import bench as measure
    from ..models import find_model
    from ..timing import table

    path = find_model(model)
    rows = measure.run(path, threads, rounds, say=lambda what: click.echo(f"measuring {what}", err=True))
    data = measure.as_json(rows, path, threads)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=2) + "\n")
    if as_json:
        print_json(data)
    else:
        click.echo(table(rows))
