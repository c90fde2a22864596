"""What runs the model: one module a runtime. A new one is a module that implements `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RuntimeNotSupported
from .wrappers import homes_of, unwrap

if TYPE_CHECKING:
    from ..registry import Registry
    from ..steering import Runtime, Steering


def init_from_model(model: Any, parameters: Any, path: str = "auto") -> Any:
    """As llama_cpp.llama_init_from_model, and `attach` takes the context; see runtimes.llama_context."""
    from .llama_context import init_from_model

    return init_from_model(model, parameters, path)


def free(context: Any) -> None:
    """As llama_cpp.llama_free, of a context made by `init_from_model`; see runtimes.llama_context."""
    from .llama_context import free

    free(context)


def attach(
    model: Any,
    *,
    path: str = "auto",
    mix_cache: bool = False,
    layers: str | Sequence[Any] | None = None,
    tokenizer: Any = None,
    registry: Registry | None = None,
) -> Steering:
    """Prepare `model` to be steered; nothing changes until a recipe is set.

    model: a llama_cpp.Llama, a transformers model, or of llama_cpp's low-level interface a LlamaContext or
    a llama_context that `mien.init_from_model` has made (or mien's own NumPy model,
    `mien.runtimes.fake.NumpyModel`).
    path: "auto", "in-graph" or "post-compute"; how llama.cpp's activations are reached.
    mix_cache: let a prompt's KV cache computed under another recipe be reused (not by default). Llama.cpp
    only: to transformers a cache is passed by its user.
    layers: where a transformers model has its decoder layers, if that can't be told from the model: the
    path of a module list, such as "model.layers", or the modules.
    tokenizer: of a transformers model, which does not know its vocabulary: with it vectors that were made
    for another vocabulary are refused.
    registry: where names in recipes are looked up; by default the packs on the search path.

    A model that is attached already is not attached twice: the Steering that it has is returned, with what is
    set. Raises RuntimeNotSupported if that was attached with other options, if it is no such model, is
    closed, or has no weights. On error the model is as it was.
    """
    from ..steering import ATTACHING

    if path not in ("auto", "in-graph", "post-compute"):
        raise ValueError(f"path: expected auto, in-graph or post-compute, got {path!r}")
    model = unwrap(model)
    options = {
        "type": _home(model),
        "path": path,
        "mix_cache": mix_cache,
        "layers": layers,
        "tokenizer": tokenizer,
        "registry": registry,
    }
    with ATTACHING:
        return _attached(model, options)


def _attached(model: Any, options: dict[str, Any]) -> Steering:
    from ..steering import Steering

    if (found := steering_of(model)) is not None:
        if other := [name for name, value in options.items() if found.options.get(name) != value]:
            raise RuntimeNotSupported(
                f"this model is attached already, with another {' and '.join(other)}: use "
                "mien.steering_of(model), or mien.detach(model) first"
            )
        return found
    steering = Steering(_runtime(model, options), options["registry"])
    steering.options = options
    return steering


def steering_of(model: Any) -> Steering | None:
    """The Steering of an attached model, also one whose own was dropped; None if it is not attached."""
    runtime: Runtime | None = None
    model = unwrap(model)
    match _home(model):
        case "llama_cpp.Llama" | "llama_cpp.LlamaContext":
            from . import llama

            runtime = llama.runtime_of(model)
        case "builtins.int" | "ctypes.c_void_p":
            from . import llama_context

            runtime = llama_context.runtime_of(model)
        case "transformers.PreTrainedModel":
            from . import hf

            runtime = hf.runtime_of(model)
        case "mien.NumpyModel":
            from . import fake

            runtime = fake.runtime_of(model)
    return runtime.steering if runtime is not None else None


def detach(model: Any) -> None:
    """Leave `model` as it was before attaching; nothing happens if it is not attached."""
    if (steering := steering_of(model)) is not None:
        steering.detach()


_HOMES = (
    "llama_cpp.Llama",
    "llama_cpp.LlamaContext",
    "builtins.int",
    "ctypes.c_void_p",
    "transformers.PreTrainedModel",
    "mien.NumpyModel",
)


def _home(model: Any) -> str:
    """The class that tells whose model it is, by name: no runtime is imported for another one's model."""
    names = homes_of(model)
    return next((name for name in _HOMES if name in names), "")


def _runtime(model: Any, options: dict[str, Any]) -> Runtime:
    match options["type"]:
        case "llama_cpp.Llama":
            from .llama import LlamaRuntime

            return LlamaRuntime(model, path=options["path"], mix_cache=options["mix_cache"])
        case "llama_cpp.LlamaContext":
            from .llama import WrapperRuntime

            return WrapperRuntime(model, path=options["path"])
        case "builtins.int" | "ctypes.c_void_p":
            from .llama_context import PointerRuntime

            return PointerRuntime(model)
        case "transformers.PreTrainedModel":
            from .hf import HFRuntime

            return HFRuntime(model, layers=options["layers"], tokenizer=options["tokenizer"])
        case "mien.NumpyModel":
            from .fake import NumpyRuntime

            return NumpyRuntime(model)
    raise RuntimeNotSupported(
        f"expected a llama_cpp.Llama or a transformers model, got {type(model).__module__}."
        f"{type(model).__qualname__}"
    )
