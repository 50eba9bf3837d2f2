"""The recipes push what they trained; somebody else downloads it by its id and gets the same answers."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import loopback
from hub.machine import environment
from safetensors.torch import load
from support import warm_python


ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "trl_recipes" / "embedded"
FEW = (
    *("--max_steps", "2", "--per_device_train_batch_size", "16", "--overwrite_output_dir", "true"),
    *("--max_eval_problems", "16", "--score_batch_size", "16"),
)
TO_HUB = ("--push_to_hub", "true", "--hub_model_id", "user/trained")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml"}


@pytest.fixture(scope="module")
def running() -> Iterator[loopback.Hub]:
    with loopback.running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running) -> loopback.Hub:
    """A Hub that has the base model."""
    base = {path.name: path.read_bytes() for path in (EMBEDDED / "model").iterdir() if path.is_file()}
    running.repositories, running.faults = {"user/base": base}, {}
    running.tokens, running.requests[:] = {"hf_secret"}, []
    return running


def run(hub, home: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [*warm_python(), *command],
        cwd=ROOT,
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(hub, home: Path, recipe: str, output_dir: Path, *options: str, **more: str) -> subprocess.CompletedProcess:
    config = ("--config", f"trl_recipes/configs/embedded_{recipe}.yaml", "--output_dir", str(output_dir))
    return run(hub, home, f"trl_recipes/{recipe}.py", *config, *FEW, *options, **more)


@pytest.mark.recipe
@pytest.mark.parametrize("recipe", ["grpo", "sft"])
def test_trained_and_pushed_here_and_the_same_answers_elsewhere_by_its_id(hub, tmp_path, recipe: str) -> None:
    from_hub = ("--model_name_or_path", "user/base", *TO_HUB, "--hub_private_repo", "true", "--hub_token", "hf_secret")
    done = train(hub, tmp_path / "trainer", recipe, tmp_path / "out", *from_hub, HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    files = hub.repositories["user/trained"]
    assert load(files["adapter_model.safetensors"])[
        "base_model.tinylora_v"
    ].all()  # or anything answers as the base does
    curve = {"grpo": "reward", "sft": "loss"}[recipe]
    assert files.keys() == ADAPTER | {f"{curve}_curve.csv", f"{curve}_curve.png"}
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert hub.private == {"user/trained"} and result["pushed"].endswith(hub.commit_of("user/trained"))
    readme = files["README.md"].decode()
    assert str(tmp_path) not in readme + files["recipe.yaml"].decode()
    assert "score.py --adapter user/trained" in readme
    assert "base_model: user/base" in readme and '"user/trained"' in readme
    assert f"trl_recipes/{recipe}.py --config" in files["recipe.yaml"].decode().splitlines()[0]
    for text in (done.stdout, done.stderr, *(content.decode("latin1") for content in files.values())):
        assert "hf_secret" not in text

    again = run(
        hub,
        tmp_path / "user",
        *("trl_recipes/score.py", "--adapter", "user/trained", "--dataset", str(EMBEDDED / "data" / "held_out.jsonl")),
        *("--max_problems", "16", "--batch_size", "16", "--max_completion_length", "40"),
        *("--use_cpu", "true", "--dtype", "float32"),
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["greedy_answers_sha256"] == result["greedy_answers_sha256"]


@pytest.mark.recipe
def test_a_push_that_fails_leaves_the_result_whole_and_the_command_that_it_names_pushes_it(hub, tmp_path) -> None:
    hub.faults = {"/commit/": [403]}
    local = (
        "--model_name_or_path",
        str(EMBEDDED / "model"),
        "--hub_base_model",
        "user/base",
        *TO_HUB,
        "--hub_revision",
        "first/try",
    )
    done = train(hub, tmp_path / "trainer", "sft", tmp_path / "out", *local)
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["pushed"] is None
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: user/trained: the token may not do this (403)")
    assert (tmp_path / "out").joinpath("README.md").exists() and not hub.repositories["user/trained"]

    command = shlex.split(error.partition("to push it again: peft-tinylora ")[2])
    pushed = run(hub, tmp_path / "trainer", "-m", "peft_tinylora.cli", *command)
    assert pushed.returncode == 0, pushed.stderr
    assert not hub.repositories["user/trained"]
    files = hub.files("user/trained", "first/try")
    assert files.keys() == ADAPTER | {"loss_curve.csv", "loss_curve.png"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    for text in (files["README.md"].decode(), files["recipe.yaml"].decode()):
        assert str(EMBEDDED) not in text and str(tmp_path) not in text


WRONG = {
    "a token that the Hub does not know": (
        ("--model_name_or_path", "user/base", "--hub_token", "hf_wrong"),
        "the Hub does not know the token (401)",
    ),
    "a base that nobody else has": ((), "hub_base_model"),
    "a repository that is a model's": (
        ("--hub_base_model", "user/base", "--hub_model_id", "user/base"),
        "holds a model",
    ),
    "checkpoints too": (("--hub_base_model", "user/base", "--hub_strategy", "all_checkpoints"), "hub_strategy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_fail_at_the_end_is_said_before_training(hub, tmp_path, name: str) -> None:
    options, said = WRONG[name]
    done = train(hub, tmp_path / "trainer", "sft", tmp_path / "out", *TO_HUB, *options)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error and "hf_wrong" not in done.stderr + done.stdout
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "user/trained" not in hub.repositories
