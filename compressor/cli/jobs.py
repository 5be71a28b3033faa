"""A job as the command line names it: a YAML file or a factory; kept with the run, to resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from compressor.cli import factories
from compressor.cli.overrides import merge
from compressor.config import Config
from compressor.config.reader import as_mapping, check_keys
from compressor.engine import Engine
from compressor.errors import ConfigError, StudyError
from compressor.files import write_text
from compressor.frameworks.torch_framework import TorchFramework
from compressor.result import from_mapping
from compressor.search.run_dir import open_run_dir

FILE = "job.json"
SCHEMA_VERSION = 1
KEYS = ("factory", "arguments", "config")  # of a YAML file
PARTS = (  # of what a factory returns
    "model",
    "data",
    "config",
    "forward_pass",
    "eval_func",
    "loss_function_cls",
    "loss_function_kwargs",
)


@dataclass(frozen=True)
class JobSpec:
    """How to make a job again; plain JSON.

    Attributes:
        factory: makes it: "package.module:function", or a file's whole path and a function.
        name: of the folder under runs/ where none is given.
        folder: where modules are looked for first, and where the path of a config that the
            factory returns begins.
        arguments: keywords of the factory.
        config: over what the factory gives.
    """

    factory: str
    name: str
    folder: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def make(self, run_dir: Path | None = None) -> tuple[Any, Path | None]:
        """What the factory returns, and the folder that is settled so far.

        A factory with a parameter `run_dir` is given the folder of the run.

        Raises:
            ConfigError: if there is no such factory, or it does not take the arguments.
        """
        function = factories.find(self.factory, Path(self.folder))
        given = run_dir or self.config.get("run_dir")
        folder = None if given is None else Path(given)
        arguments = dict(self.arguments)
        if factories.takes(function, "run_dir") and "run_dir" not in arguments:
            folder = folder or self._default_folder()
            arguments["run_dir"] = folder
        return factories.call(function, self.factory, arguments), folder

    def open(self, run_dir: Path | None = None) -> tuple[Engine, Path]:
        """The engine of the job, and the folder that it runs in.

        Raises:
            ConfigError: if what the factory returns is no job.
        """
        made, folder = self.make(run_dir)
        return self.engine(made, folder)

    def engine(self, made: Any, folder: Path | None = None) -> tuple[Engine, Path]:
        """The engine of what the factory returned, and the folder that it runs in.

        Raises:
            ConfigError: if that is no job.
        """
        if isinstance(made, Engine):
            if set(self.config) - {"run_dir"}:
                raise ConfigError(
                    f"{self.factory} returns an Engine, whose configuration is settled, and "
                    f"{', '.join(self.config)} is to be set. Let it return a mapping with "
                    "'model', 'data' and 'config'."
                )
            engine = made
        else:
            engine = self._engine(made)
        given = engine.config.run_dir
        folder = folder or (Path(given) if given else self._default_folder())
        engine.config = replace(engine.config, run_dir=str(folder.absolute()))
        return engine, folder

    def keep(self, folder: Path) -> None:
        """Write it into the folder of the run, unless another process works there.

        Raises:
            StudyError: if one does, or the folder cannot be written.
        """
        config = {name: value for name, value in self.config.items() if name != "run_dir"}
        values = {"schema_version": SCHEMA_VERSION, **asdict(replace(self, config=config))}
        try:
            text = json.dumps(values, indent=1)
        except TypeError as error:
            raise ConfigError(f"The job cannot be kept as JSON: {error}. Write text.") from error
        with open_run_dir(folder):
            write_text(folder / FILE, text)

    def _engine(self, made: Any) -> Engine:
        given = _parts(made, self.factory)
        for name in ("model", "data"):
            if name not in given:
                raise ConfigError(
                    f"{self.factory} returns a mapping without {name!r}. Known: {', '.join(PARTS)}."
                )
        parts = {name: value for name, value in given.items() if name != "config"}
        config = given.get("config", {})
        if isinstance(config, (str, Path)):
            config = _load_yaml(Path(self.folder, config))
        config = _settle(config, self.config, self.factory)
        return Engine(framework=TorchFramework(), config=config, **parts)

    def _default_folder(self) -> Path:
        return Path("runs", self.name)


def read_job(named: str, overrides: Mapping[str, Any]) -> JobSpec:
    """The job that `named` means: a YAML file, or a factory.

    Args:
        named: "job.yaml", "package.module:function" or "path/to/file.py:function".
        overrides: entries of its configuration; those of "arguments" are the factory's keywords.

    Raises:
        ConfigError: if it cannot be meant.
    """
    path = Path(named)
    if path.suffix in {".yaml", ".yml"}:
        return _override(_read_yaml(path), overrides)
    if ":" not in named:
        raise ConfigError(f"{named!r} is no job. Write job.yaml, or: {factories.WAY}")
    here = Path.cwd()
    name = named.rpartition(":")[2]
    return _override(JobSpec(factories.absolute(named, here), name, str(here)), overrides)


def kept_job(run_dir: Path) -> JobSpec:
    """The job that a run was started as.

    Raises:
        StudyError: if the folder does not say.
    """
    path = run_dir / FILE
    if not run_dir.is_dir():
        raise StudyError(f"There is no folder {run_dir}. Give the run_dir of a run.")
    if not path.exists():
        raise StudyError(
            f"{run_dir} has no {FILE}: no `compressor run` was started there. If a script of yours "
            "was, start that again with the same run_dir; it goes on where it stopped."
        )
    try:
        values = json.loads(path.read_text())
        return from_mapping(JobSpec, values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} cannot be read: {error}. Start the job again with `compressor run` and the "
            "same --run-dir; it goes on where it stopped."
        ) from error


def _read_yaml(path: Path) -> JobSpec:
    values = as_mapping(_load_yaml(path), str(path))
    check_keys(values, dict.fromkeys(KEYS), str(path))
    if not isinstance(values.get("factory"), str):
        raise ConfigError(f"{path} names no factory. Add `factory: path/to/file.py:function`.")
    folder = path.parent.resolve()
    config = values.get("config") or {}
    if isinstance(config, str):
        config = _load_yaml(folder / config)
    return JobSpec(
        factories.absolute(values["factory"], folder),
        path.stem,
        str(folder),
        dict(as_mapping(values.get("arguments") or {}, f"{path}: arguments")),
        dict(as_mapping(config or {}, f"{path}: config")),
    )


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give another.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


def _override(job: JobSpec, overrides: Mapping[str, Any]) -> JobSpec:
    arguments = as_mapping(overrides.get("arguments", {}), "--set arguments")
    config = {name: value for name, value in overrides.items() if name != "arguments"}
    return replace(job, arguments=merge(job.arguments, arguments), config=merge(job.config, config))


def _parts(made: Any, factory: str) -> Mapping[str, Any]:
    if not isinstance(made, Mapping):
        raise ConfigError(
            f"{factory} returns a {type(made).__name__}. Return an Engine, or a mapping with "
            f"{', '.join(PARTS)}."
        )
    check_keys(made, dict.fromkeys(PARTS), f"what {factory} returns")
    return made


def _settle(config: Any, above: Mapping[str, Any], factory: str) -> Config:
    """The configuration of the factory, under that of the job."""
    if isinstance(config, Config):
        if set(above) - {"run_dir"}:
            raise ConfigError(
                f"{factory} returns a Config, which is settled, and {', '.join(above)} is to be "
                "set. Let it return its config as a mapping."
            )
        return config
    return Config.from_dict(merge(as_mapping(config or {}, "config"), above))
