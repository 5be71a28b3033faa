"""Jobs and factories by name: what is found, what lies over what, and what is refused how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.cli import factories
from compressor.cli.jobs import JobSpec, kept_job, read_job
from compressor.cli.overrides import nest, parse
from compressor.errors import CompressorError, ConfigError, StudyError
from compressor.search.run_dir import open_run_dir

TINY = "tests.cli.tiny_job"
JOB = """
import helper_beside
SCALE = 2
def make(width=1):
    return helper_beside.double(width)
class NotAFunction: pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "my_job.py").write_text(JOB)
    return tmp_path


def test_a_function_of_a_file_finds_the_modules_beside_it(folder: Path) -> None:
    named = factories.absolute("my_job.py:make", folder)
    assert named == f"{folder / 'my_job.py'}:make"
    assert factories.find(named, Path("/"))(4) == 8


def test_a_job_file_names_a_file_beside_it_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "job.yaml"
    path.write_text("factory: my_job.py:make\narguments: {width: 3}\n")
    monkeypatch.chdir("/")
    assert read_job(str(path), {}).make() == (6, None)
    assert read_job(f"{folder}/my_job.py:make", nest([parse("arguments.width=5")])).make()[0] == 10


def test_files_of_one_name_in_two_folders_are_two_modules(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "my_job.py").write_text("def make():\n    return 'other'\n")
    first = factories.find(factories.absolute("my_job.py:make", folder), folder)
    second = factories.find(factories.absolute("other/my_job.py:make", folder), folder)
    assert (first(), second()) == (2, "other")
    assert factories.find(factories.absolute("my_job.py:make", folder), folder) is first


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("nothing", "is no job"),
        ("no_such_module:make", "There is no module 'no_such_module'"),
        (f"{TINY}:mak", r"has no function 'mak'. Did you mean 'make'\?"),
        (f"{TINY}:CLASSES", "is a int, not a function"),
        ("gone.py:make", "There is no file .*gone.py"),
        ("gone.yaml", "gone.yaml cannot be read: No such file"),
        (":make", "names no function"),
        (f"{TINY}:make_nothing", "returns a int. Return an Engine"),
    ],
)
def test_what_is_no_job_is_refused_with_the_way_out(named: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_job(named, {}).open()


def test_a_module_that_lacks_one_of_its_own_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        factories.find(f"{tmp_path / 'needy.py'}:make", tmp_path)


def test_arguments_that_the_factory_does_not_take_are_named() -> None:
    job = read_job(f"{TINY}:make_pair", {"arguments": {"hiden": 3}})
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'hiden'.*arguments\.NAME"):
        job.make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: {delta: 1}", "names no factory. Add `factory:"),
        ("factor: a:b", "Unknown key 'factor' in .* Did you mean 'factory'"),
        ("factory: [", "is not YAML"),
        ("- a", "Write a mapping"),
        ("factory: a:b\narguments: 3", "arguments is 3"),
    ],
)
def test_a_job_file_that_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_job(str(path), {})


def test_set_lies_over_the_file_which_lies_over_the_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    (tmp_path / "base.yaml").write_text("{delta: 5, level: 2, budget: {minutes: 3}}")
    path.write_text(f"factory: {TINY}:make\nconfig: base.yaml\narguments: {{hidden: 8, seed: 5}}")
    job = read_job(str(path), nest([parse("budget.trials=7"), parse("arguments.hidden=24")]))
    engine, run_dir = job.open()
    config = engine.config
    assert (config.delta, config.level, config.seed) == (5, 2, 5)
    assert (config.budget.minutes, config.budget.trials) == (3, 7)
    assert config.optimization == "compression"
    assert engine.job.model.fc1.out_features == 24
    assert run_dir == Path("runs/small")
    assert config.run_dir == str(tmp_path / "runs/small"), "also if the factory changes directory"


def test_the_path_of_a_config_begins_in_the_folder_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "beside.yaml").write_text("delta: 7")
    (tmp_path / "jobs" / "beside.yaml").write_text("delta: 3")
    (tmp_path / "jobs" / "job.yaml").write_text(f"factory: {TINY}:make_from_file")
    assert read_job("jobs/job.yaml", {}).open()[0].config.delta == 3
    assert read_job(f"{TINY}:make_from_file", {}).open()[0].config.delta == 7
    assert read_job(f"{TINY}:make_from_file", {"delta": 5}).open()[0].config.delta == 5


def test_the_folder_is_that_of_the_command_then_of_the_configuration() -> None:
    overrides = {"run_dir": "from_config"}
    assert read_job(f"{TINY}:make", overrides).open()[1] == Path("from_config")
    assert read_job(f"{TINY}:make", overrides).open(Path("given"))[1] == Path("given")
    assert read_job(f"{TINY}:make", {}).open()[1] == Path("runs/make")


def test_a_factory_with_a_run_dir_is_given_the_folder(tmp_path: Path) -> None:
    engine, folder = read_job(f"{TINY}:make_engine", {}).open(tmp_path)
    assert folder == tmp_path
    assert engine.config.run_dir == str(tmp_path)
    with pytest.raises(ConfigError, match="returns an Engine, whose configuration is settled, and"):
        read_job(f"{TINY}:make_engine", {"delta": 1}).open(tmp_path)


def test_an_unknown_key_of_the_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'delta'"):
        read_job(f"{TINY}:make", {"detla": 1}).open()


def test_a_kept_job_is_the_job_without_its_folder(tmp_path: Path) -> None:
    job = read_job(f"{TINY}:make", {"delta": 3, "arguments": {"hidden": 8}, "run_dir": "x"})
    job.keep(tmp_path)
    again = kept_job(tmp_path)
    assert again == JobSpec(f"{TINY}:make", "make", str(Path.cwd()), {"hidden": 8}, {"delta": 3})
    assert json.loads((tmp_path / "job.json").read_text())["schema_version"] == 1


def test_a_job_is_not_written_over_that_of_a_run_in_progress(tmp_path: Path) -> None:
    read_job(f"{TINY}:make", {"delta": 3}).keep(tmp_path)
    with open_run_dir(tmp_path), pytest.raises(StudyError, match="Another process works in"):
        read_job(f"{TINY}:make", {"delta": 4}).keep(tmp_path)
    assert kept_job(tmp_path).config == {"delta": 3}


def test_a_folder_that_names_no_job_says_how_it_was_started(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no job.json.*a script of yours"):
        kept_job(tmp_path)
    with pytest.raises(StudyError, match="There is no folder"):
        kept_job(tmp_path / "gone")
    (tmp_path / "job.json").write_text('{"factory": ')
    with pytest.raises(CompressorError, match=r"cannot be read.*Start the job again"):
        kept_job(tmp_path)


@pytest.mark.parametrize("text", ["delta", "=3", "a..b=1", "a={"])
def test_what_is_no_entry_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not key=value|cannot be read"):
        parse(text)
