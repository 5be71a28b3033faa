"""`compressor doctor`: what is installed here, what can run here, and what would be faster."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compressor.cli.endings import print_json
from compressor.errors import CompressorError
from compressor.export.saturation import is_saturating
from compressor.hardware import INT8_FLAGS, cpu_flags, describe_machine
from compressor.targets import TARGETS

SHOWN_FLAGS = ("avx2", "avx512f", *INT8_FLAGS)
OWN_EXTRAS = {"all", "dev", "docs", "test"}  # for work on this package itself
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+).*?extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


@dataclass(frozen=True)
class Extra:
    """Optional libraries that come together.

    Attributes:
        name: of the extra.
        installed: versions by library.
        missing: libraries that are not there.
        install: the line that brings them.
    """

    name: str
    installed: dict[str, str]
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Usable:
    """A target on a device.

    Attributes:
        runtime: name of the target.
        device: "cpu" or "cuda".
        formats: of few bits that it computes.
        reason: why it cannot be used here, or "".
    """

    runtime: str
    device: str
    formats: tuple[str, ...]
    reason: str


def examine_machine(*, cores: int, as_json: bool) -> None:
    """Print everything that is found.

    Args:
        cores: that this process was given, before torch was loaded.
        as_json: print JSON.
    """
    found = examine(cores)
    if as_json:
        print_json(found)
    else:
        _print(found)


def examine(cores: int) -> dict[str, Any]:
    """All facts, as plain JSON values."""
    flags, described = cpu_flags(), describe_machine()
    machine: Any = described["machine"]
    threads = torch.get_num_threads()
    has_int8 = any(flag in flags for flag in INT8_FLAGS)
    targets = [usable(name, device) for name, cls in TARGETS.items() for device in cls.devices]
    extras = find_extras()
    return {
        "versions": described["versions"],
        "cpu": {
            "model": machine["cpu"],
            "flags": [flag for flag in SHOWN_FLAGS if flag in flags],
            "cores": machine["cores"],
            "usable_cores": cores,
            "saturates": is_saturating(),
        },
        "threads": {"torch": threads, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "gpus": find_gpus(),
        "targets": [asdict(each) for each in targets],
        "extras": [asdict(each) for each in extras],
        "advice": advise(
            has_int8=has_int8,
            saturates=is_saturating(),
            knows_flags=bool(flags),
            cores=cores,
            threads=threads,
            has_gpu=torch.cuda.is_available(),
        ),
    }


def advise(
    *,
    has_int8: bool,
    saturates: bool,
    knows_flags: bool,
    cores: int,
    threads: int,
    has_gpu: bool,
) -> list[str]:
    """What would be faster or safer, in sentences.

    Args:
        has_int8: the processor multiplies integers of eight bits (VNNI, AMX, or ARM's).
        saturates: sums of eight-bit products overflow here.
        knows_flags: whether it is known what the processor can do.
        cores: that this process may use.
        threads: of torch.
        has_gpu: torch finds one.

    >>> advise(has_int8=True, saturates=False, knows_flags=True, cores=2, threads=8, has_gpu=True)
    ['torch computes with 8 threads on 2 usable cores, which is slower: set OMP_NUM_THREADS=2.']
    """
    said = []
    if knows_flags and not has_int8:
        said.append(
            "This processor has no int8 instructions (VNNI, AMX, dot product): int8 files are "
            "smaller, and may be no faster than float here. Run the search on the kind of machine "
            "that you deploy to."
        )
    if saturates:
        said.append(
            "Sums of eight-bit products saturate on this processor, so weights get 7 bits here; on "
            "one with VNNI they keep 8."
        )
    if threads > cores:
        said.append(
            f"torch computes with {threads} threads on {cores} usable cores, which is slower: set "
            f"OMP_NUM_THREADS={cores}."
        )
    if not has_gpu:
        said.append(
            "torch finds no GPU: variants are trained on the CPU, so fewer are tried in the same "
            "minutes. Where a file is deployed to a CPU it is timed there either way."
        )
    return said


def find_gpus() -> list[dict[str, Any]]:
    """Names and memory of those that torch finds."""
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return found


def usable(runtime: str, device: str) -> Usable:
    """Whether a target can be used on this machine."""
    if runtime == "inductor" and device == "cpu" and not _has_compiler():
        return Usable(runtime, device, (), "it compiles, and there is no C++ compiler: install g++")
    try:
        target = TARGETS[runtime](device)
        return Usable(runtime, device, tuple(sorted(target.formats)), "")
    except CompressorError as error:
        return Usable(runtime, device, (), str(error))


def find_extras() -> list[Extra]:
    """The extras of this package that bring features, by its own metadata."""
    try:
        lines = requires("compressor") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return []
    libraries: dict[str, list[str]] = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        if match and match["extra"] not in OWN_EXTRAS and match["name"] != "compressor":
            libraries.setdefault(match["extra"], []).append(match["name"])
    return [_extra(name, needed) for name, needed in sorted(libraries.items())]


def _extra(name: str, libraries: list[str]) -> Extra:
    installed: dict[str, str] = {}
    missing: list[str] = []
    for library in libraries:
        try:
            installed[library] = version(library)
        except PackageNotFoundError:
            missing.append(library)
    return Extra(name, installed, tuple(missing), f'pip install "compressor[{name}]"')


def _has_compiler() -> bool:
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return any(shutil.which(name) for name in names if name)


def _print(found: dict[str, Any]) -> None:
    out = Console()
    cpu, threads = found["cpu"], found["threads"]
    facts = Table(title="This machine", show_header=False)
    facts.add_row("processor", cpu["model"])
    facts.add_row("its instructions", ", ".join(cpu["flags"]) or "not known, or none that help")
    facts.add_row("cores", f"{cpu['usable_cores']} usable of {cpu['cores']}")
    omp = threads["OMP_NUM_THREADS"]
    facts.add_row("threads of torch", f"{threads['torch']} (OMP_NUM_THREADS={omp or 'not set'})")
    gpus = [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in found["gpus"]]
    facts.add_row("GPU", "; ".join(gpus) or "none that torch finds")
    for library, number in found["versions"].items():
        facts.add_row(library, number)
    out.print(facts)

    targets = Table("target", "device", "usable", "formats of few bits", title="Targets")
    for each in found["targets"]:
        reason = each["reason"].split(". ")[0]  # the fact; JSON has the way out as well
        is_usable = f"no: {reason}" if reason else "yes"
        targets.add_row(each["runtime"], each["device"], is_usable, ", ".join(each["formats"]))
    out.print(targets)

    extras = Table("extra", "installed", "brought by", title="Optional libraries")
    for each in found["extras"]:
        have = ", ".join(f"{name} {number}" for name, number in each["installed"].items())
        lack = ", ".join(each["missing"])
        line = each["install"].replace("[", r"\[") if lack else ""
        extras.add_row(each["name"], "; ".join(filter(None, [have, lack and f"not {lack}"])), line)
    if found["extras"]:
        out.print(extras)
    for sentence in found["advice"]:
        out.print(f"- {sentence}", markup=False)
