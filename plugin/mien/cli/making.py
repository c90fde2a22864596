"""`mien extract` and `mien pack`: making vectors and packs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    Number,
    json_option,
    model_option,
    not_calibrated,
    print_json,
    require_new,
    threads_option,
)
from .progress import noticed, stages

if TYPE_CHECKING:
    from ..pack import Pack
    from ..vector import Vector

file = click.Path(path_type=Path)
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")  # no model has more blocks


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--positive", type=file, multiple=True, help="Texts of the positive pole, one a line.")
@click.option("--negative", type=file, multiple=True, help="Texts of the negative pole. May be repeated.")
@click.option("--group", type=file, help="Folder with NAME.txt for each NAME: each against the mean of all.")
@click.option("--template", type=file, help="Lines with {} where each text goes.")
@click.option(
    "--ask",
    type=file,
    help="Questions, one a line: the texts are personas then, and the model's replies under them are read.",
)
@click.option("--raw", is_flag=True, help="Take the texts as they stand: no chat template.")
@click.option(
    "--method",
    type=click.Choice(["mean", "pca_diff", "pca_center", "logistic", "lda"]),
    default="mean",
    show_default=True,
    help="How a direction is found. logistic and lda are probes, which edit(...) takes.",
)
@click.option(
    "--read",
    type=click.Choice(["last", "mean", "every"]),
    help="The last token (default), the mean of the reply (default with --ask), or every token of it.",
)
@click.option("--layers", metavar="A-B", help="Blocks to keep. Default: all but block 0.")
@click.option("--calibrate", type=file, help="Prompts, one a line: measure the dose and bake it in as 1.0.")
@click.option("--scale", type=Number(), help="Bake in this factor instead of measuring one.")
@click.option("--kind", type=click.Choice(["emotion", "trait"]), default="trait", show_default=True)
@click.option("--licence", default="", help="SPDX identifier to record.")
@click.option("--out", "-o", type=file, default=Path("."), help="Folder for NAME.gguf. Default: here.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@model_option
@threads_option
@json_option
def extract(
    names: tuple[str, ...],
    positive: tuple[Path, ...],
    negative: tuple[Path, ...],
    group: Path | None,
    template: Path | None,
    ask: Path | None,
    raw: bool,
    method: str,
    read: str | None,
    layers: str | None,
    calibrate: Path | None,
    scale: float | None,
    kind: str,
    licence: str,
    out: Path,
    force: bool,
    model: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make vectors from contrast texts.

    \b
    mien extract warm --positive warm.txt --negative cold.txt
    mien extract joy fear anger --group contrast/ --template template.txt
    mien extract warm --positive warm.txt --negative cold.txt --ask questions.txt

    A line is "USER TEXT => REPLY", or the user's text alone; with --ask, a system prompt such as "You are a
    warm and caring person.", the same number for each side.
    """
    pairs = bool(positive and negative)
    if pairs == bool(group) or (pairs and len(names) != 1) or (bool(positive) != bool(negative)):
        raise click.UsageError("give one NAME with --positive and --negative, or several with --group")
    if ask and (template or raw):
        raise click.UsageError("--ask puts questions to the model: it can't go with --template or --raw")
    if calibrate and scale is not None:
        raise click.UsageError("--calibrate measures what --scale would set: give one of them")
    for name in names:
        if not name.isidentifier():
            raise click.UsageError(f"{name!r} can't be written in a recipe: letters, digits and _ only")
    targets = {name: require_new(out / f"{name}.gguf", force, "--out, another NAME") for name in names}
    from .. import contrast
    from ..extraction import extract as extract_pair
    from ..extraction import extract_group
    from ..models import find_model

    patterns = contrast.read_lines(template) if template else ["{}"]

    def lines(paths: tuple[Path, ...]) -> list[str]:
        return [line for path in paths for line in contrast.read_lines(path)]

    if group:
        sides = {name: lines((group / f"{name}.txt",)) for name in names}
    else:
        sides = {"positive": lines(positive), "negative": lines(negative)}
    texts = {} if ask else {side: contrast.samples(each, patterns) for side, each in sides.items()}
    asks = contrast.read_lines(ask) if ask else []
    prompts = contrast.read_lines(calibrate) if calibrate else []
    from ..evaluation import evaluator
    from ..responses import persona_replies
    from ..runtimes.llama_text import load_llama

    path = find_model(model)
    out.mkdir(parents=True, exist_ok=True)  # before minutes of reading, not after
    with noticed(f"loading {path.name}"):
        llm = load_llama(path, n_ctx=1024, n_threads=threads)
    stage = stages()
    how: dict[str, Any] = {
        "method": method,
        "read": read or ("mean" if ask else "last"),
        "layers": _layers(layers),
        "raw": raw,
        "progress": stage("reading"),
    }
    meta: dict[str, Any] = {"kind": kind, **({"licence": licence} if licence else {})}
    with closing(evaluator(llm)) as many:
        if ask:
            texts = persona_replies(many, sides, asks, progress=stage("answering"))
            meta["replies"] = "the model's own, under personas"
        if group:
            whole = {name: {**meta, "positive": name, "negative": "the mean of the group"} for name in names}
            vectors = extract_group(many, texts, meta=whole, **how)
        else:
            poles_meta = {**meta, "positive": positive[0].stem, "negative": negative[0].stem}
            vectors = {names[0]: extract_pair(many, names[0], *texts.values(), meta=poles_meta, **how)}
        if prompts:
            vectors = {name: _calibrated(many, vector, prompts, stage) for name, vector in vectors.items()}
        elif scale is not None:
            vectors = {name: _scaled(vector, scale) for name, vector in vectors.items()}
    report = []
    for name, vector in vectors.items():
        target = targets[name]
        vector.save(target)
        if vector.calibrated is None:
            click.echo(not_calibrated(name), err=True)
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
    found = _RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise click.UsageError(f"--layers: expected a range such as 6-28, got {text!r}")
    return list(range(first, last + 1))


def _scaled(vector: Vector, scale: float) -> Vector:
    from ..calibration import bake_scale

    return bake_scale(vector, scale)


def _calibrated(many: Any, vector: Vector, prompts: list[str], stage: Any) -> Vector:
    from ..calibration import BUDGETS, bake, calibrate

    texts = [many.text([{"role": "user", "content": prompt}]) for prompt in prompts]
    budget, progress = BUDGETS[str(vector.meta["kind"])], stage(f"dosing {vector.name}")
    return bake(vector, calibrate(many, vector, texts, budget=budget, progress=progress))


def _version(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    from ..pack import is_version

    if not is_version(value):
        raise click.BadParameter(f"expected a version such as 1.0.0, got {value!r}")
    return value


def _pack_name(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    from ..pack import NAMES, is_pack_name

    if value is not None and not is_pack_name(value):
        raise click.BadParameter(f"expected {NAMES}, got {value!r}")
    return value


@click.group()
def pack() -> None:
    """Build, check, install and export packs of vectors."""


@pack.command()
@click.argument("folder", type=file)
@click.option("--name", required=True, callback=_pack_name, help="Such as smollm2-135m-instruct.")
@click.option("--version", required=True, callback=_version, help="Such as 1.0.0.")
@click.option("--licence", required=True, help="SPDX identifier.")
@click.option("--description", default="")
@json_option
def build(folder: Path, name: str, version: str, licence: str, description: str, as_json: bool) -> None:
    """Write pack.toml for the vectors in FOLDER."""
    from ..pack import Pack

    built = Pack.build(folder, name=name, version=version, licence=licence, description=description)
    _report(built, as_json, "built")


@pack.command()
@click.argument("model", required=False, metavar="[MODEL.gguf]")
@click.option("--out", "-o", type=file, help="The pack's folder. Default: its name, here.")
@click.option("--name", callback=_pack_name, help="Default: the model's name, in small letters.")
@click.option("--version", default="1.0.0", show_default=True, callback=_version)
@click.option("--licence", default="CC-BY-4.0", show_default=True, help="SPDX identifier to record.")
@click.option("--description", default="")
@click.option("--data", type=file, help="Folder of contrast data. Default: what comes with mien.")
@click.option(
    "--method",
    type=click.Choice(["trained", "mean"]),
    help="trained: by gradient, requires torch. mean: difference of means. Default: trained with torch.",
)
@click.option("--layers", metavar="A-B", help="Blocks to steer. Default: from 20% to 95% of the depth.")
@click.option(
    "--perplexity",
    type=Number(0),
    help="Maximum perplexity of replies, as a multiple of the unsteered model's.",
)
@click.option(
    "--perplexity-alone", type=Number(0), help="The same for the replies read without their prompts."
)
@click.option(
    "--repetition", type=Number(0), help="Maximum share of repeated trigrams above the unsteered replies'."
)
@click.option("--distinct", type=Number(0), help="Minimum distinct-2, as a share of the unsteered replies'.")
@threads_option
@json_option
def make(
    model: str | None,
    out: Path | None,
    name: str | None,
    version: str,
    licence: str,
    description: str,
    data: Path | None,
    method: str | None,
    layers: str | None,
    perplexity: float | None,
    perplexity_alone: float | None,
    repetition: float | None,
    distinct: float | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Build a complete pack for a chat model: extract directions, calibrate doses, evaluate.

    Resumes where it left off if interrupted.
    """
    from importlib.util import find_spec

    from ..calibration import BUDGETS
    from ..corpus import Corpus
    from ..evaluation import evaluator
    from ..making import Maker, Settings, pack_name
    from ..models import find_model
    from ..runtimes.llama_text import in_float32, load_llama

    corpus, path = Corpus.read(data), find_model(model)
    method = method or ("trained" if find_spec("torch") and find_spec("transformers") else "mean")
    given = {
        "perplexity": perplexity,
        "perplexity_alone": perplexity_alone,
        "repetition": repetition,
        "distinct": distinct,
    }
    limits = {name: value for name, value in given.items() if value is not None}
    budgets = {kind: replace(budget, **limits) for kind, budget in BUDGETS.items()}
    settings = Settings(method, tuple(_layers(layers) or ()), budgets)

    def trainable() -> Any:
        import torch

        from ..runtimes.hf_text import load_hf
        from ..threads import default_threads

        torch.set_num_threads(threads or default_threads())
        return load_hf(path)[0]

    click.echo(f"loading {path.name} ...", err=True)

    with ExitStack() as stack:
        quick = stack.enter_context(in_float32(path))
        llm = load_llama(quick, n_ctx=1024, n_threads=threads, flash_attn=True)
        stack.enter_context(closing(llm))
        many = stack.enter_context(closing(evaluator(llm)))
        name = name or pack_name(many.fingerprint)
        maker = Maker(
            many,
            corpus,
            out or Path(name),
            settings=settings,
            trainable=trainable if method == "trained" else None,
            stage=stages(announced=True),
        )
        made = maker.make(name=name, version=version, licence=licence, description=description)
    _report(made, as_json, "made")


@contextmanager
def _pack(name: str) -> Iterator[Pack]:
    """The pack of that name, or in that folder or zip, which is unpacked until the end of the context."""
    from ..install import unpacked
    from ..pack import Pack
    from ..registry import Registry

    if Path(name).is_file():
        with unpacked(name) as found:
            yield found
    elif os.path.dirname(name):
        yield Pack.read(name)
    else:
        yield Registry().pack(name)


@pack.command()
@click.argument("name", metavar="PACK")
@json_option
def verify(name: str, as_json: bool) -> None:
    """Check every vector of PACK, a name, a folder or a zip, against its manifest."""
    from ..errors import PackError

    with _pack(name) as found:
        shown = name if Path(name).is_file() else str(found.path)  # a zip's is a temporary folder
        problems = [str(problem).replace(str(found.path), shown) for problem in found.verify()]
    if as_json:
        print_json({"name": found.name, "version": found.version, "problems": problems})
        if problems:
            click.get_current_context().exit(PackError.exit_code)
    elif problems:
        raise PackError("\n".join(problems))
    else:
        click.echo(f"{found.name} {found.version}: {len(found.entries)} vectors, all as the manifest says")


@pack.command()
@click.argument("name", metavar="PACK")
@click.option("--out", "-o", type=file, help="The HTML file. Default: NAME.html here.")
@click.option("--figures", type=file, help="Write the figures as PNG files into this folder, too.")
@json_option
def report(name: str, out: Path | None, figures: Path | None, as_json: bool) -> None:
    """Write a page about PACK, a name, a folder or a zip: dose curves, layers, examples, cross effects."""
    from ..report import write_report

    with _pack(name) as found, noticed("drawing the figures"):
        written = [str(path) for path in write_report(found, out or Path(f"{found.name}.html"), figures)]
    if as_json:
        print_json({"name": found.name, "version": found.version, "files": written})
    else:
        click.echo("\n".join(written))


@pack.command()
@click.argument("source", type=file)
@click.option("--force", is_flag=True, help="Replace an installed pack of the same name.")
@json_option
def install(source: Path, force: bool, as_json: bool) -> None:
    """Install the pack in SOURCE, a folder or a zip, for this user."""
    from ..install import install as install_pack
    from ..registry import Registry

    installed = install_pack(source, force=force)
    _report(installed, as_json, "installed")
    first = Registry().pack(installed.name)
    if first.path != installed.path:
        click.echo(
            f"note: {first.path} is a pack of the same name that comes first on the search path, so this one "
            f"is not used for any name that both have. Build it under another name.",
            err=True,
        )


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
@click.argument("name", metavar="PACK")
@click.option(
    "--format",
    type=click.Choice(["zip", "llama.cpp", "repeng", "steering-vectors", "npz", "safetensors"]),
    default="zip",
    show_default=True,
    help="A zip for mien, or a folder with a file for each vector.",
)
@click.option("--out", "-o", type=file, help="Default: NAME-VERSION.zip here, or the folder NAME-FORMAT.")
@click.option("--force", is_flag=True, help="Replace an existing zip, or the folder of an earlier export.")
@json_option
def export(name: str, format: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a pack as a zip that `mien pack install` takes, or for other programs.

    PACK is a name, a folder or a zip.
    """
    from ..install import export as export_pack

    with _pack(name) as found:
        if format == "zip":
            target = export_pack(found, out or Path(f"{found.name}-{found.version}.zip"), force=force)
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
