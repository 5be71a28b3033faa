"""The model card: README.md as Hugging Face shows it, from the measured numbers of a result.

A field that was not measured, or that nobody gave, is not there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.files import write_text
from compressor.report.claims import certainty, looked, measured, parity, within
from compressor.report.words import metric_text
from compressor.result import Certificate, Plan
from compressor.units import change_of, times

LIBRARY = "compressor"
SPECIAL = re.compile(r"([\\`*\[\]<>|~])")  # what Markdown or HTML would act on within a line


@dataclass(frozen=True)
class About:
    """What a card says that no measurement knows; what is empty is left out.

    Attributes:
        name: of the model.
        architecture: the class of the reference.
        dataset: that the metric was measured on.
        license: of the weights, as Hugging Face writes it: "apache-2.0".
        base_model: id of the reference on the hub.
        onnx_file: name of the exported file, if it lies beside the card.
    """

    name: str = ""
    architecture: str = ""
    dataset: str = ""
    license: str = ""
    base_model: str = ""
    onnx_file: str = ""


UNSAID = About()


def write_card(values: Mapping[str, Any], path: Path | str, about: About = UNSAID) -> Path:
    """Write the card of a run to `path`, whole or not at all.

    Args:
        values: of `result.json`, or `Result.to_json()`.
        path: usually a README.md.
        about: what a result does not hold.

    Returns:
        The path.
    """
    write_text(Path(path), make_card(values, about))
    return Path(path)


def make_card(values: Mapping[str, Any], about: About = UNSAID) -> str:
    """The text of `write_card`: YAML front matter, then Markdown."""
    certificate = Certificate.from_json(values["certificate"])
    plan = Plan.from_json(values["plan"])
    front = yaml.safe_dump(
        _front_matter(values, certificate, plan, about), sort_keys=False, allow_unicode=True
    )
    sections = [
        _headline(certificate, about),
        _section("Before and after", _table(certificate)),
        _section("How it was measured", _bullets(_measurement(values, certificate))),
        _section("What was done", _bullets(_changes(plan, values.get("reason", "")))),
        _section("Use", _usage(about)),
        _section("What to know", _bullets([*certificate.notes, *values.get("lost", ())])),
    ]
    return f"---\n{front}---\n\n" + "\n".join(section for section in sections if section)


def _front_matter(
    values: Mapping[str, Any], certificate: Certificate, plan: Plan, about: About
) -> dict[str, Any]:
    techniques = sorted({choice.technique for choice in plan})
    onnx = ["onnx"] if about.onnx_file else []
    task = values.get("info", {}).get("config", {}).get("task_type")
    given = {"license": about.license, "base_model": about.base_model}
    result = {
        "task": {"type": task or "other"},
        "dataset": {
            "type": about.dataset or "own",
            "name": about.dataset or "the user's own data",
            "split": certificate.split,
        },
        "metrics": [{"type": certificate.metric_name, "value": certificate.metric}],
    }
    return {
        "library_name": LIBRARY,
        **{key: value for key, value in given.items() if value},
        "tags": ["model-compression", *onnx, *techniques],
        "metrics": [certificate.metric_name],
        "model-index": [{"name": _name(about), "results": [result]}],
    }


def _name(about: About) -> str:
    return about.name or about.architecture or "compressed model"


def _headline(c: Certificate, about: About) -> str:
    before, after = (metric_text(value, c.delta) for value in (c.reference_metric, c.metric))
    return (
        f"# {_plain(_name(about))}\n\n"
        f"{_plain(c.metric_name)} {before} → {after}, {within(c)} {c.delta:g} of the uncompressed "
        f"model; {change_of('latency_ms', c.latency_ratio)}, "
        f"{change_of('size_bytes', c.size_ratio)}.\n"
    )


def _table(c: Certificate) -> str:
    rows = [
        ("", "uncompressed", "this model", "ratio"),
        ("---", "---:", "---:", "---:"),
        (
            _plain(c.metric_name),
            metric_text(c.reference_metric, c.delta),
            metric_text(c.metric, c.delta),
            "",
        ),
        (
            "latency, ms",
            f"{c.reference_latency_ms:.4g}",
            f"{c.latency_ms:.4g}",
            f"{c.latency_ratio:.3g}",
        ),
        (
            "size, bytes",
            f"{c.reference_size_bytes:,}",
            f"{c.size_bytes:,}",
            f"{c.size_ratio:.3g}",
        ),
        ("MACs", f"{c.reference_macs:,}", f"{c.macs:,}", f"{c.macs_ratio:.3g}"),
        (
            "parameters",
            f"{c.reference_params:,}",
            f"{c.params:,}",
            f"{c.params_ratio:.3g}",
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _measurement(values: Mapping[str, Any], c: Certificate) -> Iterator[str]:
    target = c.target
    if "runtime" in target:
        threads = f", {times(target['threads'], 'thread')}" if "threads" in target else ""
        batch = f", batch size {target['batch_size']}" if "batch_size" in target else ""
        yield f"Runtime: {target['runtime']} on {target.get('device', 'cpu')}{threads}{batch}."
    hardware = target.get("hardware") or {}
    if hardware.get("gpu"):
        yield f"GPU: {hardware['gpu']}."
    if hardware.get("cpu"):
        yield f"Processor: {hardware['cpu']}, {hardware.get('cores')} cores."
    yield (
        "The uncompressed model was exported to the same runtime in float32 and timed in the same "
        "process."
    )
    yield f"{measured(c)} {looked(c)}"
    yield from filter(None, (certainty(c), parity(c), str(c.agreement or "")))
    info = values.get("info", {})
    versions = {k: v for k, v in info.get("versions", {}).items() if v != "not installed"}
    if versions:
        yield f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    seed = info.get("config", {}).get("seed")
    if seed is not None:
        yield f"Seed: {seed}."


def _changes(plan: Plan, reason: str) -> Iterator[str]:
    counts = Counter(choice.technique for choice in plan)
    for technique, count in sorted(counts.items()):
        labels = Counter(choice.label for choice in plan.of(technique) if choice.label)
        common = ", ".join(f"{label} ({number})" for label, number in labels.most_common(4))
        often = f", most often {common}" if common else ""
        yield f"{technique}: {times(count, 'place')}{often}."
    if not counts:
        yield f"Nothing: {reason}." if reason else "Nothing was changed."


def _usage(about: About) -> str:
    name = about.architecture if about.architecture.isidentifier() else "MyModel"
    torch_part = (
        "In PyTorch, with the code of the uncompressed model:\n\n"
        "```python\nfrom compressor.export.hub import from_pretrained\n\n"
        f'model = from_pretrained("FOLDER OR REPOSITORY", {name}())\n```\n'
    )
    if not about.onnx_file:
        return torch_part
    return (
        f"The figures are of `{about.onnx_file}`, which needs ONNX Runtime alone:\n\n"
        "```python\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{about.onnx_file}")\n'
        "(name, *_) = [item.name for item in session.get_inputs()]\n"
        "outputs = session.run(None, {name: array})  # float32, any batch size\n```\n\n"
        f"`model.safetensors` has its weights in float. {torch_part}"
    )


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _bullets(sentences: Iterable[str]) -> str:
    return "".join(f"- {_plain(sentence)}\n" for sentence in sentences)


def _plain(text: str) -> str:
    r"""`text` as one line that Markdown shows as it is.

    >>> print(_plain("a|b <i>"))
    a\|b \<i\>
    """
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
