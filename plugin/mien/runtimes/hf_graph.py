"""What graphs of torch.compile read. Nothing else of a runtime may be looked at while one is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RuntimeNotSupported
from .hf_program import Loaded
from .hf_rows import Rows
from .hf_steer import act, add_plainly
from .hf_tables import Directions, Table


class Tables:
    """Attributes: for each layer what is done there, None for nothing. (Of a dict Dynamo would have a copy,
    from before `use` added to it.)"""


class Graph:
    """What the program that is set does, for tracing.

    tables: what is done, see `use`. rows: of the pass that is being traced. hooked: where hooks are, as a
    text: a graph that was traced with others is traced again, which Dynamo would not do of itself.
    """

    def __init__(self, n_layer: int, loaded: Loaded) -> None:
        self.tables = Tables()
        self.rows: Rows | None = None
        self.loaded = loaded
        self.hooked = ""
        self._n_layer = n_layer
        self._names: dict[tuple[str, torch.device, torch.dtype], str] = {}

    @property
    def places(self) -> list[tuple[str, int]]:
        """(site, layer) where something is done."""
        found = {
            (site, layer)
            for (site, _, _), name in self._names.items()
            for layer, table in enumerate(getattr(self.tables, name))
            if table is not None
        }
        return sorted(found)

    def prepare(self, loaded: Loaded) -> None:
        """Have at hand what `take` needs. Raises VectorError if a direction does not fit into a dtype."""
        for site, device, dtype in list(self._names):
            loaded.table(site, 0, device, dtype)

    def take(self, loaded: Loaded) -> None:
        self.loaded = loaded
        for kind in list(self._names):
            self._fill(*kind)

    def use(
        self, site: str, device: torch.device, dtype: torch.dtype, made: bool, hooked: str, untold: str
    ) -> str:
        """While tracing: have the tables at hand from now on, under the name that is returned.

        made: whether there are tokens of a reply. hooked: so that Dynamo takes note of it. untold: why
        nothing is known of the rows. Raises RuntimeNotSupported where it would matter which tokens of a reply
        they are.
        """
        if untold:
            require_told(self.loaded, untold)
        if made and self.loaded.counts:
            raise RuntimeNotSupported(
                "start, stop, ramp, decay and gates that remember count the tokens of a reply, which a "
                "compiled graph can't: set another recipe, or run the model without torch.compile"
            )
        kind = site, device, dtype
        if kind not in self._names:
            self._names[kind] = f"table_{len(self._names)}"
            self._fill(*kind)
        return self._names[kind]

    def _fill(self, site: str, device: torch.device, dtype: torch.dtype) -> None:
        tables = [self.loaded.table(site, i, device, dtype) for i in range(self._n_layer)]
        setattr(self.tables, self._names[site, device, dtype], tables)


def trace(graph: Graph, site: str, layer: int, h: Tensor) -> Tensor:
    """The steered activations, as operations that torch.compile can follow.

    h: (batch, tokens, width), of a router or some MLPs (batch * tokens, width).
    """
    rows = graph.rows or alone(h)
    name = _use(graph, site, h.device, h.dtype, rows.made > 0, graph.hooked, rows.untold)
    table: Table | None = getattr(graph.tables, name)[layer]
    if table is None:
        return h
    shaped = h.reshape(rows.batch, rows.tokens, -1)
    numbers = graph.loaded.numbers(rows, h.device)
    if isinstance(table, Directions):
        steered, _ = add_plainly(shaped, table, numbers, False)
    else:
        steered, _ = act(shaped, table, numbers, rows, {})
    return steered.reshape(h.shape)


def alone(h: Tensor) -> Rows:
    """Of a layer that is compiled, or called, on its own."""
    batch, tokens = h.shape[:2] if h.dim() > 2 else (1, h.shape[0])
    return Rows(batch, tokens, tokens if tokens > 1 else 0)


def require_told(loaded: Loaded, untold: str) -> None:
    """Raise RuntimeNotSupported if these programs can't act on rows of which it is untold what they are."""
    if loaded.by_row or loaded.by_token:
        raise RuntimeNotSupported(
            f"{untold}, so that it can't be told which are a reply's: recipes for rows, windows (when, "
            "start, stop, ramp, decay) and gates that remember do not work there; set one recipe without them"
        )


def _use(
    graph: Graph, site: str, device: torch.device, dtype: torch.dtype, made: bool, hooked: str, untold: str
) -> str:
    return graph.use(site, device, dtype, made, hooked, untold)


# What torch.compiler.assume_constant_result does; that would import Dynamo, most of a second.
_use._dynamo_marked_constant = True  # type: ignore[attr-defined]
