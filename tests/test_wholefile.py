"""What is written whole replaces regular files, follows symlinks, and leaves everything else alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from mien import exporting, install
from mien.cli import cli
from mien.errors import MienError, PackError
from mien.pack import Pack, write_whole
from mien.wholefile import replaceable, replacing
from packs import MODEL, contents, make_pack, make_vector

Write = Callable[[Path], object]


def build(path: Path) -> object:
    """What `mien pack build` writes is pack.toml in a folder; here `path` is that."""
    return make_pack(path.parent)


def export_zip(path: Path) -> object:
    return install.export(make_pack(path.parent / "source"), path, force=True)


def export_vector(path: Path) -> object:
    exporting.write(make_vector("joy"), path, "npz")
    return path


def command(*arguments: str) -> Write:
    """A command that writes `path`; {source} is a vector file, {out} the folder of `path`."""

    def write(path: Path) -> object:
        make_vector("joy").save(path.parent / "in" / "source.gguf")
        source = path.parent / "in" / "source.gguf"
        words = [word.format(source=source, out=path.parent) for word in arguments]
        found = CliRunner().invoke(cli, words)
        if found.exit_code:
            raise MienError(found.stderr)
        return path

    return write


WRITERS: dict[str, tuple[str, Write]] = {
    "bytes": ("data.bin", lambda path: write_whole(path, b"new")),
    "vector": ("joy.gguf", lambda path: make_vector("joy").save(path)),
    "export of a vector": ("joy.npz", export_vector),
    "export of a pack": ("tiny.zip", export_zip),
    "import": ("joy.gguf", command("import", "{source}", "--out", "{out}", "--name", "joy", "--force")),
}


@pytest.mark.parametrize("name", [*WRITERS, "build"])
def test_what_is_not_a_regular_file_is_refused(tmp_path: Path, name: str) -> None:
    file, write = {**WRITERS, "build": ("pack.toml", build)}[name]
    path = tmp_path / file
    os.mkfifo(path)
    with pytest.raises(MienError, match="regular file"):
        write(path)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_symlink_is_followed(tmp_path: Path, name: str, there: bool) -> None:
    file, write = WRITERS[name]
    (tmp_path / "elsewhere").mkdir()
    real, path = tmp_path / "elsewhere" / "real", tmp_path / file
    if there:
        real.write_bytes(b"old")
    path.symlink_to(Path("elsewhere", "real"))
    write(path)
    assert path.is_symlink()
    assert real.read_bytes() == path.read_bytes() not in (b"old", b"")
    assert os.listdir(real.parent) == ["real"]


def test_a_manifest_is_never_a_symlink(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack")
    (tmp_path / "pack" / "pack.toml").rename(tmp_path / "elsewhere.toml")
    (tmp_path / "pack" / "pack.toml").symlink_to(tmp_path / "elsewhere.toml")
    before = contents(tmp_path)
    with pytest.raises(PackError, match="symlink"):
        Pack.build(tmp_path / "pack", name="other", version="2.0", licence="MIT")
    assert contents(tmp_path) == before


def test_a_folder_and_a_circle_of_symlinks_are_errors(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    for path in (tmp_path, tmp_path / "one"):
        with pytest.raises(OSError, match=r"directory|symbolic links"), replacing(path):
            pass
    assert replaceable(tmp_path / "new") == tmp_path.resolve() / "new"


def test_what_fails_leaves_the_file_that_a_symlink_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")

    def write_half() -> None:
        with replacing(tmp_path / "link") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert contents(tmp_path) == {"real": b"old", "link": b"old"}


# ---- what exists is replaced only if that was asked for ----


def test_existing_files_are_refused_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pack(tmp_path / "tiny", model=MODEL)
    (tmp_path / "in").mkdir()
    make_vector("joy").save(tmp_path / "in" / "joy.gguf")
    (tmp_path / "text.txt").write_text("a text\n")
    for name in ("tiny-1.0.zip", "joy.gguf"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "tiny-npz").mkdir()
    before = contents(tmp_path)
    texts = ["--positive", "text.txt", "--negative", "text.txt", "--model", "nothing.gguf"]
    for arguments in (
        ["pack", "export", "tiny"],
        ["pack", "export", "tiny", "--format", "npz"],
        ["import", "in/joy.gguf"],
        ["extract", "joy", *texts],  # before it looks for the model
    ):
        found = CliRunner().invoke(cli, arguments)
        assert found.exit_code in (2, 4), found.stderr
        assert "already exists" in found.stderr
        assert "--force" in found.stderr
        assert contents(tmp_path) == before
    for arguments in (["pack", "export", "tiny"], ["import", "in/joy.gguf"]):
        assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0
    assert (tmp_path / "tiny-1.0.zip").read_bytes() != b"mine" != (tmp_path / "joy.gguf").read_bytes()
    assert CliRunner().invoke(cli, ["extract", "joy", *texts, "--force"]).exit_code == 3
