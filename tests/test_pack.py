from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import mien
import numpy as np
import pytest
from mien import exporting, install, registry
from mien.errors import MienError, ModelMismatch, NameNotFound, PackError, VectorError, VectorFileError
from mien.fingerprint import Fingerprint
from mien.pack import Entry, Pack
from mien.vector import Vector
from packs import MODEL, OTHER_MODEL, contents, make_pack, make_vector

GOLDEN = """\
format = 1
name = "tiny"
version = "1.0"
licence = "MIT"
description = "two for a test"

[model]
architecture = "llama"
n_layer = 4
n_embd = 8
vocabulary = "abababababababababababababababababababababababababababababababab"
name = "tiny"

[vectors.anger]
file = "anger.gguf"
sha256 = "{anger}"

[vectors.joy]
file = "joy.gguf"
sha256 = "{joy}"
kind = "emotion"
positive = "joyful"
negative = "joyless"
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_pack(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "pack.toml").read_text()
    assert text.count(old) == 1
    (folder / "pack.toml").write_text(text.replace(old, new))


def test_build_writes_the_manifest_to_the_byte(tmp_path: Path) -> None:
    make_vector("anger").save(tmp_path / "anger.gguf")
    words = {"kind": "emotion", "positive": "joyful", "negative": "joyless"}
    make_vector("joy", meta=words).save(tmp_path / "joy.gguf")
    options = {"name": "tiny", "version": "1.0", "licence": "MIT", "description": "two for a test"}
    Pack.build(tmp_path, **options)
    expected = GOLDEN.format(anger=sha256(tmp_path / "anger.gguf"), joy=sha256(tmp_path / "joy.gguf"))
    assert (tmp_path / "pack.toml").read_bytes() == expected.encode()
    before = contents(tmp_path)
    Pack.build(tmp_path, **options)
    assert contents(tmp_path) == before


def test_read_gives_what_build_gave(folder: Path) -> None:
    pack = Pack.read(folder)
    assert (pack.path, pack.name, pack.version, pack.licence) == (folder, "tiny", "1.0", "MIT")
    assert pack.description == ""
    assert pack.fingerprint == MODEL
    assert list(pack.entries) == ["anger", "joy"]
    digest = sha256(folder / "joy.gguf")
    assert pack.entries["joy"] == Entry("joy.gguf", digest, "emotion", "full of joy", "")


def test_read_opens_no_vector(folder: Path) -> None:
    (folder / "joy.gguf").unlink()
    assert "joy" in Pack.read(folder).entries


def test_load_gives_the_vector_and_keeps_it(folder: Path) -> None:
    pack = Pack.read(folder)
    vector = pack.load("joy")
    assert vector.name == "joy"
    assert vector.rows.tolist() == [[1.0] * 8] * 2
    (folder / "joy.gguf").unlink()
    assert pack.load("joy") is vector


def test_load_of_an_unknown_name_gives_the_nearest(folder: Path) -> None:
    with pytest.raises(NameNotFound, match=r"no vector named 'joi'\. Did you mean joy\? .*pack tiny"):
        Pack.read(folder).load("joi")


@pytest.mark.parametrize(
    ("name", "namespace"),
    [
        ("smollm2-135m-instruct", "smollm2_135m_instruct"),
        ("qwen2.5-0.5b", "qwen2_5_0_5b"),
        ("7b", "_7b"),
        ("class", "_class"),
    ],
)
def test_namespace_is_an_identifier(tmp_path: Path, name: str, namespace: str) -> None:
    assert make_pack(tmp_path, name=name).namespace == namespace
    assert namespace.isidentifier()


LONG = "n" * 65
REFUSED_MANIFESTS = {
    "not TOML": ("format = 1", "format = ", r"pack\.toml: not TOML"),
    "format of the future": ("format = 1", "format = 2", r"format: expected 1, got 2\. A newer mien"),
    "format as a truth": ("format = 1", "format = true", r"format: expected 1, got True$"),
    "no format": ("format = 1\n", "", r"format: expected 1, got nothing$"),
    "name with a path": ('name = "tiny"\nv', 'name = "../tiny"\nv', r"name: expected 1 to 64 .*'\.\./tiny'"),
    "name in capitals": ('name = "tiny"\nv', 'name = "Tiny"\nv', r"name: expected 1 to 64 .*'Tiny'"),
    "name that is hidden": ('name = "tiny"\nv', 'name = ".tiny"\nv', r"name: expected 1 to 64 .*'\.tiny'"),
    "name that is long": ('name = "tiny"\nv', f'name = "{LONG}"\nv', r"name: expected 1 to 64 .*'nnn"),
    "name that is a number": ('name = "tiny"\nv', "name = 3\nv", r"name: expected 1 to 64 .*got 3"),
    "no name": ('name = "tiny"\nv', "v", r"name: expected 1 to 64 .*got nothing"),
    "version as a number": ('version = "1.0"', "version = 1.0", r"version: expected one line .*got 1\.0"),
    "version that is empty": ('version = "1.0"', 'version = ""', r"version: expected one line .*got ''"),
    "no licence": ('licence = "MIT"\n', "", r"licence: expected one line of text, got nothing"),
    "licence with an escape": ("MIT", r"\u001b[2J", r"licence: expected one line .*got '\\x1b\[2J'"),
    "description as a list": (
        'licence = "MIT"',
        'licence = "MIT"\ndescription = []',
        r"description: expected one line of text, got \[\]",
    ),
    "no model": ("[model]", "[modell]", r"model: expected a table, got nothing"),
    "model without layers": ("n_layer = 4\n", "", r"model\.n_layer: expected int, got None"),
    "model with an escape": ('"llama"', r'"ll\u0007"', r"model\.architecture: expected one line"),
    "vector that is no table": ("[vectors.joy]", "[vectors.joy.x]\n[v]", r"vectors\.joy\.file: .*nothing"),
    "vector with a dash": ("[vectors.joy]", '[vectors."j-y"]', r"vectors: expected an identifier .*'j-y'"),
    "vector named a keyword": ("[vectors.joy]", "[vectors.or]", r"vectors: expected an identifier .*'or'"),
    "vector named too long": (
        "[vectors.joy]",
        f"[vectors.{LONG}]",
        r"vectors: expected an identifier .*'nnn",
    ),
    "vector no recipe can spell": (
        "[vectors.joy]",
        '[vectors."\N{LATIN SMALL LIGATURE FI}"]',
        r"vectors: expected an identifier",
    ),
    "file above": ('"joy.gguf"', '"../joy.gguf"', r"vectors\.joy\.file: .*plain .*'\.\./joy\.gguf'"),
    "file of dots": ('"joy.gguf"', '"joy..gguf"', r"vectors\.joy\.file: .*plain .*'joy\.\.gguf'"),
    "file in a folder": ('"joy.gguf"', '"a/joy.gguf"', r"vectors\.joy\.file: .*plain .*'a/joy\.gguf'"),
    "file with a backslash": ('"joy.gguf"', r'"a\\joy.gguf"', r"vectors\.joy\.file: .*plain"),
    "file absolute": ('"joy.gguf"', '"/joy.gguf"', r"vectors\.joy\.file: .*plain .*'/joy\.gguf'"),
    "file on a drive": ('"joy.gguf"', '"c:joy.gguf"', r"vectors\.joy\.file: .*plain .*'c:joy\.gguf'"),
    "file of another kind": (
        '"joy.gguf"',
        '"joy.pickle"',
        r"vectors\.joy\.file: .*\.gguf, got 'joy\.pickle'",
    ),
    "file missing": ('file = "joy.gguf"\n', "", r"vectors\.joy\.file: .*plain .*nothing"),
    "file twice": (
        '"joy.gguf"',
        '"ANGER.gguf"',
        r"joy\.file: 'ANGER\.gguf' already belongs to vectors\.anger",
    ),
    "kind unknown": (
        'kind = "emotion"\npositive = "full of joy"',
        'kind = "mood"',
        r"vectors\.joy\.kind: expected 'emotion', 'trait' or '', got 'mood'",
    ),
    "site unknown": (
        'kind = "emotion"\npositive = "full of joy"',
        'site = "queries"',
        r"vectors\.joy\.site: expected one of residual, attention, .*, got 'queries'",
    ),
    "site a number": (
        'kind = "emotion"\npositive = "full of joy"',
        "site = 3",
        r"vectors\.joy\.site: expected one of residual, attention, .*, got 3",
    ),
    "rank zero": (
        'kind = "emotion"\npositive = "full of joy"',
        "rank = 0",
        r"vectors\.joy\.rank: expected a positive number, got 0",
    ),
    "weak in words": (
        'kind = "emotion"\npositive = "full of joy"',
        'weak = "very"',
        r"vectors\.joy\.weak: expected true or false, got 'very'",
    ),
    "rank a truth": (
        'kind = "emotion"\npositive = "full of joy"',
        "rank = true",
        r"vectors\.joy\.rank: expected a positive number, got True",
    ),
    "pole in two lines": ('"full of joy"', r'"a\nb"', r"vectors\.joy\.positive: expected one line of text"),
}


@pytest.mark.parametrize("row", REFUSED_MANIFESTS.values(), ids=REFUSED_MANIFESTS)
def test_read_refuses_a_manifest_with(folder: Path, row: tuple[str, str, str]) -> None:
    old, new, message = row
    edit(folder, old, new)
    with pytest.raises(PackError, match=message) as caught:
        Pack.read(folder)
    assert str(caught.value).startswith(str(folder / "pack.toml"))


@pytest.mark.parametrize("digest", ["ab", "g" * 64, "a" * 65])
def test_read_refuses_a_digest_that_is_none(folder: Path, digest: str) -> None:
    edit(folder, sha256(folder / "joy.gguf"), digest)
    with pytest.raises(PackError, match=r"vectors\.joy\.sha256: expected 64 hex digits, got '"):
        Pack.read(folder)


def test_read_takes_a_digest_in_capitals(folder: Path) -> None:
    digest = sha256(folder / "joy.gguf")
    edit(folder, digest, digest.upper())
    assert Pack.read(folder).load("joy").name == "joy"


def test_read_leaves_unknown_keys_alone(folder: Path) -> None:
    edit(folder, "format = 1", 'format = 1\nhomepage = "https://example.org"')
    assert Pack.read(folder).name == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "not TOML"),
        (b"a = " + b"[" * 100_000, "not TOML"),
        (b"#" * (1 << 20) + b"#", "expected at most 1048576 bytes, got more"),
        (b"format = 1\nname = 'a'\n[vectors]\n", r"vectors: expected at least one vector, got \{\}"),
    ],
)
def test_read_refuses_a_file_that_is_no_manifest(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "pack.toml").write_bytes(text)
    with pytest.raises(PackError, match=message):
        Pack.read(tmp_path)


def test_read_refuses_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"there is no such file; a pack is a folder with a pack\.toml"):
        Pack.read(tmp_path / "nowhere")


def test_read_refuses_a_manifest_through_a_symlink(folder: Path, tmp_path: Path) -> None:
    (folder / "pack.toml").rename(tmp_path / "elsewhere.toml")
    (folder / "pack.toml").symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(PackError, match=r"pack\.toml: expected a regular file, got a symlink"):
        Pack.read(folder)


def break_digest(folder: Path) -> None:
    make_vector("joy", value=2.0).save(folder / "joy.gguf")


def break_by_missing(folder: Path) -> None:
    (folder / "joy.gguf").unlink()


def break_by_symlink(folder: Path) -> None:
    (folder / "joy.gguf").rename(folder.parent / "joy.gguf")
    (folder / "joy.gguf").symlink_to(folder.parent / "joy.gguf")


def break_by_pipe(folder: Path) -> None:
    (folder / "joy.gguf").unlink()
    os.mkfifo(folder / "joy.gguf")


def break_file(folder: Path) -> None:
    digest = sha256(folder / "joy.gguf")
    (folder / "joy.gguf").write_bytes((folder / "joy.gguf").read_bytes()[:-8])
    edit(folder, digest, sha256(folder / "joy.gguf"))


def break_name(folder: Path) -> None:
    edit(folder, "[vectors.joy]", "[vectors.delight]")


def break_model(folder: Path) -> None:
    edit(folder, "n_layer = 4", "n_layer = 5")


def break_site(folder: Path) -> None:
    edit(folder, 'kind = "emotion"\npositive = "full of joy"', 'site = "mlp"\nrank = 2')


def break_by_no_fingerprint(folder: Path) -> None:
    digest = sha256(folder / "joy.gguf")
    make_vector("joy", model=None).save(folder / "joy.gguf")
    edit(folder, digest, sha256(folder / "joy.gguf"))


BROKEN_VECTORS = [
    (break_digest, PackError, r"joy\.gguf: expected SHA-256 [0-9a-f]{64}, .*got [0-9a-f]{64}; fetch"),
    (break_by_missing, PackError, r"joy\.gguf: can't be read \(No such file"),
    (break_by_symlink, PackError, r"joy\.gguf: expected a regular file, got a symlink"),
    (break_by_pipe, PackError, r"joy\.gguf: expected a regular file, got prw"),
    (break_file, VectorFileError, r"joy\.gguf: broken or cut short"),
    (break_name, PackError, r"joy\.gguf: expected the vector 'delight', .*got 'joy'"),
    (break_model, ModelMismatch, r"joy\.gguf does not fit .*layers 4, the model has 5"),
    (break_site, PackError, r"joy\.gguf: expected site mlp and rank 2, .*, got residual and 1"),
    (break_by_no_fingerprint, PackError, r"joy\.gguf: expected the fingerprint of its model .*got none"),
]


@pytest.mark.parametrize(
    ("damage", "kind", "message"), BROKEN_VECTORS, ids=[row[0].__name__ for row in BROKEN_VECTORS]
)
def test_load_refuses_and_verify_reports(
    folder: Path, damage: object, kind: type[MienError], message: str
) -> None:
    assert callable(damage)
    damage(folder)
    pack = Pack.read(folder)
    with pytest.raises(kind, match=message):
        pack.load("delight" if damage is break_name else "joy")
    assert any(isinstance(problem, kind) and re.search(message, str(problem)) for problem in pack.verify())


def of_every_kind() -> list[Vector]:
    """Vectors of MODEL that only files of mien's own can hold, and one that is a control vector."""
    rows = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    return [
        Vector("plane", (1, 2), rows, MODEL, meta={"kind": "trait", "center": [0.5] * 6}),
        Vector("probe", (1, 2), rows[:, 0], MODEL, meta={"bias": [1.0, 2.0]}),
        mien.of_heads("quiet", {(0, 1): -1.0}, 2, 4, fingerprint=MODEL),
        mien.of_neurons("spark", {3: {700: 2.0}}, 1000, fingerprint=MODEL),
    ]


def test_a_pack_carries_vectors_of_every_kind(tmp_path: Path) -> None:
    vectors = {vector.name: vector for vector in of_every_kind()}
    for vector in vectors.values():
        vector.save(tmp_path / "mixed" / f"{vector.name}.gguf")
    built = Pack.build(tmp_path / "mixed", name="mixed", version="1.0", licence="MIT")
    said = {name: (entry.site, entry.rank) for name, entry in built.entries.items()}
    assert said == {
        "plane": ("residual", 3),
        "probe": ("residual", 1),
        "quiet": ("heads", 1),
        "spark": ("neurons", 1),
    }
    text = (tmp_path / "mixed" / "pack.toml").read_text()
    assert (text.count("site ="), text.count("rank =")) == (2, 1)
    archive = install.export(built, tmp_path / "mixed.zip")
    installed = install.install(archive)
    assert installed.verify() == []
    for name, vector in vectors.items():
        assert installed.load(name).digest == vector.digest
        assert dict(installed.load(name).meta) == dict(vector.meta)
        assert registry.load(f"mixed.{name}").site == vector.site


def test_a_pack_with_other_sites_is_not_exported_for_other_programs(tmp_path: Path) -> None:
    for vector in of_every_kind():
        vector.save(tmp_path / "mixed" / f"{vector.name}.gguf")
    built = Pack.build(tmp_path / "mixed", name="mixed", version="1.0", licence="MIT")
    before = contents(tmp_path)
    with pytest.raises(
        VectorError, match=r"^plane: llama\.cpp's control vectors have one direction a layer of"
    ):
        exporting.export(built, tmp_path / "out", "llama.cpp")
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_verify_is_empty_for_a_sound_pack(folder: Path) -> None:
    (folder / "README.md").write_text("tiny")
    (folder / "._joy.gguf").write_bytes(b"what a Mac leaves")
    assert Pack.read(folder).verify() == []


def test_verify_collects_all_problems_and_reads_afresh(folder: Path) -> None:
    pack = Pack.read(folder)
    pack.load("joy")
    break_digest(folder)
    (folder / "anger.gguf").unlink()
    (folder / "fear.GGUF").write_bytes(b"")
    first, second, third = map(str, pack.verify())
    assert "anger.gguf: can't be read" in first
    assert "joy.gguf: expected SHA-256" in second
    assert "fear.GGUF: pack.toml does not name it" in third


def test_build_refuses_a_folder_without_vectors(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"expected vector files \(\*\.gguf\), found none"):
        Pack.build(tmp_path, name="tiny", version="1.0", licence="MIT")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Tiny"}, r"pack\.toml, name: expected 1 to 64"),
        ({"version": ""}, r"pack\.toml, version: expected one line"),
        ({"licence": "a\nb"}, r"pack\.toml, licence: expected one line"),
        ({"description": "a\x1bb"}, r"pack\.toml, description: expected one line"),
    ],
)
def test_build_refuses_what_it_could_not_read_back(
    folder: Path, changes: dict[str, str], message: str
) -> None:
    before = contents(folder)
    with pytest.raises(PackError, match=message):
        Pack.build(folder, **{"name": "tiny", "version": "2.0", "licence": "MIT", **changes})
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("file", "name", "model", "kind", "message"),
    [
        ("fear", "dread", MODEL, "emotion", r"fear\.gguf: expected a vector named 'fear', .*got 'dread'"),
        ("fear", "fear", None, "emotion", r"fear\.gguf: expected the fingerprint .*got none"),
        ("fear", "fear", OTHER_MODEL, "emotion", r"fear\.gguf is not for the model that anger\.gguf is for"),
        ("fear", "fear", MODEL, "mood", r"vectors\.fear\.kind: expected 'emotion', .*got 'mood'"),
        ("fear", "fear", MODEL, 3, r"vectors\.fear\.kind: expected 'emotion', .*got 3"),
        ("for", "for", MODEL, "emotion", r"vectors: expected an identifier .*got 'for'"),
    ],
)
def test_build_refuses_a_vector(
    folder: Path, file: str, name: str, model: Fingerprint | None, kind: str | int, message: str
) -> None:
    make_vector(name, model, meta={"kind": kind}).save(folder / f"{file}.gguf")
    before = contents(folder)
    with pytest.raises((PackError, ModelMismatch), match=message):
        Pack.build(folder, name="tiny", version="2.0", licence="MIT")
    assert contents(folder) == before


def test_build_compares_with_a_vector_that_knows_its_vocabulary(tmp_path: Path) -> None:
    unsure = Fingerprint("llama", 4, 8)
    make_vector("anger", unsure).save(tmp_path / "anger.gguf")
    make_vector("joy", MODEL).save(tmp_path / "joy.gguf")
    assert Pack.build(tmp_path, name="tiny", version="1.0", licence="MIT").fingerprint == MODEL
    make_vector("fear", Fingerprint("llama", 4, 8, "ef" * 32)).save(tmp_path / "fear.gguf")
    with pytest.raises(ModelMismatch, match="digest abababababab, the model's is efefefefefef"):
        Pack.build(tmp_path, name="tiny", version="1.0", licence="MIT")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_build_never_leaves_half_a_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    before = contents(folder)
    monkeypatch.setattr(os, "replace", fail)
    expected = PackError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"can't be written \(No space" if expected is PackError else None):
        Pack.build(folder, name="tiny", version="2.0", licence="MIT")
    assert contents(folder) == before


def test_importing_pack_and_registry_is_light() -> None:
    code = (
        "import sys, mien.pack, mien.registry, mien.install\n"
        "heavy = {'numpy', 'gguf', 'platformdirs', 'click', 'llama_cpp', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    path = os.pathsep.join([str(Path(mien.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
