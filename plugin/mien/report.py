"""A report of a pack for people: one HTML file that needs nothing else, and the figures as PNG files.

Everything in it is read from the vectors' own files. Takes matplotlib (the extra `report`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .pack import Pack, write_whole
from .vector import Vector

INK, ACCENT, COST, MUTED = "#22302e", "#0f766e", "#b45309", "#9aa5a3"
_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#22302e;background:#fbfaf7;margin:0 auto;max-width:68rem;
padding:2rem}
h1{font-size:1.9rem;margin:0}
h2{margin:3rem 0 .3rem;border-top:1px solid #ddd8cc;padding-top:1.2rem;text-transform:capitalize}
h3{margin:0 0 .2rem;font-size:1.25rem}
p.lead,.tag,td.q{color:#5c6664} p.lead{margin:.2rem 0 1.2rem} .tag{font-size:.85rem} td.q{white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{text-align:left;color:#5c6664;font-weight:600}
th,td{padding:.3rem .6rem;border-bottom:1px solid #e8e4da;vertical-align:top}
th.n,td.n{text-align:right} td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
img{max-width:100%} a{color:#0f766e;text-decoration:none}
section{margin:2.2rem 0;padding:1.4rem;background:#fff;border:1px solid #e8e4da;border-radius:10px}
.weak{background:#fef3c7;color:#92400e;border-radius:4px;padding:0 .4rem;font-size:.8rem}
"""
_LEAD = (
    "Effect is by how much full dose raises the mean log-probability a token of replies of the pole "
    "over those of its opposite, on questions that took no part in making the vector; in brackets the "
    "95% interval of a bootstrap. Random is the largest effect of random directions as long. Monotone "
    "is Spearman's correlation of dose and effect over nine doses. Perplexity is that of replies at full "
    "dose under the unsteered model, as a multiple of its own replies': as answers to their prompts, and "
    "read alone, where the manner costs little and broken text does. "
    "Accuracy is how often the readout of the best layer tells new replies of the pole."
)


def write_report(pack: Pack, target: Path, figures: Path | None = None) -> list[Path]:
    """Write the report of `pack` to `target`, and its figures to the folder `figures`. Returns all files.

    Raises ModuleNotFoundError without matplotlib, PackError for a broken pack or a target that can't be
    written.
    """
    vectors = [pack.load(name) for name in pack.entries]
    drawn: dict[str, bytes] = {}
    for family, members in _families(vectors).items():
        if (map_ := _leakage_map(members)) is not None:
            drawn[f"leakage-{family}"] = map_
    if (across := _readout_map(vectors)) is not None:
        drawn["readout"] = across
    for vector in vectors:
        drawn[vector.name] = _figure_of(vector)
    write_whole(target, _page(pack, vectors, drawn).encode())
    written = [target]
    if figures is not None:
        for name, data in drawn.items():
            write_whole(figures / f"{name}.png", data)
            written.append(figures / f"{name}.png")
    return written


def _families(vectors: Iterable[Vector]) -> dict[str, list[Vector]]:
    found: dict[str, list[Vector]] = {}
    for vector in vectors:
        found.setdefault(str(vector.meta.get("family") or vector.meta.get("kind") or "vectors"), []).append(
            vector
        )
    return found


# ---- figures ----


def _png(draw: Any, width: float, height: float, columns: int = 1) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=INK)
    draw(figure, axes)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _figure_of(vector: Vector) -> bytes:
    """Effect and cost by dose, and the profile over layers."""
    meta = vector.meta

    def draw(_figure: Any, axes: Any) -> None:
        effect, cost, layers = axes
        doses, effects = _series(meta, "test.dose", "test.curve")
        effect.plot(doses, effects, "o-", color=ACCENT, ms=4)
        for k, random in enumerate(_numbers(meta.get("test.random_effect"))):
            effect.plot([1], [random], "x", color=MUTED, label=None if k else "random directions")
        effect.axhline(0, color=MUTED, lw=0.8)
        effect.set_title("Effect: nats a token towards the pole", fontsize=9, color=INK)
        effect.set_xlabel("dose", fontsize=8)
        if meta.get("test.random_effect"):
            effect.legend(fontsize=7, frameon=False)
        doses, values = _series(meta, "calibration.dose", "calibration.perplexity")
        if len(values):
            cost.plot(doses, values / values[0], "o-", color=COST, ms=4, label="perplexity, times unsteered")
            cost.axhline(float(meta["calibration.perplexity_budget"]), color=COST, lw=0.8, ls=":")  # type: ignore[arg-type]
            doses, values = _series(meta, "calibration.dose", "calibration.perplexity_alone")
            if len(values):
                cost.plot(doses, values / values[0], "^--", color=COST, ms=3, lw=1, label="of replies alone")
            doses, repeated = _series(meta, "calibration.dose", "calibration.repetition")
            other = cost.twinx()
            other.plot(doses, repeated, "s--", color=INK, ms=3, lw=1, label="repeated trigrams")
            other.set_ylim(0, max(0.3, float(repeated.max()) * 1.1))
            other.tick_params(labelsize=8, colors=INK)
            handles = [line for line in cost.get_lines() if not str(line.get_label()).startswith("_")]
            handles += other.get_lines()
            cost.legend(
                handles, [line.get_label() for line in handles], fontsize=7, frameon=False, loc="upper left"
            )
            cost.axvline(1, color=MUTED, lw=0.8)
        cost.set_title("Cost: what full dose was chosen by", fontsize=9, color=INK)
        cost.set_xlabel("dose", fontsize=8)
        layers.bar(
            vector.layers, _numbers(meta.get("strength")) or [0] * len(vector.layers), color=MUTED, width=0.8
        )
        layers.set_ylabel("length / stream", fontsize=8)
        layers.set_title("By layer: length, and accuracy of its readout", fontsize=9, color=INK)
        accuracy = _numbers(meta.get("accuracy"))
        if len(accuracy) == len(vector.layers):
            other = layers.twinx()
            other.plot(vector.layers, accuracy, "-", color=ACCENT)
            other.set_ylim(0.4, 1.02)
            other.tick_params(labelsize=8, colors=ACCENT)
        layers.set_xlabel("block", fontsize=8)

    return _png(draw, 11, 2.7, 3)


def _leakage_map(vectors: Sequence[Vector]) -> bytes | None:
    found = _matrix(vectors, "leakage.names", "leakage.effect")
    return _map(*found, "read as", "nats a token") if found else None


def _readout_map(vectors: Sequence[Vector]) -> bytes | None:
    found = _matrix(vectors, "readout.names", "readout.moved")
    if found is None:
        return None
    values, names = found
    own = np.abs(np.diag(values))[:, None]
    return _map(values / np.where(own > 0, own, 1), names, "readout of", "share of its own")


def _matrix(vectors: Sequence[Vector], columns: str, row: str) -> tuple[Any, list[str]] | None:
    """(values, names): a row of each vector's metadata; None where not all of them have it."""
    names = [str(name) for name in _list(vectors[0].meta.get(columns))]
    found = {vector.name: _numbers(vector.meta.get(row)) for vector in vectors}
    if len(names) < 2 or any(len(found.get(name, [])) != len(names) for name in names):
        return None
    return np.array([found[name] for name in names]), names


def _map(values: Any, names: Sequence[str], columns: str, unit: str) -> bytes:
    size = 2.2 + 0.24 * len(names)

    def draw(figure: Any, axes: Any) -> None:
        bound = float(np.abs(values).max()) or 1.0
        image = axes[0].imshow(values, cmap="BrBG", vmin=-bound, vmax=bound)
        axes[0].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes[0].set_yticks(range(len(names)), names, fontsize=7)
        axes[0].set_xlabel(columns, fontsize=8)
        axes[0].set_ylabel("steered by", fontsize=8)
        bar = figure.colorbar(image, ax=axes[0], shrink=0.7)
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=7)

    return _png(draw, size + 1, size)


# ---- the page ----


def _page(pack: Pack, vectors: Sequence[Vector], drawn: dict[str, bytes]) -> str:
    families = _families(vectors)
    weak = sum(bool(vector.meta.get("weak")) for vector in vectors)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(pack.name)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{escape(pack.name)} {escape(pack.version)}</h1>",
        f"<p class=lead>{escape(pack.description)} {len(vectors)} vectors for "
        f"{escape(str(pack.fingerprint))}; {weak} marked as weak. Licence: {escape(pack.licence)}.</p>",
        f"<p>{_LEAD}</p>",
        _table(families),
    ]
    for family, members in families.items():
        parts.append(f"<h2>{escape(family.replace('_', ' '))}</h2>")
        if f"leakage-{family}" in drawn:
            parts.append("<p class=lead>What full dose of each (rows) does to the others (columns).</p>")
            parts.append(_image(drawn[f"leakage-{family}"], f"leakage in {family}"))
        parts += [_section(vector, drawn[vector.name]) for vector in members]
    if "readout" in drawn:
        parts.append(
            "<h2>Readouts across the pack</h2><p class=lead>How far full dose of each moves the readout "
            "of every other, as a share of its own.</p>"
        )
        parts.append(_image(drawn["readout"], "readouts"))
    return "\n".join([*parts, "</html>\n"])


def _table(families: dict[str, list[Vector]]) -> str:
    head = (
        "<table><tr><th>vector<th>poles<th class=n>effect<th class=n>random<th class=n>monotone"
        "<th class=n>perplexity<th class=n>alone<th class=n>repetition<th class=n>accuracy</tr>"
    )
    rows = [_row(vector) for members in families.values() for vector in members]
    return f"{head}{''.join(rows)}</table>"


def _row(vector: Vector) -> str:
    meta = vector.meta
    interval = _numbers(meta.get("test.effect_interval"))
    effect = f"{meta['test.effect']:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "-"
    random, accuracy = _numbers(meta.get("test.random_effect")), _numbers(meta.get("accuracy"))
    repeated = _at_full(meta, "calibration.repetition")
    cells = [
        effect,
        f"{max(random):.2f}" if random else "-",
        f"{meta['test.spearman']:.2f}" if "test.spearman" in meta else "-",
        _times_unsteered(meta, "calibration.perplexity"),
        _times_unsteered(meta, "calibration.perplexity_alone"),
        f"{repeated:.2f}" if repeated is not None else "-",
        f"{max(accuracy):.0%}" if accuracy else "-",
    ]
    poles = f"{escape(str(meta.get('positive', '')))} / {escape(str(meta.get('negative', '')))}"
    mark = " <span class=weak>weak</span>" if meta.get("weak") else ""
    name = escape(vector.name)
    numbers = "".join(f"<td class=n>{cell}" for cell in cells)
    return f"<tr><td><a href='#{name}'>{name}</a>{mark}<td>{poles}{numbers}</tr>"


def _times_unsteered(meta: Any, key: str) -> str:
    full = _at_full(meta, key)
    return f"{full / _numbers(meta[key])[0]:.2f}x" if full is not None else "-"


def _section(vector: Vector, figure: bytes) -> str:
    meta, name = vector.meta, escape(vector.name)
    said = [f"{escape(str(meta.get('positive', '')))} / {escape(str(meta.get('negative', '')))}"]
    if meta.get("purified"):
        said.append(f"without what it shares with {escape(str(meta['purified']))}")
    elif meta.get("leakage.tried"):
        said.append(f"purified from {escape(str(meta['leakage.tried']))} it was no better")
    if meta.get("weak"):
        said.append(f"<span class=weak>weak: {escape(str(meta['weak']))}</span>")
    examples = "".join(
        f"<tr><td class=q>{dose:g}<td>{escape(str(reply))}</tr>"
        for dose, reply in zip(_numbers(meta.get("example.dose")), _list(meta.get("example.reply")))
    )
    asked = escape(str(meta.get("example.prompt", "")))
    table = f"<table><tr><th>dose<th>“{asked}”</tr>{examples}</table>" if examples else ""
    head = f"<section id='{name}'><h3>{name}</h3><p class=tag>{' · '.join(said)}</p>"
    return f"{head}{_image(figure, vector.name)}{table}</section>"


def _image(data: bytes, alt: str) -> str:
    return f"<img alt='{escape(alt)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def _at_full(meta: Any, key: str) -> float | None:
    """The value at dose 1 of a curve over the calibration's doses."""
    doses, values = _numbers(meta.get("calibration.dose")), _numbers(meta.get(key))
    return next((v for d, v in zip(doses, values) if abs(d - 1) < 1e-6), None)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in _list(value)]


def _series(meta: Any, x: str, y: str) -> tuple[Any, Any]:
    return np.array(_numbers(meta.get(x))), np.array(_numbers(meta.get(y)))
