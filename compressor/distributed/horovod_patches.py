"""What keeps Horovod's last release from compiling against torch 2.1 and newer, corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressorError

VERSION = "0.28.1"


class BuildError(CompressorError, RuntimeError):
    """Horovod could not be built or installed."""


@dataclass(frozen=True)
class Patch:
    """A piece of text that occurs once in a file of the release, and what takes its place.

    Attributes:
        path: of the file.
        old: the text.
        new: in place of it.
    """

    path: str
    old: str
    new: str


ALWAYS = (
    Patch("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)"),
    Patch(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
    ),
    # A CUDA build of torch names libraries that are in no folder where linkers look.
    Patch(
        "cmake/Modules/FindPytorch.cmake",
        "    list(APPEND Pytorch_LIBRARIES ${FOUND_LIB_${_LIB}})\n",
        "    if(FOUND_LIB_${_LIB})\n"
        "        list(APPEND Pytorch_LIBRARIES ${FOUND_LIB_${_LIB}})\n"
        "    endif()\n",
    ),
    # Python 3.12 has no distutils.
    Patch(
        "horovod/torch/CMakeLists.txt",
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "from sysconfig import get_path; print(get_path('include'))",
    ),
    Patch(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
    ),
)
WITHOUT_CUDA = (
    # Not asked for, a compiler of CUDA is taken where there is one, and may not take this C++.
    Patch(
        "CMakeLists.txt",
        "if(CMAKE_CUDA_COMPILER)\n    if((CMAKE_CXX_COMPILER_ID MATCHES GNU)",
        "if(FALSE)\n    if((CMAKE_CXX_COMPILER_ID MATCHES GNU)",
    ),
    Patch(
        "horovod/torch/CMakeLists.txt", "elseif (Pytorch_CUDA AND NOT HAVE_CUDA)", "elseif (FALSE)"
    ),
)
WITH_CUDA = (
    # The headers of CUDA 13 take C++17 and newer.
    Patch(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "set(CMAKE_CUDA_STANDARD 11)",
        "set(CMAKE_CUDA_STANDARD 17)",
    ),
)


def patches(*, with_nccl: bool) -> tuple[Patch, ...]:
    """What is changed in the source release."""
    return ALWAYS + (WITH_CUDA if with_nccl else WITHOUT_CUDA)


def patch(source: Path, changes: Sequence[Patch]) -> None:
    """Change the files below `source`, in place.

    Raises:
        BuildError: if a text is not there exactly once: it is another release.
    """
    for change in changes:
        path = source / change.path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        count = text.count(change.old)
        if count != 1:
            raise BuildError(
                f"{change.path} of the source release has {change.old.strip()!r} {count} times, "
                f"and once was expected. This script fits Horovod {VERSION} only."
            )
        path.write_text(text.replace(change.old, change.new), encoding="utf-8")
