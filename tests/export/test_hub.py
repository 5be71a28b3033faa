"""A folder in the hub's layout: written, read, uploaded to a local server and fetched from it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import compressor
from compressor.errors import CheckpointError, ConfigError, MissingDependencyError
from compressor.export import hub
from compressor.export.hub import from_pretrained, push_to_hub, save_pretrained
from compressor.report.card import About
from compressor.result import Certificate, Plan, Result
from compressor.testing.models import TinyMLP

ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
COMMIT = "0123456789012345678901234567890123456789"


class Net(nn.Sequential):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compressor.prune(Net(24).eval(), ROWS, kept_fraction=0.5).model


def make_result(model: nn.Module, onnx: Path) -> Result:
    onnx.write_bytes(b"an exported file")
    certificate = Certificate(
        "accuracy", 90.0, 90.5, 1.0, True, 2.0, 3.0, 2.0, 2.0, 1.0, 2.0, 10, 30, 5, 10, 7, 14, None
    )
    return Result(model, certificate, [], [], {"onnx": onnx}, Plan())


@pytest.fixture
def folder(small: nn.Module, tmp_path: Path) -> Path:
    result = make_result(small, tmp_path / "run.onnx")
    arguments = {"hidden": 24}
    about = About(license="mit")
    return save_pretrained(small, tmp_path / "hub", result=result, arguments=arguments, about=about)


def test_the_folder_has_the_layout_of_the_hub(folder: Path) -> None:
    names = {"README.md", "config.json", "model.onnx", "model.safetensors", "structure.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Net"]
    assert config["arguments"] == {"hidden": 24}
    assert (folder / "model.onnx").read_bytes() == b"an exported file"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 90.0
    assert "Net()" in card.text


def test_the_model_comes_back_on_an_instance_and_on_the_class(
    folder: Path, small: nn.Module
) -> None:
    for reference in (Net(24), Net):
        loaded = from_pretrained(folder, reference)
        assert torch.equal(loaded(ROWS), small(ROWS))
        assert not loaded.training


def test_without_a_result_there_is_no_card(small: nn.Module, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(hub.FILES)


def test_a_class_that_takes_more_than_was_saved_is_explained(
    small: nn.Module, tmp_path: Path
) -> None:
    save_pretrained(small, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"what the reference is made with .*an instance"):
        from_pretrained(tmp_path, Net)


def test_arguments_that_are_no_json_are_refused_before_writing(
    small: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="are no JSON"):
        save_pretrained(small, tmp_path / "new", arguments={"hidden": torch.ones(1)})
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_neither_folder_nor_repository_is_explained() -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a repository"):
        from_pretrained("no/such/folder/here", TinyMLP())


def test_an_incomplete_folder_is_not_uploaded(folder: Path) -> None:
    (folder / "structure.json").unlink()
    with pytest.raises(CheckpointError, match=r"structure\.json is missing"):
        push_to_hub(folder, "me/small")


def test_a_missing_library_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[hub\]"'):
        push_to_hub(folder, "me/small")


def test_what_is_pushed_is_what_is_fetched(
    folder: Path, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (folder / "secret.txt").write_text("not mine to share")
    address = push_to_hub(folder, "me/small", token="hf_local", endpoint=server.address)
    assert address == f"{server.address}/me/small/commit/{COMMIT}"
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    del expected["secret.txt"]
    assert server.files == expected
    assert server.tokens == {"Bearer hf_local"}
    loaded = from_pretrained("me/small", Net, endpoint=server.address)
    assert torch.equal(loaded(ROWS), small(ROWS))
    assert server.fetched == set(hub.FILES)


class Server(ThreadingHTTPServer):
    """So much of the hub as an upload and a download of small files need."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.fetched: set[str] = set()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.address}/me/small", "id": "me/small"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            address = f"{self.server.address}/me/small/commit/{COMMIT}"
            self.answer({"commitUrl": address, "commitOid": COMMIT, "success": True})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                for path, content in self.server.files.items()
            ]
            self.answer(entries)
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": file} for file in self.server.files]
            self.answer({"id": "me/small", "sha": COMMIT, "siblings": siblings})
        elif "/resolve/" in self.path and name in self.server.files:
            self.send_file(self.server.files[name])
            self.server.fetched.add(name)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        self.send_file(self.server.files[name], is_head=True)

    def send_file(self, content: bytes, *, is_head: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{git_id(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def answer(self, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args
