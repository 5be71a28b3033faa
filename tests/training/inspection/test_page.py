"""The page: whole, escaped, without anything from outside."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from compressor.training.inspection import Inspection, SampleCollector, confusion_matrix
from compressor.training.inspection.page import MOST_CLASSES

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags with their attributes, and the text of each table row; fails on what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_inspection(names: list[str], samples: int = 60) -> Inspection:
    classes = len(names)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 2
    collector = SampleCollector(2)
    collector.update(torch.rand(samples, 1, 3, 5, generator=generator), logits, labels)
    return Inspection(
        classes=tuple(names),
        confusion=confusion_matrix(logits.argmax(1), labels, classes),
        loss=0.5,
        best=tuple(replace(each, saliency=torch.rand(3, 5)) for each in collector.best),
        worst=tuple(collector.worst),
        most_confused=tuple(collector.most_confused),
    )


def test_page_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = make_inspection(["cat", "dog", "owl"]).save(tmp_path / "new" / "page.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//cdn|url\(|@import", text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.named("img"))
    policy = next(each for each in page.named("meta") if "http-equiv" in each)
    assert policy["content"].startswith("default-src 'none'")
    assert any(each.get("name") == "viewport" for each in page.named("meta"))
    assert "prefers-color-scheme: dark" in text


def test_every_picture_says_what_it_is() -> None:
    inspection = make_inspection(["cat", "dog", "owl"])
    images = Page(inspection.to_html()).named("img")
    assert len(images) == 2 + 2 + 4  # worst, confused; best with their maps
    assert all(image["alt"] and image["width"] == "5" for image in images)
    worst = inspection.worst[0]
    assert images[0]["alt"] == f"Sample {worst.index}: {inspection.classes[worst.label]}"


def test_tables_have_the_numbers() -> None:
    inspection = make_inspection(["cat", "dog", "owl"])
    rows = Page(inspection.to_html()).rows
    assert rows[0] == ["", "cat", "dog", "owl"]
    for name, row, counts in zip(
        inspection.classes, rows[1:4], inspection.confusion.tolist(), strict=True
    ):
        assert row == [name, *(str(count or "") for count in counts)]
    scores = inspection.scores
    order = sorted(range(3), key=lambda index: scores.f1[index])
    expected = [
        [
            inspection.classes[index],
            str(int(inspection.confusion[index].sum())),
            *(
                f"{100 * part[index].item():.1f} %"
                for part in (scores.precision, scores.recall, scores.f1)
            ),
        ]
        for index in order
    ]
    assert rows[5:] == expected


def test_names_titles_and_notes_are_text_and_not_markup() -> None:
    attack = "\"><script>alert('x')</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"
    inspection = replace(make_inspection([attack, "dog"]), title=attack, notes=(attack,))
    text = inspection.to_html()
    page = Page(text)
    assert not page.named("script")
    assert "{{ 7 * 7 }}" in text
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert any(attributes.get("title") == attack for attributes in page.named("th"))
    assert page.rows[0] == ["", attack, "dog"]


@pytest.mark.parametrize("classes", [2, 24, 25, MOST_CLASSES, MOST_CLASSES + 20])
def test_matrix_of_any_size(classes: int) -> None:
    names = [f"n{index}" for index in range(classes)]
    inspection = make_inspection(names, samples=400)
    text = inspection.to_html()
    page = Page(text)
    shown = min(classes, MOST_CLASSES)
    assert len(page.rows[0]) == shown + 1
    assert len(page.rows) == 1 + shown + 1 + classes
    assert ("classes with the most mistakes" in text) == (classes > MOST_CLASSES)
    assert any("dense" in table.get("class", "") for table in page.named("table")) == (classes > 24)
    kept = set(page.rows[0][1:])
    wrong = inspection.confusion.clone().fill_diagonal_(0)
    errors = {name: int(wrong[i].sum() + wrong[:, i].sum()) for i, name in enumerate(names)}
    left_out = [errors[name] for name in names if name not in kept]
    assert max(left_out, default=0) <= min(errors[name] for name in kept)


def test_a_model_without_mistakes_is_said_to_have_none() -> None:
    inspection = make_inspection(["cat", "dog"])
    perfect = replace(inspection, confusion=torch.tensor([[5, 0], [0, 0]]), worst=())
    text = perfect.to_html()
    assert "No mistake was made" in text
    assert "<h2>Worst</h2>" not in text
    assert Page(text).rows[-1] == ["dog", "0", "–", "–", "–"]


def test_the_same_inspection_gives_the_same_page() -> None:
    inspection = make_inspection(["cat", "dog"])
    assert inspection.to_html() == inspection.to_html()
