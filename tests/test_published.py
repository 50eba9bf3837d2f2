"""published.py: what must not be published is not in a command, a setting or a path."""

from pathlib import Path

import pytest

from peft_tinylora.published import command_line, is_secret, published, relative


def test_relative(tmp_path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert relative(str(tmp_path / "data")) == "data"
    assert relative("openai/gsm8k") == "openai/gsm8k"
    monkeypatch.chdir(tmp_path / "data")
    assert relative(str(tmp_path)) == tmp_path.name


def test_the_command_can_be_pasted_into_a_shell(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["trl_recipes/grpo.py", "--prompt_template", "{question} Think."])
    assert command_line(1) == "python trl_recipes/grpo.py --prompt_template '{question} Think.'"
    assert command_line(4).startswith("accelerate launch --num_processes 4 trl_recipes/grpo.py")


SECRETS = [
    ["--hub_token", "plain-token"],
    ["--hub_token=plain-token"],
    ["--model_init_kwargs", '{"token": "plain-token", "a": 1}'],
    ["--model_init_kwargs", "{'token': 'plain-token'}"],
    ["--x", f"hf_{'a' * 34}"],
]


@pytest.mark.parametrize("given", SECRETS, ids=range(len(SECRETS)))
def test_a_token_on_the_command_line_is_not_shown(monkeypatch, given: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["grpo.py", *given, "--eos_token", "<end>", "--max_new_tokens", "9"])
    shown = command_line(1)
    assert "plain-token" not in shown and "hf_a" not in shown and given[0].partition("=")[0] in shown
    assert shown.endswith("--eos_token '<end>' --max_new_tokens 9")


def test_paths_of_this_machine_are_not_shown(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["grpo.py", "--config", str(tmp_path), "--prompt_template", "/think {question}"])
    assert command_line(1) == f"python grpo.py --config {tmp_path.name} --prompt_template '/think {{question}}'"


def test_settings_are_published_without_secrets_however_deep_they_are(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-stored-one")
    settings = {
        "env": {"GH_PAT": "ghp_9", "MY_TOKEN": "tok-abc", "OPENAI_KEY": "sk-1", "X": "the-stored-one", "Y": "1"},
        "model_init_kwargs": {"token": "plain-token", "deeper": [{"password": "p"}, f"see hf_{'a' * 34}"]},
        "eos_token": "<end>",
        "max_steps": 3,
    }
    assert published(settings) == {
        "env": {"X": "HIDDEN", "Y": "1"},
        "model_init_kwargs": {"deeper": [{}, "see HIDDEN"]},
        "eos_token": "<end>",
        "max_steps": 3,
    }


def test_which_names_are_secrets() -> None:
    names = ("hub_token", "token", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "password", "GH_PAT")
    assert all(map(is_secret, names))
    names = ("eos_token", "pad_token", "max_new_tokens", "tokenizer", "trainable_token_indices", "keyboard", "pattern")
    assert not any(map(is_secret, names))


def test_a_password_in_a_url_is_hidden_and_the_url_is_not() -> None:
    shown = published("http://me:secret@inside:8000/v1,https://other:8001")
    assert shown == "http://HIDDEN@inside:8000/v1,https://other:8001"
