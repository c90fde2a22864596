"""Fixtures for every test. No test reads or writes the user's own packs, or asks a network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A deadline of milliseconds fails where another process has the processors.
settings.register_profile("mien", deadline=None)
settings.load_profile("mien")
os.environ["HF_HUB_OFFLINE"] = "1"
# OpenMP threads that spin for long starve each other where another process has the processors.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# So each process of pytest-xdist has processors of its own, as far as there are any.
PROCESSORS: set[int] = set()
if sys.platform == "linux":
    PROCESSORS = os.sched_getaffinity(0)
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if worker and count and (own := sorted(PROCESSORS)[int(worker.removeprefix("gw")) :: int(count)]):
        os.sched_setaffinity(0, own)


@pytest.fixture(autouse=True)
def _own_user_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIEN_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.delenv("MIEN_PATH", raising=False)
    monkeypatch.delenv("MIEN_MODEL", raising=False)


@pytest.fixture
def all_processors() -> Iterator[None]:
    """For what must show with threads that run at the same time."""
    if sys.platform != "linux":
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, PROCESSORS)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The real model's file. Its absence is an error, not a skip: `make test` installs it."""
    from mien.models import find_model

    return find_model()


@pytest.fixture
def load(model_path: Path) -> Iterator[Callable[..., Any]]:
    """Loads the real model with small batches, two threads and what the test asks for."""
    from mien.runtimes.llama_text import load_llama

    loaded = []

    def load(**options: Any) -> Any:
        settings = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 32, "n_threads": 2, **options}
        loaded.append(load_llama(model_path, **settings))
        return loaded[-1]

    yield load
    for llm in loaded:
        llm.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random little model's GGUF; see tiny.py."""
    from tiny import build

    return build("llama", tmp_path_factory.mktemp("tiny")).gguf


@pytest.fixture
def load_tiny(tiny_llama: Path) -> Iterator[Callable[..., Any]]:
    """Loads `tiny_llama` with small batches, one thread and what the test asks for."""
    from mien.runtimes.llama_text import load_llama

    loaded = []

    def load(**options: Any) -> Any:
        settings = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "seed": 1, **options}
        loaded.append(load_llama(tiny_llama, **settings))
        return loaded[-1]

    yield load
    for llm in loaded:
        llm.close()
