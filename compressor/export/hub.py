"""A compressed model as a folder, or a repository, that Hugging Face's hub shows as a model.

The folder: `config.json`, `model.safetensors`, `structure.json` and the card, `README.md`; of a
run also the file to deploy, `model.onnx`. No pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compressor.errors import CheckpointError, ConfigError
from compressor.files import replace_file, write_text
from compressor.optional import require
from compressor.report.card import LIBRARY, UNSAID, About, write_card
from compressor.result import Result
from compressor.structure import archive

CONFIG_FILE, CARD_FILE, ONNX_FILE = "config.json", "README.md", "model.onnx"
FILES = (CONFIG_FILE, archive.STRUCTURE_FILE, archive.WEIGHTS_FILE)
ARGUMENTS = "arguments"
REVISION = "main"


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    *,
    result: Result | None = None,
    reference: nn.Module | None = None,
    arguments: Mapping[str, Any] | None = None,
    about: About = UNSAID,
) -> Path:
    """Write `model` into `folder` in the hub's layout.

    Args:
        model: of `Engine.run`, `prune` or `load`; or give `reference`.
        folder: made if it is not there.
        result: `engine.result`. The card has its measured numbers, and the file to deploy lies
            beside it; without it there is no card.
        reference: see `archive.save`.
        arguments: JSON that the reference's class is made with. They go into `config.json`, and
            `from_pretrained` can be given the class.
        about: what the card says that was not measured, such as the licence.

    Returns:
        The folder.

    Raises:
        ConfigError: if the arguments are no JSON.
        ModelError: as `archive.save`.
        CheckpointError: as `archive.save`.
    """
    folder = Path(folder)
    architecture = type(model if reference is None else reference).__name__
    config = _config_text(architecture, dict(arguments or {}))
    archive.save(model, folder, reference=reference)
    write_text(folder / CONFIG_FILE, config)
    if result is not None:
        onnx = result.artifacts.get("onnx")
        if onnx is not None:
            replace_file(folder / ONNX_FILE, lambda path: _copy(onnx, path))
        about = replace(
            about,
            architecture=about.architecture or architecture,
            onnx_file=ONNX_FILE if onnx is not None else "",
        )
        write_card(result.to_json(), folder / CARD_FILE, about)
    return folder


def from_pretrained(
    source: Path | str,
    reference: nn.Module | Callable[..., nn.Module],
    *,
    revision: str = REVISION,
    endpoint: str | None = None,
) -> nn.Module:
    """The model that `save_pretrained` wrote, in eval mode.

    Args:
        source: a folder, or the id of a repository of the hub, "name/model". What was downloaded
            before is not downloaded again.
        reference: an instance of the reference's class with its sizes; or the class, which is
            called with the `arguments` that were saved.
        revision: of a repository: branch, tag or commit.
        endpoint: address of another hub than Hugging Face's.

    Raises:
        CheckpointError: if a file is missing, truncated or altered, or of another reference.
        MissingDependencyError: if the hub is needed and `huggingface_hub` is not installed.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision, endpoint)
    if not isinstance(reference, nn.Module):
        reference = reference(**_read_arguments(folder / CONFIG_FILE))
    return archive.load(folder, reference)


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str = REVISION,
    message: str = "Upload a compressed model",
    endpoint: str | None = None,
) -> str:
    """Upload what `save_pretrained` wrote, as one commit. Other files of the folder are left out.

    Args:
        folder: of `save_pretrained`.
        repo_id: "name/model"; made if it is not there.
        private: whether a new repository is; None: as your account has it.
        token: None: that of `hf auth login`, or of the variable HF_TOKEN.
        revision: branch.
        message: of the commit.
        endpoint: address of another hub than Hugging Face's.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if the folder lacks a file.
        MissingDependencyError: if `huggingface_hub` is not installed.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing. Write the folder with `save_pretrained`."
            )
    hub = require("huggingface_hub", extra="hub")
    api = hub.HfApi(endpoint=endpoint, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    paths = [folder / name for name in (*FILES, CARD_FILE, ONNX_FILE)]
    commit = api.create_commit(
        repo_id,
        [hub.CommitOperationAdd(path.name, path) for path in paths if path.is_file()],
        commit_message=message,
        revision=revision,
    )
    return str(commit.commit_url)


def _config_text(architecture: str, arguments: dict[str, Any]) -> str:
    config = {"architectures": [architecture], "library_name": LIBRARY, ARGUMENTS: arguments}
    try:
        return json.dumps(config, indent=1)
    except TypeError as error:
        raise ConfigError(
            f"The arguments {arguments!r} are no JSON: {error}. Leave `arguments` out, and give "
            "`from_pretrained` an instance."
        ) from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _download(repo_id: str, revision: str, endpoint: str | None) -> Path:
    hub = require("huggingface_hub", extra="hub")
    try:
        return Path(
            hub.snapshot_download(
                repo_id, revision=revision, endpoint=endpoint, allow_patterns=list(FILES)
            )
        )
    except (hub.errors.HFValidationError, hub.errors.RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder here nor a repository of the hub: "
            f"{str(error).splitlines()[0]} Give the folder of `save_pretrained`, or 'name/model'."
        ) from error


def _read_arguments(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())[ARGUMENTS])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say what the reference is made with ({type(error).__name__}). Give "
            "an instance of it in place of the class."
        ) from error
