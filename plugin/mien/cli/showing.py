"""`mien list` and `mien info`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import NameNotFound
from .options import json_option, print_json

if TYPE_CHECKING:
    from ..pack import Entry, Pack
    from ..vector import Vector


@click.command("list")
@click.argument("query", required=False)
@click.option("--model", metavar="TEXT", help="Only packs whose name, or model's name, contains TEXT.")
@json_option
def list_(query: str | None, model: str | None, as_json: bool) -> None:
    """List the vectors of every pack on the search path.

    QUERY: only those whose name, poles or related words contain it, such as "happy" or "grumpy".
    """
    from ..registry import Registry, described

    registry = Registry()
    everything = registry.packs()
    packs = [
        pack
        for pack in everything
        if not model or model.lower() in f"{pack.name} {pack.fingerprint.name}".lower()
    ]
    found: list[tuple[Pack, dict[str, Entry]]] = [
        (pack, {name: e for name, e in pack.entries.items() if not query or described(query, name, e)})
        for pack in packs
    ]
    found = [(pack, entries) for pack, entries in found if entries]
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "pack": pack.name,
                    "namespaced": f"{pack.namespace}.{name}",
                    "version": pack.version,
                    "kind": entry.kind,
                    "positive": entry.positive,
                    "negative": entry.negative,
                    "site": entry.site,
                    "rank": entry.rank,
                    "weak": entry.weak,
                    "model": pack.fingerprint.as_dict(),
                    "file": str(pack.path / entry.file),
                }
                for pack, entries in found
                for name, entry in entries.items()
            ]
        )
    else:
        for pack, entries in found:
            click.echo(f"{pack.name} {pack.version}, for {pack.fingerprint}")
            click.echo(f"  {pack.path}")
            width = max(16, *map(len, entries))
            for name, entry in entries.items():
                poles = f"{entry.positive} / {entry.negative}" if entry.negative else entry.positive
                plain = entry.site == "residual" and entry.rank == 1
                marks = [
                    *([] if plain else [_where(entry.site, entry.rank)]),
                    *(["weak"] if entry.weak else []),
                ]
                said = f"  ({', '.join(marks)})" if marks else ""
                click.echo(f"  {name:{width}} {entry.kind:8} {poles}{said}".rstrip())
        if not everything:
            click.echo("no packs found; `mien doctor` shows where it looked", err=True)
    for problem in registry.problems:
        click.echo(f"left out: {problem.error}", err=True)  # which names the path
    if everything and not packs:
        click.echo(f"none of {len(everything)} packs has {model!r} in its name or model", err=True)
    elif everything and not found:
        count = sum(len(pack.entries) for pack in packs)
        click.echo(f"none of {count} vectors matches {query!r}; `mien list` shows all", err=True)
    if everything and not found:
        click.get_current_context().exit(NameNotFound.exit_code)


@click.command()
@click.argument("name")
@json_option
def info(name: str, as_json: bool) -> None:
    """Show a vector: how well it works, where it acts, its metadata and dose curve. NAME may be a file."""
    from ..registry import load

    vector = load(name)
    if as_json:
        print_json(
            {
                "name": vector.name,
                "layers": list(vector.layers),
                "site": vector.site,
                "rank": vector.rank,
                "width": vector.width,
                "norm": vector.norm(),
                "digest": vector.digest,
                "calibrated": vector.calibrated,
                "limits": vector.limits,
                "model": vector.fingerprint.as_dict() if vector.fingerprint else None,
                "model_hint": vector.model_hint,
                "meta": dict(vector.meta),
            }
        )
        return
    meta = dict(vector.meta)
    click.echo(f"{vector.name}: {len(vector.layers)} layers, {vector.layers[0]} to {vector.layers[-1]}")
    click.echo(f"  model     {vector.fingerprint or vector.model_hint or 'not said'}")
    meta["site"] = _where(vector.site, vector.rank)
    for key, said in _worth(vector).items():
        click.echo(f"  {key:9} {said}")
    click.echo()
    strength, bias, center = (meta.pop(key, None) for key in ("strength", "bias", "center"))
    curves: dict[str, Any] = {
        key: meta.pop(f"calibration.{key}", None)
        for key in ("dose", "perplexity", "perplexity_alone", "repetition", "distinct")
    }
    for key, value in sorted(meta.items()):
        if not isinstance(value, list) and key != "weak":
            click.echo(f"  {key:9} {value}")
    if isinstance(strength, list):
        click.echo("  strength  per layer, over the median norm of the stream: " + _span(strength))
    if isinstance(bias, list):
        click.echo("  bias      per layer, of a linear probe: " + _span(bias))
    if isinstance(center, list):
        click.echo("  center    per direction, the readout that counts as zero: " + _span(center))
    _echo_curves({key: curve for key, curve in curves.items() if isinstance(curve, list)})


def _worth(vector: Vector) -> dict[str, str]:
    """What the file says of how well the vector works: {title: text}."""
    meta = vector.meta
    found = {"dose": "not calibrated: 1 is the vector's own length, and no dose is known to be fluent"}
    if vector.calibrated and vector.limits:
        least, greatest = vector.calibrated
        measured = f"from {least:.3g} to {greatest:.3g}" if least else f"up to {greatest:.3g}"
        fluent = "fluent up to 1"
        if meta.get("calibration.holds") is False:
            fluent = "no dose was fluent, and 1 is the one that repeats least"
        low, high = vector.limits
        found["dose"] = f"measured {measured}; {fluent}; a warning below {low:.3g} and above {high:.3g}"
    effect, interval = meta.get("test.effect"), meta.get("test.effect_interval")
    if isinstance(effect, (int, float)):
        found["effect"] = f"{effect:.2f} nats per token on held-out replies"
        if isinstance(interval, list) and len(interval) == 2:
            found["effect"] += f", 95% interval {interval[0]:.2f} to {interval[1]:.2f}"
    if isinstance(effect, (int, float)) or meta.get("weak"):
        found["weak"] = f"yes: {meta['weak']}" if meta.get("weak") else "no"
    accuracy = meta.get("accuracy")
    if isinstance(accuracy, list) and len(accuracy) == len(vector.layers):
        cells = _wrapped([f"{n}: {x:.2f}" for n, x in zip(vector.layers, accuracy)])
        found["accuracy"] = f"by layer, share of held-out texts told apart (0.5 is chance)\n{cells}"
    return found


def _wrapped(cells: list[str], count: int = 8) -> str:
    rows = [cells[i : i + count] for i in range(0, len(cells), count)]
    return "\n".join(" " * 12 + "  ".join(f"{cell:>8}" for cell in row) for row in rows)


def _echo_curves(curves: dict[str, list[Any]]) -> None:
    """The dose curve as a table, if there is one."""
    if len(curves) > 1 and "dose" in curves:
        titles = {"perplexity_alone": "of replies alone"}
        columns = [titles.get(key, key) for key in curves]
        click.echo("\n  " + "".join(f"{column:>{len(column) + 2}}" for column in columns))
        for row in zip(*curves.values()):
            cells = (f"{value:{len(column) + 2}.2f}" for value, column in zip(row, columns))
            click.echo("  " + "".join(cells))


def _where(site: str, rank: int) -> str:
    return site if rank == 1 else f"{site}, {rank} directions a layer"


def _span(values: list[Any]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"
