from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import mien
import mien.registry
import pytest
from mien import synonyms
from mien.corpus import Corpus
from mien.errors import (
    ModelMismatch,
    NameNotFound,
    PackError,
    RecipeError,
    VectorFileError,
    VectorFileNotFound,
)
from mien.fingerprint import Fingerprint
from mien.pack import Pack
from mien.recipe import parse
from mien.registry import Registry, load, search_path, shipped_packs
from packs import MODEL, OTHER_MODEL, make_pack, make_vector


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search path of the test's own: this folder, the user's data folder beside it, and faketemper."""

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in installed(group=group) if point.name == "faketemper"]

    installed = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(mien.registry, "shipped_packs", lambda: folder)
    monkeypatch.setenv("MIEN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("MIEN_PATH", raising=False)
    return folder


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return tmp_path / "data" / "packs"


def make_package(site: Path, value: str, package: str = "faketemper") -> Path:
    """An installed package whose entry point `mien.packs` is `value`, and which must not be run."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text("raise RuntimeError('a pack was executed')\n")
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mien.packs]\n{package} = {value}\n")
    return site / package


def paths(registry: Registry) -> list[Path]:
    return [pack.path for pack in registry.packs()]


def test_search_path_is_in_the_promised_order(
    shipped: Path, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "site", "faketemper")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("MIEN_PATH", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert search_path()[:4] == [shipped, tmp_path / "a", tmp_path / "b", user]
    assert package in search_path()[4:]


def test_shipped_packs_are_those_of_the_package_or_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Path(mien.__file__).parents[2] / "vectors"
    monkeypatch.setitem(sys.modules, "mien.vectors", None)  # makes importing it fail
    assert shipped_packs() == checkout
    monkeypatch.undo()
    assert (shipped_packs() / "__init__.py").is_file()


def test_data_folder_is_the_systems_unless_overridden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert mien.registry.data_folder() == tmp_path / "data"
    monkeypatch.setenv("MIEN_DATA", "")
    assert mien.registry.data_folder().name == "mien"


def test_packs_come_in_the_order_of_the_search_path(
    shipped: Path, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "site", "faketemper")
    folders = [
        shipped / "one",
        shipped / "two",
        tmp_path / "single",
        tmp_path / "many" / "one",
        user / "one",
        package / "one",
    ]
    for folder in folders:
        make_pack(folder, vectors=["joy"])
    (tmp_path / "many" / "texts").mkdir()
    (user / ".install-1").mkdir()
    (user / ".install-1" / "pack.toml").write_text("half of one")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("MIEN_PATH", os.pathsep.join([str(tmp_path / "single"), str(tmp_path / "many")]))
    registry = Registry()
    assert paths(registry) == folders
    assert registry.problems == []
    assert [pack.path for pack in mien.registry.packs()] == folders


def test_a_pack_that_is_reached_twice_is_listed_once(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pack(user / "tiny")
    (tmp_path / "link").symlink_to(user)
    monkeypatch.setenv("MIEN_PATH", os.pathsep.join([str(tmp_path / "link"), str(user / "tiny")]))
    assert paths(Registry()) == [tmp_path / "link" / "tiny"]


def test_what_ships_wins_over_what_is_installed(shipped: Path, user: Path) -> None:
    make_pack(user / "aaa", name="aaa", vectors=["fear", "joy"], value=2.0)
    make_pack(shipped / "tiny", vectors=["joy"], value=1.0)
    registry = Registry()
    assert registry.find("joy", MODEL).rows[0, 0] == 1.0
    assert registry.find("aaa.joy", MODEL).rows[0, 0] == 2.0
    assert registry.find("fear", MODEL).rows[0, 0] == 2.0
    assert registry.find("joy").rows[0, 0] == 1.0


def test_a_namespaced_name_is_found_with_and_without_model(user: Path) -> None:
    make_pack(user / "x", name="smollm2-135m.v1")
    registry = Registry()
    for model in (MODEL, None):
        assert registry.find("smollm2_135m_v1.joy", model).name == "joy"


def test_the_model_chooses_among_packs(shipped: Path, user: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    make_pack(user / "wide", name="wide", vectors=["calm", "joy"], model=OTHER_MODEL)
    registry = Registry()
    assert registry.find("joy", OTHER_MODEL).width == 16
    assert registry.find("joy", MODEL).width == 8
    assert registry.names(OTHER_MODEL) == ["calm", "joy"]
    assert registry.names(MODEL) == ["joy"]
    assert registry.names() == ["calm", "joy"]


def test_a_quantisation_is_the_same_model(shipped: Path) -> None:
    make_pack(shipped / "tiny")
    quantised = Fingerprint("llama", 4, 8, MODEL.vocabulary, "tiny-Q4_K_M")
    assert Registry().find("joy", quantised).name == "joy"


def test_a_name_for_other_models_only_says_which_and_what_differs(shipped: Path, user: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    make_pack(user / "deep", name="deep", vectors=["joy"], model=Fingerprint("gemma3", 4, 16))
    with pytest.raises(ModelMismatch) as caught:
        Registry().find("joy", OTHER_MODEL)
    message = str(caught.value)
    assert "joy is not available for wide (llama, 4 layers, n_embd 16)" in message
    assert "pack tiny was made for n_embd 8, the model has 16" in message
    assert "pack deep was made for architecture gemma3, the model has llama" in message
    for command in ("mien pack make MODEL.gguf", "mien extract", "mien list"):
        assert command in message
    with pytest.raises(ModelMismatch, match=r"tiny\.joy is not available"):
        Registry().find("tiny.joy", OTHER_MODEL)


def test_a_vector_may_know_more_of_its_model_than_its_pack(shipped: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    manifest = shipped / "tiny" / "pack.toml"
    manifest.write_text(manifest.read_text().replace(f'vocabulary = "{MODEL.vocabulary}"\n', ""))
    with pytest.raises(ModelMismatch, match=r"joy of pack tiny is not for .*vocabulary"):
        Registry().find("joy", Fingerprint("llama", 4, 8, "ef" * 32))


def test_an_unknown_name_gives_the_nearest_for_the_model(shipped: Path, user: Path) -> None:
    make_pack(shipped / "tiny", vectors=["anger", "joy"])
    make_pack(user / "wide", name="wide", vectors=["joyous"], model=OTHER_MODEL)
    registry = Registry()
    assert nearest(registry, "joyful") == ["joy"]
    assert nearest(registry, "JOY") == ["joy"]
    assert nearest(registry, "tiny.jo") == ["tiny.joy"]
    with pytest.raises(NameNotFound, match=r"no vector named 'xyz'\. Known: anger, joy\.$"):
        registry.find("xyz", MODEL)


def nearest(registry: Registry, name: str) -> list[str]:
    with pytest.raises(NameNotFound) as caught:
        registry.find(name, MODEL)
    return caught.value.nearest


def test_an_unknown_name_gives_those_of_its_meaning_after_those_of_its_spelling(shipped: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy", "anger", "sadness", "warm", "warmth", "calm", "valence"])
    manifest = shipped / "tiny" / "pack.toml"
    poles = 'kind = "trait"\npositive = "in good spirits"\nnegative = "in low spirits"\n'
    text = manifest.read_text()
    text = text.replace('kind = "emotion"\npositive = "full of valence"\n', poles)
    manifest.write_text(
        text.replace('positive = "full of joy"', 'positive = "full of joy"\nnegative = "low"')
    )
    registry = Registry()
    assert nearest(registry, "happy") == ["joy"]  # a synonym
    assert nearest(registry, "Grumpy") == ["anger", "-valence"]  # the second by its negative pole
    assert nearest(registry, "tiny.cold") == ["-tiny.warm", "-tiny.warmth"]
    assert nearest(registry, "warms") == ["warm", "warmth"]
    assert nearest(registry, "low") == ["-valence"]  # a pole; an emotion's negative side is none
    assert nearest(registry, "serene") == ["calm"]
    with pytest.raises(NameNotFound, match=r"named 'xyzzy'\. `mien list` shows all 7 vectors\.$"):
        registry.find("xyzzy", MODEL)


def test_synonyms_are_of_the_vectors_that_mien_makes() -> None:
    named = {name.removeprefix("-") for name in synonyms.WORDS}
    assert named == set(Corpus.read().names)
    known = {word for words in synonyms.WORDS.values() for word in words.split()}
    assert len(known) > 150
    assert all(word == word.casefold() for word in known)


def test_a_vector_file_in_the_current_folder_is_named(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pack(shipped / "tiny")
    monkeypatch.chdir(tmp_path)
    make_vector("calm").save(Path("calm.gguf"))
    with pytest.raises(NameNotFound, match=r"--vector calm\.gguf"):
        Registry().find("calm", MODEL)
    with pytest.raises(NameNotFound) as caught:
        Registry().find("tiny.calm", MODEL)
    assert "--vector" not in str(caught.value)


def test_a_recipe_finds_no_vector_in_a_file_and_says_what_to_write(shipped: Path) -> None:
    with pytest.raises(RecipeError, match=r"--vector warm=\./warm\.gguf"):
        parse("./warm.gguf")


def test_an_unknown_name_without_pack_for_the_model_says_so(shipped: Path) -> None:
    make_pack(shipped / "tiny")
    with pytest.raises(NameNotFound, match=r"The packs found \(tiny\) are not for wide .*mien pack make"):
        Registry().find("calm", OTHER_MODEL)


@pytest.mark.parametrize("name", ["tinny.joy", "a.tiny.joy"])
def test_an_unknown_namespace_gives_the_nearest(shipped: Path, name: str) -> None:
    make_pack(shipped / "tiny")
    with pytest.raises(NameNotFound, match=r"no pack named '.*'\. Did you mean tiny\?"):
        Registry().find(name, MODEL)


@pytest.mark.parametrize("name", ["", ".", ".joy", "tiny."])
def test_half_a_name_is_unknown(shipped: Path, name: str) -> None:
    make_pack(shipped / "tiny")
    with pytest.raises(NameNotFound):
        Registry().find(name)


def test_without_model_a_name_for_two_models_must_say_which(shipped: Path, user: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    make_pack(user / "wide", name="wide", vectors=["joy"], model=OTHER_MODEL)
    registry = Registry()
    with pytest.raises(
        ModelMismatch, match=r"packs for different models.*Say which: tiny\.joy or wide\.joy\."
    ):
        registry.find("joy")
    assert registry.find("wide.joy").width == 16
    make_pack(user / "wide-two", name="tiny", vectors=["joy"], model=OTHER_MODEL)
    registry.refresh()
    with pytest.raises(ModelMismatch, match=r"Say for which model, or give the file's path\."):
        registry.find("tiny.joy")


def test_a_broken_pack_hides_no_other(shipped: Path, user: Path) -> None:
    make_pack(shipped / "aaa", name="aaa")
    make_pack(user / "tiny", vectors=["calm"])
    (shipped / "aaa" / "pack.toml").write_text("format = 2")
    registry = Registry()
    assert paths(registry) == [user / "tiny"]
    (problem,) = registry.problems
    assert problem.path == shipped / "aaa"
    assert isinstance(problem.error, PackError)
    assert "expected 1, got 2" in str(problem.error)
    assert registry.find("calm", MODEL).name == "calm"
    with pytest.raises(NameNotFound, match=r"could not be read: .*aaa; `mien list` says why"):
        registry.find("joy", MODEL)


def test_a_broken_vector_does_not_give_way_to_the_next_pack(shipped: Path, user: Path) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    make_pack(user / "other", name="other", vectors=["joy"], value=2.0)
    make_vector("joy", value=3.0).save(shipped / "tiny" / "joy.gguf")
    with pytest.raises(PackError, match="expected SHA-256"):
        Registry().find("joy", MODEL)


def test_a_search_path_that_leads_nowhere_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.zip").write_bytes(b"PK")
    entries = [str(tmp_path / "gone"), str(tmp_path / "tiny.zip"), "~nobody-of-that-name/packs"]
    monkeypatch.setenv("MIEN_PATH", os.pathsep.join(entries))
    gone, file, stranger = Registry().problems
    assert stranger.path == Path("~nobody-of-that-name/packs")
    assert str(gone.error) == f"{tmp_path / 'gone'}: can't be read (No such file or directory)"
    assert str(file.error) == f"{tmp_path / 'tiny.zip'}: can't be read (Not a directory)"


def test_a_registry_scans_once_and_again_when_told(
    shipped: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = Pack.read

    def counted(folder: Path) -> Pack:
        reads.append(folder)
        return read(folder)

    monkeypatch.setattr(Pack, "read", counted)
    make_pack(shipped / "tiny", vectors=["joy"])
    registry = Registry()
    assert reads == []
    first = registry.find("joy", MODEL)
    make_pack(user / "calm", name="calm", vectors=["calm"])
    assert registry.names() == ["joy"]
    assert registry.find("joy", MODEL) is first
    assert reads == [shipped / "tiny"]
    registry.refresh()
    assert registry.names() == ["calm", "joy"]


@pytest.mark.parametrize(
    ("value", "inside"),
    [
        ("faketemper", "."),
        ("faketemper:PACKS", "."),
        ("faketemper", "tiny"),
        ("faketemper.data", "data"),
        ("faketemper.data", "data/tiny"),
        ("faketemper.module", "."),
    ],
)
def test_a_package_brings_packs_and_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, inside: str
) -> None:
    package = make_package(tmp_path / "site", value)
    (package / "module.py").write_text("raise RuntimeError('a pack was executed')\n")
    make_pack(package / inside)
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry = Registry()
    assert paths(registry) == [package / inside]
    assert registry.find("joy", MODEL).name == "joy"
    assert "faketemper" not in sys.modules


@pytest.mark.parametrize(
    "value", ["not_there", "faketemper.nothing", "single", "not-a-name", "faketemper..x"]
)
def test_an_entry_point_without_folder_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    make_package(tmp_path / "site", value)
    (tmp_path / "site" / "single.py").write_text("raise RuntimeError('a pack was executed')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (problem,) = Registry().problems
    assert problem.path == Path(value)
    assert f"entry point faketemper = {value}: expected a package" in str(problem.error)


def test_load_takes_a_name_or_a_file(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pack(shipped / "tiny", vectors=["joy"])
    make_vector("calm").save(tmp_path / "calm.gguf")
    assert load("joy").name == "joy"
    assert load("tiny.joy", MODEL).name == "joy"
    assert load(tmp_path / "calm.gguf").name == "calm"
    assert load(str(tmp_path / "calm.gguf"), MODEL).name == "calm"
    monkeypatch.chdir(tmp_path)
    assert load("calm.gguf").name == "calm"
    with pytest.raises(ModelMismatch, match=r"calm\.gguf is not for wide"):
        load("calm.gguf", OTHER_MODEL)
    with pytest.raises(VectorFileError, match=r"none/joy: can't be read"):
        load("none/joy")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(VectorFileError, match="not a GGUF file"):
        load("text.txt")
    (tmp_path / "joy").write_text("some text")
    assert load("joy").name == "joy"  # a vector's name comes first
    with pytest.raises(VectorFileNotFound) as missing:
        load(tmp_path / "nothing")
    assert (missing.value.path, missing.value.exit_code) == (str(tmp_path / "nothing"), 3)
