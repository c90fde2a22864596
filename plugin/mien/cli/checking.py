"""`mien doctor`: what is installed, and what can be done with a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from ..errors import MienError, RuntimeNotSupported
from .options import json_option, print_json
from .progress import noticed

if TYPE_CHECKING:
    from ..modelfile import ModelFile
    from ..registry import Registry

Facts: TypeAlias = dict[str, dict[str, Any]]


@click.command()
@click.option(
    "--model", metavar="FILE", help="Describe this model: a GGUF file, or a transformers model's folder."
)
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Check the installation: engine, runtimes, model and packs, and how llama.cpp will be steered.

    With --model: what that model is, whether and how it can be steered, and which packs fit it.
    """
    from ..registry import Registry

    registry = Registry()
    facts, code = _installation(), 0
    if any(str(value).startswith("missing") for found in facts.values() for value in found.values()):
        code = RuntimeNotSupported.exit_code
    if model:
        facts["model"], steerable = _model(Path(model), registry)
        code = code or (0 if steerable else RuntimeNotSupported.exit_code)
    else:
        facts["model"], problem = _default_model()
        code = code or problem
    facts["packs"] = _packs(registry)
    if as_json:
        print_json(facts)
    else:
        for section, found in facts.items():
            click.echo(section)
            for key, value in found.items():
                click.echo(f"  {key:22} {_shown(value)}")
    click.get_current_context().exit(code)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _installation() -> Facts:
    import platform

    from .. import __version__

    return {
        "mien": {"version": __version__, "python": platform.python_version(), "machine": platform.machine()},
        "engine": _engine(),
        "llama.cpp": _llama(),
        "transformers": _transformers(),
    }


def _engine() -> dict[str, Any]:
    try:
        from .._engine import __file__ as file
    except ImportError as error:
        return {"extension": f"missing: {error}; install mien again with a C compiler"}
    return {"extension": Path(file).name}


def _llama() -> dict[str, Any]:
    try:
        import llama_cpp
    except ImportError:
        return {"llama-cpp-python": "missing: pip install 'mien[llama]'"}
    from ..runtimes.llama import probe_path

    path, reason = probe_path()
    return {"llama-cpp-python": llama_cpp.__version__, "path": path, "why": reason}


def _transformers() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:  # asked of the packages' metadata: importing them takes seconds
        return {name: version(name) for name in ("transformers", "torch", "accelerate")}
    except PackageNotFoundError as error:
        return {"transformers": f"not installed ({error.name}): pip install 'mien[hf]'"}


def _default_model() -> tuple[dict[str, Any], int]:
    """What is known of the default model, and the exit code."""
    from ..models import find_model

    try:
        return {"default": str(find_model())}, 0
    except MienError as error:
        return {"default": f"missing: {error}"}, error.exit_code


def _packs(registry: Registry) -> dict[str, Any]:
    from ..registry import search_path

    return {
        **{str(i + 1): str(path) for i, path in enumerate(search_path())},
        "found": ", ".join(f"{pack.name} {pack.version}" for pack in registry.packs()) or "none",
        **{f"left out {i + 1}": str(problem.error) for i, problem in enumerate(registry.problems)},
    }


def _model(path: Path, registry: Registry) -> tuple[dict[str, Any], bool]:
    """The facts about a model, and whether it can be steered. Raises ModelNotFound, ModelFileError."""
    from ..modelfile import describe
    from ..models import find_model

    path = find_model(path, folders=True)
    with noticed(f"reading {path.name}"):
        found = describe(path)
        steered, steerable = _steering(found)
    model = found.fingerprint
    fitting = [pack for pack in registry.packs() if not pack.fingerprint.differences(model)]
    facts = {
        "file": str(path),
        "size": found.size,
        "name": model.name,
        "architecture": model.architecture,
        "layers": model.n_layer,
        "n_embd": model.n_embd,
        "vocabulary": model.vocabulary,
        "context_length": found.n_ctx or "unknown",
        "chat_template": found.chat_template,
        **steered,
        "packs": [f"{pack.name} {pack.version}" for pack in fitting],
    }
    if steerable and not fitting:
        facts["next"] = f"no pack fits this model; {_advice(found)}"
    return facts, steerable


def _advice(found: ModelFile) -> str:
    if found.path.is_dir():
        return "make one from its GGUF file: mien pack make FILE, or vectors in Python: mien.extract"
    file = shlex.quote(str(found.path))
    if found.chat_template:
        return f"make one: mien pack make {file}"
    return (
        f"make vectors from texts: mien extract NAME --positive A.txt --negative B.txt --raw --model {file}"
    )


def _steering(found: ModelFile) -> tuple[dict[str, Any], bool]:
    """Whether and how the model can be steered: in llama.cpp it is loaded and attached to."""
    if found.path.is_dir():
        return {"runtime": "transformers"}, True
    try:
        from ..runtimes import attach
        from ..runtimes.llama_text import load_llama
    except ModuleNotFoundError as error:
        return {"steerable": False, "why": f"{error.name} is not installed"}, False
    llm = load_llama(found.path, n_ctx=64)
    try:
        with attach(llm) as steering:
            facts: dict[str, Any] = {"runtime": "llama.cpp", "steerable": True, **steering.describe()}
    except RuntimeNotSupported as error:
        return {"runtime": "llama.cpp", "steerable": False, "why": str(error)}, False
    finally:
        llm.close()
    return facts, True
