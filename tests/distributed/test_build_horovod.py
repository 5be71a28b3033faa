"""What the build of Horovod changes, keeps, and asks for; CI runs the build itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from compressor.distributed import build_horovod, horovod_patches
from compressor.distributed.build_horovod import (
    cache_key,
    default_wheel_dir,
    find_or_build,
    main,
)
from compressor.distributed.horovod_patches import BuildError, Patch, patch, patches
from compressor.distributed.horovod_toolchain import (
    build_environment,
    check_compiler,
    nccl_environment,
)

# The lines of the release that are changed, with what stands beside them.
RELEASE = {
    "CMakeLists.txt": (
        "project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
        "if(CMAKE_CUDA_COMPILER)\n    if((CMAKE_CXX_COMPILER_ID MATCHES GNU) AND "
        "(CMAKE_SYSTEM_PROCESSOR MATCHES ppc64le))\n"
    ),
    "cmake/Modules/FindPytorch.cmake": (
        "foreach(_LIB IN LISTS _Pytorch_LIBRARIES)\n"
        "    list(APPEND Pytorch_LIBRARIES ${FOUND_LIB_${_LIB}})\nendforeach()\n"
    ),
    "horovod/torch/CMakeLists.txt": (
        "elseif (Pytorch_CUDA AND NOT HAVE_CUDA)\n    add_cuda()\nendif()\n"
        'execute_process(COMMAND ${PY_EXE} -c "from distutils.sysconfig import get_python_inc; '
        'print(get_python_inc())"\n'
        'if(NOT Pytorch_VERSION VERSION_LESS "1.5.0")\n    set(CMAKE_CXX_STANDARD 14)\nendif()\n'
    ),
    "horovod/runner/js_run.py": "from distutils.spawn import find_executable\n",
    "horovod/common/ops/cuda/CMakeLists.txt": (
        "set(CMAKE_CUDA_STANDARD 11)\nset(CMAKE_CUDA_STANDARD_REQUIRED ON)\n"
    ),
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for name, text in RELEASE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_release_is_compiled_as_the_headers_of_torch_are_written(release: Path) -> None:
    patch(release, patches(with_nccl=False))
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        text = (release / name).read_text()
        assert re.findall(r"CMAKE_CXX_STANDARD (\d+)", text) == ["20"]
    assert (release / "cmake/Modules/FindPytorch.cmake").read_text() == (
        "foreach(_LIB IN LISTS _Pytorch_LIBRARIES)\n"
        "    if(FOUND_LIB_${_LIB})\n"
        "        list(APPEND Pytorch_LIBRARIES ${FOUND_LIB_${_LIB}})\n"
        "    endif()\nendforeach()\n"
    )


def test_a_compiler_of_cuda_is_asked_for_only_with_nccl(release: Path) -> None:
    patch(release, patches(with_nccl=False))
    assert "CMAKE_CUDA_COMPILER" not in (release / "CMakeLists.txt").read_text()
    assert "Pytorch_CUDA" not in (release / "horovod/torch/CMakeLists.txt").read_text()


def test_with_nccl_cuda_is_asked_for(release: Path) -> None:
    patch(release, patches(with_nccl=True))
    assert "CMAKE_CUDA_COMPILER" in (release / "CMakeLists.txt").read_text()
    assert "Pytorch_CUDA" in (release / "horovod/torch/CMakeLists.txt").read_text()
    cuda = (release / "horovod/common/ops/cuda/CMakeLists.txt").read_text()
    assert cuda.startswith("set(CMAKE_CUDA_STANDARD 17)")


def test_nothing_imports_what_python_no_longer_has(release: Path) -> None:
    patch(release, patches(with_nccl=False))
    assert not [name for name in RELEASE if "distutils" in (release / name).read_text()]
    line = (release / "horovod/runner/js_run.py").read_text()
    space: dict[str, object] = {}
    exec(line, space)
    assert callable(space["find_executable"])


@pytest.mark.parametrize("text", ["", "a\na\n"])
def test_another_release_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(
        BuildError, match=r"file of the source release has 'a' [02] times.*0\.28\.1"
    ):
        patch(tmp_path, [Patch("file", "a\n", "b\n")])
    with pytest.raises(BuildError, match="missing of the source release"):
        patch(tmp_path, [Patch("missing", "a", "b")])
    assert (tmp_path / "file").read_text() == text


def test_a_wheel_belongs_to_one_torch_python_and_way_of_gradients() -> None:
    keys = {
        cache_key(torch, with_nccl=with_nccl)
        for torch in ("2.15.0+cpu", "2.15.0+cu132", "2.14.0+cpu")
        for with_nccl in (False, True)
    }
    assert len(keys) == 6
    assert all(f"cp{sys.version_info.major}{sys.version_info.minor}" in key for key in keys)
    assert not any("/" in key or " " in key for key in keys)


def test_wheels_are_kept_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPRESSOR_WHEELS", str(tmp_path))
    assert default_wheel_dir() == tmp_path
    monkeypatch.delenv("COMPRESSOR_WHEELS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_wheel_dir() == Path("/cache/compressor/wheels")


def test_a_kept_wheel_is_not_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_horovod, "_torch_version", lambda: "2.15.0")
    monkeypatch.setenv("PATH", "")  # nothing to build with
    wheel = tmp_path / cache_key("2.15.0", with_nccl=False) / "horovod-0.28.1.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert find_or_build(tmp_path) == wheel
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        find_or_build(tmp_path, with_nccl=True)


def test_what_is_missing_to_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler 'no-such-compiler'.*apt-get install"):
        check_compiler()
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(BuildError, match=r"does not take -std=c\+\+20"):
        check_compiler()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="no `make`"):
        check_compiler()


def test_a_failure_is_said_and_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build_horovod, "set_verbosity", lambda level: None)
    assert main(["--wheel-dir", str(tmp_path)]) == 1
    assert "no C++ compiler" in caplog.text


def test_the_build_sees_its_own_tools_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/own")
    host = build_environment(Path("/tools"), with_nccl=False, jobs=3)
    assert host["PYTHONPATH"] == "/tools:/own"
    assert host["MAKEFLAGS"] == "-j3"
    assert "HOROVOD_GPU_OPERATIONS" not in host
    nccl = build_environment(Path("/tools"), with_nccl=True, jobs=3)
    assert nccl["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_the_toolkit_is_found_by_what_nvcc_says_of_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(BuildError, match=r"no `nvcc` here.*CUDA_HOME.*leave --nccl out"):
        nccl_environment(tmp_path / "links")
    toolkit, script = tmp_path / "toolkit" / "bin" / "nvcc", tmp_path / "path" / "nvcc"
    for path in (toolkit, script):  # where the toolkit is not above the script
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit.parent}/..' >&2\n")
        path.chmod(0o755)
    found = nccl_environment(tmp_path / "links")
    assert found["CUDA_HOME"] == found["CUDAToolkit_ROOT"] == str(tmp_path / "toolkit")


def test_an_nccl_of_the_users_own_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("HOROVOD_NCCL_HOME", "/own")
    assert not [name for name in nccl_environment(tmp_path / "links") if "NCCL" in name]


def test_all_that_is_changed_is_of_the_release_that_is_taken() -> None:
    assert horovod_patches.VERSION in cache_key("2", with_nccl=False)
    known = {change.path for with_nccl in (False, True) for change in patches(with_nccl=with_nccl)}
    assert known == RELEASE.keys()
