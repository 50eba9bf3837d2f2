"""vllm/settings.py: what the environment may say, and what is wrong with it; and that a plugin that is off does nothing."""

import re
from pathlib import Path

import pytest
from support import IS_HUB_1, run_python_process

from peft_tinylora import ConfigError
from peft_tinylora.vllm import register
from peft_tinylora.vllm.settings import VARIABLE, Settings, read_settings


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with two adapters' folders."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two=2").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(value: str, **numbers: str) -> Settings | None:
    return read_settings({VARIABLE: value, **{f"{VARIABLE}_{name}": number for name, number in numbers.items()}})


@pytest.mark.parametrize("value", ["", " ", ",", " , ,, ", "\n"])
def test_it_is_off_unless_something_is_named(value: str) -> None:
    assert read_settings({}) is None
    assert read_settings({f"{VARIABLE}_RANK": "no number"}) is None
    assert read(value) is None


def test_what_is_not_set_has_its_default() -> None:
    assert read("inline") == Settings({}, inline=True, rank=2, most_characters=65536, rate=20)


def test_names_are_those_of_the_list(here) -> None:
    assert read("user/name") == Settings({"user/name": "user/name"}, inline=False)
    assert read("gpt2").sources == {"gpt2": "gpt2"}
    assert read("ada=one") == Settings({"ada": str(here / "one")}, inline=False)
    assert read(f"ada={here}/one/../one").sources == {"ada": str(here / "one")}
    assert read("ada=two=2").sources == {"ada": str(here / "two=2")}
    assert list(read("b/c,ada=one,a/b").sources) == ["b/c", "ada", "a/b"]
    assert read("user/name,ada=one,inline") == Settings(
        {"user/name": "user/name", "ada": str(here / "one")}, inline=True
    )


def test_a_folder_stays_the_same_when_the_process_goes_elsewhere(here, monkeypatch) -> None:
    (here / "link").symlink_to("one")
    sources = read("ada=link").sources
    monkeypatch.chdir("/")
    assert sources == {"ada": str(here / "one")} and Path(sources["ada"]).is_absolute()


def test_space_and_empty_entries_and_repetitions_do_not_matter(here) -> None:
    expected = Settings({"user/name": "user/name", "ada": str(here / "one")}, inline=True)
    assert read(" inline ,, user/name,\n\tada=one ,user/name, ada=one,inline,") == expected


@pytest.mark.parametrize("entry", ["ada=nothing", "ada=file", "ada=~/one", "=one", "=", "ada=one=", "ada=two", "ada="])
def test_what_names_no_folder_is_refused(here, entry: str) -> None:
    message = re.escape(f"{VARIABLE}: {entry!r} names no folder of this machine: NAME=FOLDER, or a Hub id.")
    for value in (entry, f"inline, user/name,{entry} "):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            read(value)


@pytest.mark.parametrize(
    "entry",
    ["..", "../secret", "user/..", "a..b/c", "/etc", "./one", "a/b/c", "user name", "user/name@main", "user/", "*",
     "https://huggingface.co/user/name", "user--name/x", "-", "a.git", "x" * 97, "inline;user/name",
     pytest.param("é", marks=pytest.mark.skipif(IS_HUB_1, reason="huggingface_hub 1 lets it pass"))],
)  # fmt: skip
def test_what_is_no_id_is_refused(here, entry: str) -> None:
    is_neither = f"{VARIABLE}: {entry!r} is neither `inline`, nor NAME=FOLDER, nor a Hub id like 'user/name'."
    for value in (entry, f"inline,{entry},ada=one"):
        with pytest.raises(ConfigError, match=f"^{re.escape(is_neither)}$"):
            read(value)


FIELDS = {"RANK": "rank", "CHARACTERS": "most_characters", "RATE": "rate"}


@pytest.mark.parametrize("variable", FIELDS)
def test_numbers_are_read(variable: str) -> None:
    assert read("inline", **{variable: "7"}) == Settings({}, True, **{FIELDS[variable]: 7})
    assert getattr(read("inline", **{variable: str(10**9 - 1)}), FIELDS[variable]) == 10**9 - 1


@pytest.mark.parametrize("value", ["", "0", "000", "-1", "1.5", "1e3", "two", " 4", "4 ", "+4", "²", "1_000", "0x10", "inf"])  # fmt: skip
@pytest.mark.parametrize("variable", FIELDS)
def test_what_is_no_positive_integer_is_refused(variable: str, value: str) -> None:
    message = re.escape(f"{VARIABLE}_{variable}={value!r}: must be a positive integer of at most 9 digits.")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        read("user/name", **{variable: value})


def test_the_environment_of_the_process_is_read(monkeypatch) -> None:
    for variable in (VARIABLE, *(f"{VARIABLE}_{name}" for name in FIELDS)):
        monkeypatch.delenv(variable, raising=False)
    assert read_settings() is None
    monkeypatch.setenv(VARIABLE, "inline")
    monkeypatch.setenv(f"{VARIABLE}_RANK", "8")
    assert read_settings() == Settings({}, inline=True, rank=8)


# vLLM is not in the environment of these tests, and may be in others.
REGISTER = """
    import os, sys
    before = set(sys.modules)
    import peft_tinylora.vllm
    for value in (None, "", " , "):
        os.environ.pop("PEFT_TINYLORA_VLLM", None) if value is None else os.environ.update(PEFT_TINYLORA_VLLM=value)
        assert peft_tinylora.vllm.register() is None
    new = sys.modules.keys() - before
    own = [name for name in new if name.startswith("peft_tinylora.vllm.")]
    print(sorted(own), [name for name in new if name.split(".")[0] in ("vllm", "fastapi")])
"""


def test_a_plugin_that_is_off_imports_nothing_of_vllm() -> None:
    assert run_python_process(REGISTER).splitlines()[-1] == "['peft_tinylora.vllm.settings'] []"


def test_a_wrong_setting_stops_a_plugin_before_vllm_is_changed(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "ada=/nothing/there")
    with pytest.raises(ConfigError, match="names no folder of this machine"):
        register()


def test_a_name_for_two_folders_is_refused(here) -> None:
    (here / "two").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match="'ada' stands there twice"):
        read("ada=one,ada=two")


@pytest.mark.parametrize("name", ["inline", "tinylora:x"])
def test_a_name_that_means_something_else_is_refused(here, name: str) -> None:
    with pytest.raises(ConfigError, match="stand for adapters in the request"):
        read(f"{name}=one")
