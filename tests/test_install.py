from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import mien.install
import pytest
from mien.errors import NameNotFound, PackError
from mien.install import export, install, remove
from mien.pack import Pack
from packs import contents, make_pack, make_vector, make_zip, patch_directory, zip_entry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that packs are installed into."""
    monkeypatch.setenv("MIEN_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "packs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack with all that may be in one."""
    make_pack(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("tiny\n")
    (tmp_path / "source" / "LICENSE-MIT").write_text("MIT\n")
    return tmp_path / "source"


def test_install_from_a_folder(folder: Path, home: Path) -> None:
    pack = install(folder)
    assert pack.path == home / "tiny"
    assert contents(home / "tiny") == contents(folder)
    assert pack.load("joy").name == "joy"
    assert os.listdir(home) == ["tiny"]


@pytest.mark.parametrize("top", ["", "any name/"])
def test_install_from_a_zip(folder: Path, home: Path, tmp_path: Path, top: str) -> None:
    install(make_zip(folder, tmp_path / "tiny.zip", top))
    assert contents(home / "tiny") == contents(folder)
    assert os.listdir(home) == ["tiny"]


def test_install_takes_a_zip_that_names_its_folder(folder: Path, home: Path, tmp_path: Path) -> None:
    archive = make_zip(folder, tmp_path / "tiny.zip", "tiny/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(zip_entry("tiny/", stat.S_IFDIR | 0o755), b"")
    assert install(archive).path == home / "tiny"


def test_install_leaves_subfolders_and_hidden_files_of_a_folder_behind(folder: Path, home: Path) -> None:
    before = contents(folder)
    (folder / ".git").write_text("hidden")
    (folder / "__pycache__").mkdir()
    (folder / "contrast").mkdir()
    (folder / "contrast" / "joy.txt").write_text("texts")
    install(folder)
    assert contents(home / "tiny") == before


def test_installed_files_can_be_read_by_others(folder: Path, home: Path) -> None:
    mask = os.umask(0o022)
    try:
        install(folder)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((home / "tiny").stat().st_mode) == 0o755
    assert stat.S_IMODE((home / "tiny" / "joy.gguf").stat().st_mode) == 0o644


def test_install_over_an_installed_pack_needs_force(folder: Path, home: Path, tmp_path: Path) -> None:
    install(folder)
    before = contents(home)
    with pytest.raises(PackError, match=r"tiny 1\.0 is already installed in .*tiny\. Use --force"):
        install(folder)
    make_pack(tmp_path / "next", vectors=["joy"], version="2.0", value=3.0)
    with pytest.raises(
        PackError, match=r"tiny 1\.0 is installed in .*, and this is version 2\.0\. Use --force"
    ):
        install(tmp_path / "next")
    assert contents(home) == before
    assert install(tmp_path / "next", force=True).version == "2.0"
    assert contents(home / "tiny") == contents(tmp_path / "next")
    assert os.listdir(home) == ["tiny"]


def test_install_over_something_unreadable_needs_force(folder: Path, home: Path) -> None:
    home.mkdir(parents=True)
    (home / "tiny").write_text("a file")
    with pytest.raises(PackError, match="there is something that is no readable pack"):
        install(folder)
    install(folder, force=True)
    assert contents(home / "tiny") == contents(folder)
    assert os.listdir(home) == ["tiny"]


def test_force_replaces_a_symlink_and_not_what_it_points_to(folder: Path, home: Path, tmp_path: Path) -> None:
    make_pack(tmp_path / "work", version="0.9")
    before = contents(tmp_path / "work")
    home.mkdir(parents=True)
    (home / "tiny").symlink_to(tmp_path / "work")
    install(folder, force=True)
    assert not (home / "tiny").is_symlink()
    assert contents(tmp_path / "work") == before
    assert os.listdir(home) == ["tiny"]


# A row: what is done to an open archive that holds a sound pack, and what the refusal says.
def add(name: str, mode: int = stat.S_IFREG | 0o644, data: bytes = b"x") -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(zip_entry(name, mode), data)


def add_many(archive: zipfile.ZipFile) -> None:
    for number in range(260):
        archive.writestr(zip_entry(f"LICENSE-{number}"), b"")


def add_zero_byte(archive: zipfile.ZipFile) -> None:
    info = zip_entry("README.md!evil")
    info.filename = "README.md\0evil"  # the constructor would cut it
    archive.writestr(info, b"x")


def add_other_method(archive: zipfile.ZipFile) -> None:
    archive.writestr(zip_entry("README.md"), b"x", compress_type=zipfile.ZIP_LZMA)


REFUSED_ENTRIES = {
    "parent": (add("../README.md"), r"'\.\./README\.md': refused, a path with '\.\.'"),
    "parent within": (add("a/../README.md"), r"'a/\.\./README\.md': refused, a path with '\.\.'"),
    "absolute": (add("/README.md"), r"'/README\.md': refused, an absolute path"),
    "drive": (add("C:README.md"), r"'C:README\.md': refused, a drive letter"),
    "drive root": (add("c:/README.md"), r"'c:/README\.md': refused, a drive letter"),
    "backslash": (add("a\\README.md"), r"refused, a backslash in a name"),
    "dot": (add("./README.md"), r"'\./README\.md': refused, a path that is not plain"),
    "empty part": (add("a//README.md"), r"'a//README\.md': refused, a path that is not plain"),
    "zero byte": (add_zero_byte, r"'README\.md\\x00evil': refused, a path that is not plain"),
    "symlink": (add("README.md", stat.S_IFLNK | 0o777, b"/etc/passwd"), r"'README\.md': refused, a symlink"),
    "symlink as folder": (add("a/", stat.S_IFLNK | 0o777), r"'a/': refused, a symlink"),
    "pipe": (add("README.md", stat.S_IFIFO | 0o644), r"refused, an entry that is not a regular file"),
    "device": (add("README.md", stat.S_IFCHR | 0o644), r"refused, an entry that is not a regular file"),
    "folder without slash": (add("README.md", stat.S_IFDIR | 0o755), r"refused, an entry that is not a reg"),
    "method": (add_other_method, r"refused, compression method 14; only stored and deflated are read"),
    "twice": (add("joy.gguf"), r"'joy\.gguf': refused, the name is there twice"),
    "twice by case": (add("JOY.gguf"), r"'JOY\.gguf': refused, the name is there twice"),
    "second folder": (add("a/README.md"), r"'a/README\.md': refused, expected all files in one folder"),
    "empty folder": (add("a/", stat.S_IFDIR | 0o755, b""), r"'a/?': refused, expected all files in one"),
    "nested": (add("a/b/README.md"), r"'a/b/README\.md': refused, expected all files in one folder"),
    "too many": (add_many, r"expected at most 256 entries, got 264"),
    "code": (add("setup.py"), r"'setup\.py': expected only pack\.toml, \*\.gguf, README\.md and LICENSE\*"),
    "pickle": (add("joy.pkl"), r"'joy\.pkl': expected only"),
    "hidden": (add(".gguf"), r"'\.gguf': expected only"),
    "stream of a file": (add("LICENSE:x"), r"'LICENSE:x': expected only"),
    "vector unnamed": (add("fear.gguf"), r"fear\.gguf: pack\.toml does not name it"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("row", REFUSED_ENTRIES.values(), ids=REFUSED_ENTRIES)
def test_install_refuses_a_zip_with(
    folder: Path, home: Path, tmp_path: Path, row: tuple[Callable[[zipfile.ZipFile], None], str]
) -> None:
    change, message = row
    (folder / "README.md").unlink()
    archive = make_zip(folder, tmp_path / "bad.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        change(file)
    before = contents(tmp_path)
    with pytest.raises(PackError, match=message) as caught:
        install(archive)
    assert str(caught.value).startswith(str(archive))
    assert contents(tmp_path) == before
    assert os.listdir(home) == []


def test_install_refuses_an_encrypted_entry(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(folder, tmp_path / "bad.zip")
    patch_directory(archive, 8, "<H", lambda flags: flags | 1)
    with pytest.raises(PackError, match=r"'pack\.toml': refused, an encrypted entry"):
        install(archive)


def test_install_refuses_bytes_that_do_not_match_their_checksum(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(folder, tmp_path / "bad.zip")
    patch_directory(archive, 16, "<I", lambda crc: crc ^ 1)
    with pytest.raises(PackError, match=r"bad\.zip: the zip file is broken \(Bad CRC-32"):
        install(archive)


def test_install_refuses_an_archive_that_is_cut_or_overwritten(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(folder, tmp_path / "bad.zip")
    data = archive.read_bytes()
    archive.write_bytes(data[:40] + b"\xff" * 60 + data[100:])
    with pytest.raises(PackError, match=r"bad\.zip: the zip file is broken"):
        install(archive)
    archive.write_bytes(data[:-30])
    with pytest.raises(PackError, match="expected the folder of a pack, or a zip file; this is neither"):
        install(archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_install_stops_at_more_bytes_than_the_header_says(folder: Path, tmp_path: Path, method: int) -> None:
    archive = make_zip(folder, tmp_path / "bomb.zip")
    with zipfile.ZipFile(archive, "a", method) as file:
        file.writestr(zip_entry("LICENSE"), b"0" * 1_000_000, compress_type=method)
    # The checksum is made to fit the ten bytes, so that only counting tells.
    patch_directory(archive, 24, "<I", lambda _: 10)
    patch_directory(archive, 16, "<I", lambda _: zlib.crc32(b"0" * 10))
    with pytest.raises(PackError, match="'LICENSE': expected the 10 bytes that were announced, got more"):
        install(archive)


def test_install_refuses_fewer_bytes_than_the_header_says(folder: Path, tmp_path: Path) -> None:
    archive = make_zip(folder, tmp_path / "bad.zip")
    size = (folder / "pack.toml").stat().st_size
    patch_directory(archive, 24, "<I", lambda size: size + 1)
    with pytest.raises(PackError, match=f"expected the {size + 1} bytes that were announced, got {size}"):
        install(archive)


@pytest.mark.parametrize("as_zip", [True, False])
def test_install_stops_when_the_files_together_are_too_large(
    folder: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool
) -> None:
    # Each file fits alone.
    total = sum(map(len, contents(folder).values()))
    source = make_zip(folder, tmp_path / "large.zip") if as_zip else folder
    monkeypatch.setattr(mien.install, "MAX_BYTES", total - 1)
    with pytest.raises(PackError, match=rf"pack\.toml'?: with it the pack is larger than {total - 1} bytes"):
        install(source)
    assert os.listdir(home) == []
    monkeypatch.setattr(mien.install, "MAX_BYTES", total)
    install(source)


def test_install_unpacks_no_more_than_the_limit_of_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zip_entry("LICENSE"), b"0" * 50_000_000, compress_type=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(mien.install, "MAX_BYTES", 1_000_000)
    largest = 0
    pour = mien.install._pour

    def watch(stream: object, target: Path, *rest: object) -> None:
        nonlocal largest
        try:
            pour(stream, target, *rest)  # type: ignore[arg-type]
        finally:
            largest = target.stat().st_size

    monkeypatch.setattr(mien.install, "_pour", watch)
    with pytest.raises(PackError, match="with it the pack is larger than 1000000 bytes"):
        install(tmp_path / "bomb.zip")
    assert largest <= 1_000_000


def test_install_refuses_what_is_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="nowhere: there is no such file or folder"):
        install(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(PackError, match=r"text\.zip: expected the folder of a pack, or a zip file"):
        install(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackError, match=r"empty/pack\.toml: there is no such file"):
        install(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(PackError, match=r"empty\.zip/pack\.toml: there is no such file"):
        install(tmp_path / "empty.zip")


def link_vector(folder: Path) -> None:
    (folder / "joy.gguf").rename(folder.parent / "joy.gguf")
    (folder / "joy.gguf").symlink_to(folder.parent / "joy.gguf")


def link_folder(folder: Path) -> None:
    (folder / "contrast").symlink_to(folder.parent)


def add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "LICENSE")


def add_code(folder: Path) -> None:
    (folder / "setup.py").write_text("")


def fill(folder: Path) -> None:
    for number in range(260):
        (folder / f"LICENSE-{number}").write_text("")


def add_vector(folder: Path) -> None:
    make_vector("fear").save(folder / "fear.gguf")


def change_two_vectors(folder: Path) -> None:
    for name in ("anger", "joy"):
        make_vector(name, value=2.0).save(folder / f"{name}.gguf")


def climb(folder: Path) -> None:
    text = (folder / "pack.toml").read_text()
    (folder / "pack.toml").write_text(text.replace('name = "tiny"\nv', 'name = "../../evil"\nv'))


@pytest.mark.parametrize("addition", [link_folder, add_code])
def test_what_is_no_part_of_a_pack_stays_behind(
    folder: Path, home: Path, addition: Callable[[Path], None]
) -> None:
    """Texts, scripts and folders that a pack's maker keeps beside it."""
    addition(folder)
    installed = install(folder)
    names = {path.name for path in installed.path.iterdir()}
    assert names <= {path.name for path in folder.iterdir()}
    assert not names & {"contrast", "setup.py"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (link_vector, r"joy\.gguf: expected a regular file, got a symlink"),
        (add_pipe, r"LICENSE: expected a regular file, got prw"),
        (fill, r"expected at most 256 entries, got 265"),
        (add_vector, r"fear\.gguf: pack\.toml does not name it"),
        (change_two_vectors, r"(?s)source/anger\.gguf: expected SHA-256.*source/joy\.gguf: expected SHA-256"),
        (climb, r"source/pack\.toml, name: expected 1 to 64 .*'\.\./\.\./evil'"),
    ],
)
def test_install_refuses_a_folder(
    folder: Path, home: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(PackError, match=message):
        install(folder)
    assert os.listdir(home) == []


def test_an_interrupt_while_copying_leaves_nothing(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder)
    before = contents(home)
    pour = mien.install._pour

    def interrupted(stream: object, target: Path, *rest: object) -> None:
        pour(stream, target, *rest)  # type: ignore[arg-type]
        if target.name == "joy.gguf":
            raise KeyboardInterrupt

    monkeypatch.setattr(mien.install, "_pour", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(folder, force=True)
    assert contents(home) == before
    assert os.listdir(home) == ["tiny"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_what_was_installed(
    folder: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
    error: BaseException,
) -> None:
    install(folder)
    before = contents(home)
    make_pack(tmp_path / "next", version="2.0")
    calls = 0
    rename = os.rename

    def fail_once(source: str | Path, target: str | Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    expected = PackError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(
        expected, match="can't be installed into .*Permission denied" if expected is PackError else None
    ):
        install(tmp_path / "next", force=True)
    assert contents(home) == before
    assert os.listdir(home) == ["tiny"]


def test_a_full_disk_is_one_error(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mien.install, "_pour", fail)
    with pytest.raises(PackError, match=r"can't be installed into .*No space left on device"):
        install(folder)
    assert os.listdir(home) == []


def test_remove_takes_away_an_installed_pack(folder: Path, home: Path) -> None:
    install(folder)
    assert remove("tiny") == home / "tiny"
    assert os.listdir(home) == []


def test_remove_takes_away_a_broken_pack(folder: Path, home: Path) -> None:
    install(folder)
    (home / "tiny" / "pack.toml").write_text("broken")
    remove("tiny")
    assert os.listdir(home) == []


def test_remove_of_a_symlink_leaves_what_it_points_to(folder: Path, home: Path) -> None:
    before = contents(folder)
    home.mkdir(parents=True)
    (home / "tiny").symlink_to(folder)
    remove("tiny")
    assert os.listdir(home) == []
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["tine", "../tiny", ".", "..", "", "tiny/../tiny"])
def test_remove_knows_only_installed_packs(folder: Path, home: Path, name: str) -> None:
    with pytest.raises(NameNotFound, match=r"no pack named .* No pack is known\. Only packs in "):
        remove(name)
    install(folder)
    before = contents(home)
    with pytest.raises(NameNotFound, match=r"no pack named .*tiny"):
        remove(name)
    assert contents(home) == before


def test_remove_that_fails_leaves_the_pack(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(13, "Permission denied")

    install(folder)
    before = contents(home)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PackError, match=r"tiny: can't be removed \(Permission denied\)"):
        remove("tiny")
    assert contents(home) == before
    assert os.listdir(home) == ["tiny"]


def test_export_gives_the_same_bytes_whatever_the_files_look_like(folder: Path, tmp_path: Path) -> None:
    first = export(Pack.read(folder), tmp_path / "first.zip")
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.chmod(0o600)
        os.utime(path, (1e9, 1e9))
    second = export(Pack.read(tmp_path / "copy"), tmp_path / "second.zip")
    assert first == tmp_path / "first.zip"
    assert first.read_bytes() == second.read_bytes()


def test_export_packs_what_belongs_to_the_pack(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "LICENSES").mkdir()
    make_vector("fear").save(folder / "fear.gguf")
    with zipfile.ZipFile(export(Pack.read(folder), tmp_path / "new" / "tiny.zip")) as archive:
        entries = archive.infolist()
    names = ["LICENSE-MIT", "README.md", "anger.gguf", "joy.gguf", "pack.toml"]
    assert [entry.filename for entry in entries] == [f"tiny/{name}" for name in names]
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {stat.S_IFREG | 0o644}
    assert {(entry.create_system, entry.compress_type) for entry in entries} == {(3, zipfile.ZIP_STORED)}


def test_install_takes_what_export_gives(folder: Path, home: Path, tmp_path: Path) -> None:
    install(export(Pack.read(folder), tmp_path / "tiny.zip"))
    assert contents(home / "tiny") == contents(folder)


def test_export_refuses_a_pack_that_is_not_as_its_manifest_says(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny.zip"
    target.write_bytes(b"older")
    pack = Pack.read(folder)
    pack.load("joy")
    make_vector("joy", value=2.0).save(folder / "joy.gguf")
    with pytest.raises(PackError, match=r"joy\.gguf: expected SHA-256"):
        export(pack, target, force=True)
    assert target.read_bytes() == b"older"


def test_export_follows_no_symlink(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(PackError, match="LICENSE: expected a regular file, got a symlink"):
        export(Pack.read(folder), tmp_path / "tiny.zip")
    assert not (tmp_path / "tiny.zip").exists()


def test_export_leaves_an_older_file_when_writing_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "out" / "tiny.zip"
    export(Pack.read(folder), target)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PackError, match=r"tiny\.zip: can't be written \(No space left"):
        export(Pack.read(folder), target, force=True)
    assert contents(tmp_path / "out") == before
