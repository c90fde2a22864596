"""The C engine is the only part that pyproject.toml can't describe."""

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.errors import CompileError, LinkError, PlatformError
except ImportError:  # setuptools before 59
    from distutils.errors import CompileError, LinkError
    from distutils.errors import DistutilsPlatformError as PlatformError


class BuildEngine(build_ext):
    """build_ext that says what to do where there is no compiler."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            raise SystemExit(
                f"\nmien: its C engine could not be built: {error}\n"
                "It needs a C compiler and nothing else. On Debian or Ubuntu: apt install gcc libc6-dev;\n"
                "on Fedora: dnf install gcc; on macOS: xcode-select --install. Then run pip install again.\n"
            ) from error


setup(cffi_modules=["csrc/build.py:ffibuilder"], cmdclass={"build_ext": BuildEngine})
