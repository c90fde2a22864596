"""The hooks on a model's modules: they bring activations to the pass that is under way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, float32, nn
from torch.compiler import is_compiling

from ..engine import apply_at
from .hf_experts import Router
from .hf_graph import trace
from .hf_local import Capture, Local
from .hf_pass import Pass
from .hf_sites import Spot

if TYPE_CHECKING:
    from .hf import HFRuntime


class Hooked:
    """What the hook at one place needs. Without a runtime, which is how it is copied and pickled with a
    model, the hook does nothing: a copy of the model is of the plain one.
    """

    __slots__ = ("local", "number", "router", "runtime", "site")

    def __init__(
        self,
        runtime: HFRuntime | None = None,
        site: str = "residual",
        number: int = 0,
        router: Router | None = None,
    ) -> None:
        self.runtime, self.site, self.number, self.router = runtime, site, number, router
        self.local = runtime.local if runtime is not None else Local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooked:
        return Hooked()

    def __reduce__(self) -> Any:
        return Hooked, ()


def register_root(runtime: HFRuntime, model: nn.Module) -> Any:
    """Put a hook on the whole model, by which `runtime_at` finds its runtime; returns torch's handle."""
    return model.register_forward_pre_hook(partial(on_model, Hooked(runtime, "model")), prepend=True)


def runtime_at(model: nn.Module) -> HFRuntime | None:
    """The runtime that is attached to the whole of `model`."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.func is on_model and hook.args[0].runtime is not None:
            found: HFRuntime = hook.args[0].runtime
            return found
    return None


def strip(runtime: HFRuntime, model: nn.Module) -> None:
    """Take away hooks of the runtime that others have copied, as quantisation does to its modules."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_of(runtime, hook)]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def _is_of(runtime: HFRuntime, hook: Any) -> bool:
    place = hook.args[0] if isinstance(hook, partial) and hook.args else None
    return isinstance(place, Hooked) and place.runtime is runtime


def on_model(place: Hooked, module: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook before the whole model runs: its layers may be other ones by now."""
    if place.runtime is None:
        return
    if is_compiling():
        follow_traced(place.runtime)
    else:
        place.runtime.follow()


def follow_traced(runtime: HFRuntime) -> None:
    """While a graph is traced: what Dynamo comes to later has its hooks by then."""
    runtime.follow(tracing=True)


follow_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see hf_graph


def register(runtime: HFRuntime, site: str, layer: int, spot: Spot) -> Any:
    """Put a hook there; returns torch's handle."""
    place = Hooked(runtime, site, layer, spot.router)
    if site == "residual":
        return spot.module.register_forward_hook(partial(on_layer, place), prepend=True, with_kwargs=True)
    if spot.router is not None:
        return spot.module.register_forward_hook(partial(on_router, place), prepend=True)
    if spot.inward:
        return spot.module.register_forward_pre_hook(partial(on_input, place), prepend=True)
    return spot.module.register_forward_hook(partial(on_output, place), prepend=True, with_kwargs=True)


def on_layer(
    layer: Hooked, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The hook of a block, with functools.partial for its first argument.

    It runs once a layer and token, when the layer's weights have driven everything else out of the
    caches: every attribute that is looked at costs, so the common case is short and comes first.
    """
    run = layer.local.run
    if run is None:
        return _outside(layer, output)
    number = layer.number
    if number in run.acting:
        h = output[0] if type(output) is tuple else output
        whole = run.whole
        if (
            whole is not None
            and type(h) is Tensor
            and h.dtype is float32
            and h.shape == run.shape
            and h.is_cpu
            and h.is_contiguous()
            and (run.no_grad or not h.requires_grad)
            and not _given(h, args, kwargs)
        ):
            run.moved[number] = apply_at(whole, number, h.data_ptr(), run.count)
        else:
            output = _steered(run, number, output, not _given(h, args, kwargs))
    if run.observed:
        own = not _given(_of(output), args, kwargs)
        output = _observed(run, layer.local.capture, number, output, own)
    if run.trace is not None:
        run.trace.note(_of(output))
    return output


def _given(h: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module gives back what it was given, which is not changed in place: it is somebody else's."""
    for value in args:
        if value is h:
            return True
    for value in kwargs.values():  # noqa: SIM110  # a generator takes longer, and this is done for each token
        if value is h:
            return True
    return False


def _steered(run: Pass, number: int, output: Any, own: bool) -> Any:
    """The block's output after the program acted on it."""
    return _replaced(output, run.steer("residual", number, _of(output), own))


def _observed(run: Pass, capture: Capture | None, number: int, output: Any, own: bool) -> Any:
    """The block's output where somebody looks on, before and after the program acts on it."""
    readings = run.readings
    if readings is not None:
        reads = number in readings.reader.place
        if reads:
            readings.take(number, _of(output), after=False)
        if number in run.places.get("residual", ()):
            output = _steered(run, number, output, own)
            if reads:
                readings.take(number, _of(output), after=True)
    if capture is not None and number in capture.layers:
        rows = _of(output)[0, -capture.last :].to("cpu", float32, copy=True)
        capture.found[number] = rows.numpy()
    return output


def _outside(layer: Hooked, output: Any) -> Any:
    """For a layer in a graph that is being compiled, and for one that is called on its own."""
    if layer.runtime is None:
        return output
    return _replaced(output, _brought(layer, _of(output), False))


def on_output(
    place: Hooked, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The hook of an attention or an MLP."""
    h = _of(output)
    return _replaced(output, _brought(place, h, not _given(h, args, kwargs)))


def on_input(place: Hooked, module: nn.Module, args: tuple[Any, ...]) -> Any:
    """The hook before a projection, of heads or neurons."""
    return (_brought(place, args[0], True), *args[1:])


def on_router(place: Hooked, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook of a router: what it chooses follows from its logits as they are steered."""
    router, runtime = place.router, place.runtime
    if router is None or runtime is None:
        return output
    logits = output[0] if router.chooses else output
    steered = _brought(place, logits, False)
    if steered is not logits and router.chooses:
        output = router.again(steered, output, (steered != logits).any(dim=-1, keepdim=True))
    elif steered is not logits:
        output = steered
    run = place.local.run
    if runtime.counts is not None and run is not None:
        indices = output[2] if router.chooses else router.choose(steered)[1]
        runtime.counts.add(place.number, router.width, indices, run.rows.real)
    return output


def _brought(place: Hooked, h: Tensor, own: bool) -> Tensor:
    """The activations after what acts at that place; itself where nothing does. own: they may be changed."""
    runtime, site, number = place.runtime, place.site, place.number
    if runtime is None:
        return h
    run = place.local.run
    if run is None and is_compiling():
        return trace(runtime.graph, site, number, h)
    if run is None:
        run = runtime.bare(h)
    if number not in run.places.get(site, ()):
        return h
    return run.steer(site, number, h if own else h.clone(), True)


def _of(output: Any) -> Any:
    return output[0] if type(output) in (tuple, list) and output else output


def _replaced(output: Any, h: Tensor) -> Any:
    if h is _of(output):
        return output
    return type(output)([h, *output[1:]]) if type(output) in (tuple, list) else h
