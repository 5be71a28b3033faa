"""The page of all benchmarks: made from records, up to date, and every figure has its source."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chart import PlainAxis, plain_chart
from benchmarks.report import HTML, PAGE, main, model_table, page, provenance
from benchmarks.report_models import outcomes
from benchmarks.report_page import IMAGES, Block, Heading, Link, Listing, Table, images, to_markdown
from benchmarks.report_results import Record, keep, read_records

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
NAME = "<img src=x onerror=alert(1)>"
DOCUMENT: dict[str, Any] = {
    "summary": {"net_latency_ratio": 4.0},
    "rows": [
        {
            "model": NAME,
            "row": "float32",
            "accuracy %": 91.0,
            "ms, batch 1": 0.8,
            "MB": 4.0,
            "parameters": 1000000,
            "peak MiB": 12.0,
            "minutes": None,
        },
        {
            "model": NAME,
            "row": "ours",
            "accuracy %": 90.5,
            "ms, batch 1": 0.2,
            "MB": 0.5,
            "parameters": 250000,
            "peak MiB": 6.0,
            "minutes": 7.5,
        },
    ],
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "int8_instructions": ["avx512_vnni"],
        "gpu": None,
        "system": "Linux x86_64",
    },
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "seed": 3,
    "command": "python -m benchmarks.versus --data /home/someone/data --json ../out.json --quick",
    "minutes": 12.0,
    "models": ["not of a record"],
}


@pytest.fixture(scope="module")
def kept() -> list[Record]:
    return read_records(RESULTS)


@pytest.fixture(scope="module")
def blocks(kept: list[Record]) -> list[Block]:
    return page(kept)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    source = tmp_path / "measured.json"
    source.write_text(json.dumps(DOCUMENT))
    keep(source, tmp_path / "results", "versus_net")
    return tmp_path / "results"


def test_the_page_in_the_docs_is_made_from_the_records(blocks: list[Block]) -> None:
    assert (DOCS / PAGE).read_text() == to_markdown(blocks), "run python -m benchmarks.report"
    drawn = {path.name: path.read_text() for path in (DOCS / IMAGES).glob("bench_*.svg")}
    assert drawn == images(blocks), "run python -m benchmarks.report"


def test_kept_records_name_no_folder_of_a_machine() -> None:
    paths = list(RESULTS.glob("*.json"))
    assert len(paths) > 10
    for path in paths:
        assert not re.search(r"[\s\"'](/(tmp|work|home|root)/|\.\./)", path.read_text()), path.name


def test_a_kept_record_is_what_was_measured_without_folders(results: Path) -> None:
    document = json.loads((results / "versus_net.json").read_text())
    assert document["command"] == "python -m benchmarks.versus --data PATH --json PATH --quick"
    for key in ("summary", "rows", "machine", "versions", "seed", "minutes"):
        assert document[key] == DOCUMENT[key]
    assert "models" not in document


def test_before_and_after_have_values_and_ratios_of_one_record(results: Path) -> None:
    (found,) = outcomes(read_records(results)).values()
    table = model_table(found)
    before, after = (dict(zip(table.titles, row, strict=True)) for row in table.rows)
    assert before["accuracy %"] == "91.00"
    assert after == {
        "": "ours",
        "accuracy %": "90.50",
        "size": "0.5 MB (8×)",
        "MACs": "–",
        "parameters": "250,000 (4×)",
        "memory": "6 MiB (2×)",
        "latency": "0.2 ms (4×)",
        "minutes": "7.5",
        "from": Link("versus_net", "versus_net"),
    }


def test_memory_of_the_process_that_quantizes_is_not_that_of_the_model() -> None:
    document = {**DOCUMENT, "command": "python -m benchmarks.quantization"}
    (found,) = outcomes([Record("q", "quantization", "", "", document)]).values()
    assert all("memory_mib" not in outcome.values for outcome in found)


def test_the_model_may_be_in_the_command() -> None:
    rows = [{"network": "unpruned", "accuracy %, trained": 92.0, "latency ratio, batch 1": 1.0}]
    document = {**DOCUMENT, "rows": rows, "command": "python -m benchmarks.p --model resnet56"}
    assert list(outcomes([Record("p", "p", "", "", document)])) == ["resnet56"]


def test_every_figure_has_command_machine_versions_and_seed(
    kept: list[Record], blocks: list[Block]
) -> None:
    lines = provenance(DOCUMENT)
    assert lines == [
        "net_latency_ratio: 4",
        "machine: Some CPU, 2 cores, avx512_vnni, Linux x86_64",
        "versions: python 3.11.7, torch 2.15.0",
        "seed: 3",
        f"command: {DOCUMENT['command']}",
        "minutes: 12.00",
    ]
    listings = [block for block in blocks if isinstance(block, Listing)]
    assert [listing.lines[-2] for listing in listings] == [
        f"command: {record.document['command']}" for record in sorted(kept, key=order(kept))
    ]


def order(records: list[Record]) -> Any:
    """Records of one benchmark stand together, in the order in which the benchmarks come."""
    benchmarks = list(dict.fromkeys(record.benchmark for record in records))
    return lambda record: benchmarks.index(record.benchmark)


def test_links_from_figures_lead_to_their_records(blocks: list[Block]) -> None:
    anchors = {block.anchor for block in blocks if isinstance(block, Heading)}
    tables = [block for block in blocks if isinstance(block, Table)]
    links = {
        cell.anchor
        for table in tables
        for row in table.rows
        for cell in row
        if isinstance(cell, Link)
    }
    assert links
    assert links <= anchors


def test_a_record_without_its_command_is_refused(tmp_path: Path) -> None:
    incomplete = {key: value for key, value in DOCUMENT.items() if key != "command"}
    (tmp_path / "a.json").write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match=r"a\.json has no 'command'"):
        read_records(tmp_path)


def test_the_html_page_needs_no_other_file_and_takes_names_as_text(
    results: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    main(["--results", str(results), "--output", str(output)])
    text = (output / HTML).read_text()
    found = Seen()
    found.feed(text)
    assert "img" not in found.tags
    assert found.addresses == {"#versus_net"}
    assert NAME in "".join(found.words)
    assert found.tags.count("table") == 2
    assert (output / IMAGES / "bench_img-srcx-onerroralert1.svg").exists()
    assert (output / PAGE).read_text().startswith("# Benchmarks\n")


class Seen(HTMLParser):
    """The tags of a page, what it refers to, and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: set[str | None] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses |= {value for name, value in attrs if name in ("src", "href")}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_plain_axes_run_between_multiples_of_a_round_step() -> None:
    axis = PlainAxis.around([0.88, 1.02], 0, 300)
    assert axis.ticks() == pytest.approx([0.875, 0.9, 0.925, 0.95, 0.975, 1.0, 1.025])
    assert axis.place(0.875) == pytest.approx(0)
    assert axis.place(1.025) == pytest.approx(300)
    assert PlainAxis.around([5.0], 0, 1).place(5.0) <= 1


def test_a_plain_chart_has_a_point_for_each_pair() -> None:
    svg = plain_chart({"a & b": [(1.0, 2.0), (3.0, -1.0)]}, "x", "y")
    assert svg.count("<circle") == 2
    assert "a &amp; b" in svg
