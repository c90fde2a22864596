"""What pyproject.toml can't describe: the C engine, the packs' place in a wheel, and the wheel's tag."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError, PlatformError

OLDEST = "cp310"  # as requires-python in pyproject.toml
PACKS = ("__init__.py", "*/pack.toml", "*/*.gguf", "*/README.md")


class BuildEngine(build_ext):
    """build_ext that says what to install if there is no compiler."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            raise SystemExit(
                f"\nmien: its C engine could not be built: {error}\n"
                "It requires a C compiler and nothing else. On Debian or Ubuntu: apt install gcc libc6-dev;\n"
                "on Fedora: dnf install gcc; on Alpine: apk add gcc musl-dev;\n"
                "on macOS: xcode-select --install. Then run pip install again.\n"
            ) from error


class BuildWithPacks(build_py):
    """build_py that copies vectors/ to mien/vectors.

    To name vectors/ in package-dir would be shorter. But then an editable installation is found through
    an import hook, which comes after sys.path: in the folder that holds the checkout, `import mien` would
    find the checkout's folder as a namespace package. With one source folder it is an entry of sys.path.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return  # mien.registry finds the packs in the checkout
        source = Path(__file__).parent / "vectors"
        for path in sorted(path for pattern in PACKS for path in source.glob(pattern)):
            target = Path(self.build_lib, "mien", "vectors", path.relative_to(source))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


class TaggedWheel(bdist_wheel):
    """bdist_wheel that tags a wheel as fit for later versions of Python, if the engine is built so."""

    def finalize_options(self):
        if all(extension.py_limited_api for extension in self.distribution.ext_modules):
            self.py_limited_api = OLDEST
        super().finalize_options()


setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildEngine, "build_py": BuildWithPacks, "bdist_wheel": TaggedWheel},
)
