"""Build Horovod for the torch that is installed: its last release is older than torch 2.1.

    python -m compressor.distributed.build_horovod

takes the source release 0.28.1 from the package index, corrects what keeps it from compiling,
builds a wheel, keeps it for the next time, and installs it. It takes a C++ compiler and some
minutes, once for each torch. With `--nccl` gradients go from GPU to GPU, for which it takes a CUDA
toolkit; without, they go through the memory of the host.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressor.distributed.horovod_patches import VERSION, BuildError, patch, patches
from compressor.distributed.horovod_toolchain import (
    build_environment,
    check_compiler,
    nccl_environment,
)
from compressor.files import write_bytes
from compressor.logs import get_logger, set_verbosity

logger = get_logger(__name__)

SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
CACHE = "COMPRESSOR_WHEELS"  # of the environment: where wheels are kept
TOOLS = ("setuptools<81", "wheel", "packaging", "cloudpickle", "pyyaml", "psutil", "cffi")
RUNTIME = ("packaging", "cloudpickle", "pyyaml", "psutil", "cffi")  # Horovod's own requirements
MOST_JOBS = 8  # each takes up to two GB of memory
SHOWN_LINES = 30  # of a build that failed
ERROR = re.compile(r"\bCMake Error\b|\berror: ", re.IGNORECASE)


def cache_key(torch_version: str, *, with_nccl: bool) -> str:
    """What a wheel depends on, as the name of a folder.

    >>> key = cache_key("2.15.0+cpu", with_nccl=True)
    >>> key.startswith("horovod-0.28.1-cp3"), key.endswith("-torch-2.15.0+cpu-nccl")
    (True, True)
    """
    python = f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    platform = sysconfig.get_platform()
    kind = "nccl" if with_nccl else "host"
    return f"horovod-{VERSION}-{python}-{platform}-torch-{torch_version}-{kind}"


def default_wheel_dir() -> Path:
    """The folder that `COMPRESSOR_WHEELS` names, or one in the user's cache."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "compressor" / "wheels"


def find_or_build(wheel_dir: Path, *, with_nccl: bool = False, jobs: int | None = None) -> Path:
    """The wheel for the torch that is installed, built if `wheel_dir` does not have it.

    Args:
        wheel_dir: keeps wheels, in a folder for each `cache_key`.
        with_nccl: for gradients that go from GPU to GPU.
        jobs: files that are compiled at once; None: one for each core, up to 8.

    Raises:
        BuildError: if something is missing that it takes, or the build fails.
    """
    folder = wheel_dir / cache_key(_torch_version(), with_nccl=with_nccl)
    kept = sorted(folder.glob("*.whl"))
    if kept:
        logger.info("found %s", kept[0])
        return kept[0]
    check_compiler()
    with tempfile.TemporaryDirectory(prefix="build_horovod_") as name:
        work = Path(name)
        began = time.monotonic()
        wheel = _build(work, with_nccl=with_nccl, jobs=jobs or min(os.cpu_count() or 1, MOST_JOBS))
        target = folder / wheel.name
        write_bytes(target, wheel.read_bytes())
    logger.info("built %s in %.0f seconds", target, time.monotonic() - began)
    return target


def install(wheel: Path) -> None:
    """Put the wheel, and what it needs, into this Python; any other Horovod goes.

    Raises:
        BuildError: if that fails, or it cannot be imported then.
    """
    _pip("install", *RUNTIME)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    _run([sys.executable, "-c", "import horovod.torch"], "import Horovod")
    logger.info("installed Horovod %s; start with: horovodrun -np N python ...", VERSION)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and install, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m compressor.distributed.build_horovod",
        description=f"Build Horovod {VERSION} for the torch that is installed, and install it.",
    )
    parser.add_argument(
        "--wheel-dir", type=Path, help=f"where wheels are kept (default: {default_wheel_dir()})"
    )
    parser.add_argument("--nccl", action="store_true", help="gradients go from GPU to GPU")
    parser.add_argument(
        "--jobs", type=int, help="files compiled at once (default: one a core, up to 8)"
    )
    options = parser.parse_args(arguments)
    set_verbosity("info")
    try:
        wheel_dir = options.wheel_dir or default_wheel_dir()
        install(find_or_build(wheel_dir, with_nccl=options.nccl, jobs=options.jobs))
    except BuildError as error:
        logger.error("%s", error)
        return 1
    return 0


def _build(work: Path, *, with_nccl: bool, jobs: int) -> Path:
    """The wheel, below `work`."""
    tools, wheels = work / "tools", work / "wheels"
    environment = build_environment(tools, with_nccl=with_nccl, jobs=jobs)
    if with_nccl:
        environment.update(nccl_environment(work / "nccl"))
    has_cmake = shutil.which(os.environ.get("HOROVOD_CMAKE", "cmake")) is not None
    # Beside the user's own packages, which keep their setuptools.
    _pip("install", "--target", str(tools), *TOOLS, *([] if has_cmake else ["cmake"]))
    if not has_cmake:
        environment["HOROVOD_CMAKE"] = str(tools / "bin" / "cmake")
    source = _download(work, environment)
    patch(source, patches(with_nccl=with_nccl))
    logger.info("building Horovod %s for torch %s: some minutes", VERSION, _torch_version())
    _pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
        str(source),
        env=environment,
    )
    (wheel,) = wheels.glob("*.whl")
    return wheel


def _download(work: Path, environment: Mapping[str, str]) -> Path:
    """The folder of the source release, below `work`."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--require-hashes"]
    _pip("download", *options, "-d", str(work), "-r", str(wanted), env=environment)
    with tarfile.open(work / f"horovod-{VERSION}.tar.gz") as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.10.12 on
            archive.extractall(work, filter="data")
        else:
            archive.extractall(work)
    return work / f"horovod-{VERSION}"


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _pip(command: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
    quiet = ["--disable-pip-version-check", "--no-input"]
    _run([sys.executable, "-m", "pip", command, *quiet, *arguments], f"pip {command}", env)


def _run(command: Sequence[str], what: str, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise BuildError(f"{what} failed with status {done.returncode}:\n{_reasons(done.stdout)}")


def _reasons(output: str) -> str:
    r"""What is worth reading of a long output: what follows the first errors, else its end.

    >>> print(_reasons("ok\nCMake Error at x:\n  no cudart\nTraceback"))
    CMake Error at x:
      no cudart
    Traceback
    """
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if ERROR.search(line)), -SHOWN_LINES)
    return "\n".join(lines[begin:][:SHOWN_LINES])


if __name__ == "__main__":
    sys.exit(main())
