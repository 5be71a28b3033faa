"""What the build of Horovod asks of this machine: a compiler, variables, CUDA and NCCL."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from compressor.distributed.horovod_patches import BuildError

STANDARD = "c++20"  # in which the headers of torch are written


def check_compiler() -> None:
    """Do nothing if this machine can compile what torch's headers are written in.

    Raises:
        BuildError: if it cannot.
    """
    compiler = os.environ.get("CXX", "c++")
    help_line = "Install one, as with `apt-get install g++ make`, or name it in CXX."
    if shutil.which(compiler.split()[0]) is None:
        raise BuildError(f"There is no C++ compiler {compiler!r} here. {help_line}")
    if shutil.which("make") is None:
        raise BuildError("There is no `make` here. Install it, as with `apt-get install make`.")
    check = [*compiler.split(), f"-std={STANDARD}", "-fsyntax-only", "-x", "c++", os.devnull]
    if subprocess.run(check, capture_output=True, check=False).returncode:
        raise BuildError(
            f"The C++ compiler {compiler!r} does not take -std={STANDARD}, which the headers of "
            f"torch are written in; g++ does from version 10. {help_line}"
        )


def build_environment(tools: Path, *, with_nccl: bool, jobs: int) -> dict[str, str]:
    """The variables that Horovod's build reads, with those of this process.

    Args:
        tools: folder of the packages that it builds with.
        with_nccl: for gradients that go from GPU to GPU.
        jobs: files that are compiled at once.
    """
    path = [str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Gloo asks for 2.8, which CMake 4 refuses
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_NVTX": "1",
        "HOROVOD_CPU_OPERATIONS": "GLOO",
    }
    if with_nccl:
        environment["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return environment


def nccl_environment(links: Path) -> dict[str, str]:
    """Where CUDA and NCCL are: as the user's variables say, or nvcc, and what came with torch.

    Args:
        links: a folder that is made, if linkers are to find the library of torch in it.

    Raises:
        BuildError: if there is no compiler of CUDA.
    """
    home = os.environ.get("HOROVOD_CUDA_HOME") or os.environ.get("CUDA_HOME") or _cuda_home()
    if not (Path(home) / "bin" / "nvcc").is_file():
        raise BuildError(
            "--nccl takes a CUDA toolkit, and there is no `nvcc` here. Install the toolkit, or "
            "set CUDA_HOME to its folder, or leave --nccl out: gradients then go through the host."
        )
    found = {"HOROVOD_CUDA_HOME": home, "CUDA_HOME": home, "CUDAToolkit_ROOT": home}
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        library = Path(folder) / "nccl" / "lib" / "libnccl.so.2"
        if library.is_file() and not any(name.startswith("HOROVOD_NCCL_") for name in os.environ):
            links.mkdir()
            (links / "libnccl.so").symlink_to(library)  # the name that linkers look for
            found["HOROVOD_NCCL_INCLUDE"] = str(Path(folder) / "nccl" / "include")
            found["HOROVOD_NCCL_LIB"] = str(links)
            found["HOROVOD_NCCL_LINK"] = "SHARED"
            break
    return found


def _cuda_home() -> str:
    """The toolkit of the `nvcc` on the path, which may be a script elsewhere; "" without one."""
    if shutil.which("nvcc") is None:
        return ""
    dry = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(dry, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else ""
