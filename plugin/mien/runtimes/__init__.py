"""What runs the model: one module a runtime. A new one is a module that implements `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RuntimeNotSupported
from .wrappers import homes_of, unwrap

if TYPE_CHECKING:
    from ..registry import Registry
    from ..steering import Steering


def init_from_model(model: Any, parameters: Any, path: str = "auto") -> Any:
    """As llama_cpp.llama_init_from_model, and `attach` takes the context; see runtimes.llama_context."""
    from .llama_context import init_from_model

    return init_from_model(model, parameters, path)


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

    Raises RuntimeNotSupported if it is no such model, is closed, has no weights, or, in llama.cpp, is
    attached already. On error the model is as it was.
    """
    from ..steering import Steering

    if path not in ("auto", "in-graph", "post-compute"):
        raise ValueError(f"path: expected auto, in-graph or post-compute, got {path!r}")
    model = unwrap(model)
    # Told by the names of its classes, so that no runtime is imported for a model of another.
    homes = set(homes_of(model))
    if "llama_cpp.Llama" in homes:
        from .llama import LlamaRuntime

        return Steering(LlamaRuntime(model, path=path, mix_cache=mix_cache), registry)
    if "llama_cpp.LlamaContext" in homes:
        from .llama import WrapperRuntime

        return Steering(WrapperRuntime(model, path=path), registry)
    if homes & {"builtins.int", "ctypes.c_void_p"}:
        from .llama_context import PointerRuntime

        return Steering(PointerRuntime(model), registry)
    if "transformers.PreTrainedModel" in homes:
        from .hf import HFRuntime

        return Steering(HFRuntime(model, layers=layers, tokenizer=tokenizer), registry)
    if "mien.NumpyModel" in homes:
        from .fake import NumpyRuntime

        return Steering(NumpyRuntime(model), registry)
    raise RuntimeNotSupported(
        f"expected a llama_cpp.Llama or a transformers model, got {type(model).__module__}."
        f"{type(model).__qualname__}"
    )
