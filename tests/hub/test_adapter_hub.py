"""Adapters pushed to a Hub and loaded from it by others, by the real client over a loopback server, faults included."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub import loopback
from hub.machine import Done, Machine, environment
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save
from support import fill_vectors
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import Evaluation, Facts, Training, write_card
from peft_tinylora.describe import describe


ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "trl_recipes" / "embedded" / "model"
PROMPT = "Problem: Ben has 28 euros saved. He spends 7. How many euros are left?\nSolution:"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
REPORT = {"README.md", "recipe.yaml", "reward_curve.csv", "reward_curve.png"}
RESULTS = {".eval_results/peft_tinylora_gsm8k.yaml"}
CONFIG = TinyLoraConfig(
    u=1, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM", basis_repo="user/basis"
)
ANSWER = f"""
import torch
from transformers import AutoTokenizer
def answer(model):
    tokenizer = AutoTokenizer.from_pretrained("user/base")
    ids = tokenizer({PROMPT!r}, return_tensors="pt")["input_ids"]
    print(tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0], skip_special_tokens=True))
    print(model(ids).logits.double().abs().sum().item())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the adapter and the machines are."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter of the embedded model as a recipe leaves it, with a Hub dataset, and with what is not to be pushed."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    model = get_peft_model(base, CONFIG)
    fill_vectors(model, scale=0.3)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    path = folder / "trained"
    model.save_pretrained(path)
    training = Training("GRPO", ["openai/gsm8k"], "reward", {"seed": 7}, "python grpo.py", has_config_file=True)
    evaluation = Evaluation(
        dataset="openai/gsm8k",
        config="main",
        split="test",
        problems=1319,
        before={"greedy": 0.4, "sampled": 0.3},
        after={"greedy": 0.91234, "sampled": 0.6},
        score_options="--dataset openai/gsm8k",
    )
    write_card(path, describe(path), str(path), Facts(training, evaluation, PROMPT, 40))
    (path / "recipe.yaml").write_text("learning_rate: 0.03\n")
    (path / "reward_curve.csv").write_text("step,reward\n1,0.5\n")
    (path / "reward_curve.png").write_bytes(b"\x89PNG")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)  # as every Trainer does
    for name in ("training_args.bin", "checkpoint-1/optimizer.pt", ".env", "completions/a.parquet", "notes/README.md"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"private")
    return path


@pytest.fixture(scope="module")
def running(folder) -> Iterator[loopback.Hub]:
    with loopback.running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running) -> loopback.Hub:
    """A Hub that has the base model and nothing else."""
    base = {path.name: path.read_bytes() for path in EMBEDDED.iterdir() if path.is_file()}
    running.repositories = {"user/base": base}
    running.faults, running.private, running.tokens, running.forbidden_namespaces = {}, set(), set(), set()
    running.lfs_names = {"*.safetensors"}
    running.lfs_objects.clear()
    return running


@pytest.fixture(scope="module")
def trainer(running, folder) -> Iterator[Machine]:
    """The machine that the adapter was trained on."""
    yield from machine(running, folder / "trainer")


@pytest.fixture(scope="module")
def user(running, folder) -> Iterator[Machine]:
    """The machine of somebody else."""
    yield from machine(running, folder / "user")


def machine(running, home: Path) -> Iterator[Machine]:
    machine = Machine(running, home)
    yield machine
    machine.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copy"))


def pushed(hub, trainer: Machine, adapter: Path, *options: str) -> None:
    done = trainer.command("push", adapter, "user/x", *options)
    assert done.status == 0, done.stderr


def refused(done: Done, *parts: str) -> None:
    """A command that failed with one line that says all these, without the token."""
    assert done.status == 1, done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_push_is_one_commit_of_the_named_files_and_changes_nothing_here(hub, trainer, adapter) -> None:
    before, commits = contents(adapter), len(hub._commits.get("user/x", {}))
    pushed = trainer.command("push", adapter, "user/x")
    assert pushed.status == 0, pushed.stderr
    files = hub.repositories["user/x"]
    assert files.keys() == ADAPTER | REPORT | RESULTS
    assert sum("POST /api/models/user/x/commit/" in request for request in hub.requests) == 1
    assert contents(adapter) == before
    assert files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert json.loads(files["adapter_config.json"]) == json.loads(before["adapter_config.json"])
    assert commits == 0 and hub.commit_of("user/x") in pushed.stdout
    for content in files.values():
        assert b"hf_secret" not in content and str(adapter).encode() not in content
    assert "hf_secret" not in pushed.stdout + pushed.stderr


def test_a_push_of_what_is_there_makes_no_commit_and_sends_no_file(hub, trainer, adapter) -> None:
    first = trainer.command("push", adapter, "user/x")
    commit, sent = hub.commit_of("user/x"), len(hub.requests)
    again = trainer.command("push", adapter, "user/x")
    assert again.status == first.status == 0
    assert hub.commit_of("user/x") == commit
    later = hub.requests[sent:]
    assert not any("/commit/" in request or request.startswith("PUT") for request in later)


def test_files_of_an_earlier_push_that_are_gone_are_removed_and_what_others_added_stays(
    hub, trainer, adapter, tmp_path
) -> None:
    hub.repositories["user/x"] = {
        **dict.fromkeys(
            ("tokenizer.json", "loss_curve.png", ".eval_results/peft_tinylora_aime.yaml"), b"of an earlier push"
        ),
        **dict.fromkeys(("figure.pdf", ".eval_results/mmlu.yaml"), b"of somebody"),
    }
    smaller = copy_of(adapter, tmp_path)
    write_card(smaller, describe(smaller), "here", Facts())
    assert trainer.command("push", smaller, "user/x").status == 0
    assert hub.repositories["user/x"].keys() == ADAPTER | REPORT | {"figure.pdf", ".eval_results/mmlu.yaml"}


def test_a_tokenizer_is_pushed_where_it_is_not_that_of_the_base(hub, trainer, adapter, tmp_path) -> None:
    changed = copy_of(adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(changed)
    assert trainer.command("push", changed, "user/x").status == 0
    files = hub.repositories["user/x"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files.keys()


FAULTS = {
    "500 on making the repository": {"/api/repos/create": [500]},
    "503 before the upload": {"/preupload/": [503, 503]},
    "502 where the file goes": {"PUT /": [502]},
    "the connection lost in the middle of the upload": {"PUT /": ["drop"]},
    "500 on the commit": {"/commit/": [500, 504]},
    "the answer to the commit lost": {"/commit/": ["drop after"]},
    "the connection lost on the commit": {"/commit/": ["drop"]},
    "500 on listing": {"GET /api/models/user/x": [500]},
    "500 on reading back": {"/paths-info/": [500]},
    "somebody's commit in between": {"/commit/": [412]},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way_is_tried_again_and_the_push_is_whole(hub, trainer, adapter, name: str) -> None:
    hub.faults = {path: list(faults) for path, faults in FAULTS[name].items()}
    pushed = trainer.command("push", adapter, "user/x")
    assert pushed.status == 0, pushed.stderr
    assert not any(hub.faults.values())
    assert hub.repositories["user/x"].keys() == ADAPTER | REPORT | RESULTS
    assert hub.commit_of("user/x") in pushed.stdout


def test_the_hub_is_asked_again_when_it_said_so(hub, trainer, adapter) -> None:
    hub.faults = {"/commit/": [(429, {"Retry-After": "77"})]}
    pushed = trainer.command("push", adapter, "user/x")
    assert pushed.status == 0 and 77 in pushed.waits
    assert "the Hub answered 429: again in 77 s" in pushed.stderr


def test_a_push_that_fails_leaves_both_sides_as_they_were_and_says_how_to_push_again(hub, trainer, adapter) -> None:
    before = contents(adapter)
    hub.faults = {"/commit/": [500] * 9}
    refused(
        trainer.command("push", adapter, "user/x", "--revision", "v2"),
        "the Hub answered 500",
        f"to push it again: peft-tinylora push {shlex.quote(str(adapter))} user/x --revision v2",
    )
    assert contents(adapter) == before
    assert not hub.repositories["user/x"] and not hub.files("user/x", "v2")
    hub.faults = {}
    sent = len(hub.requests)
    assert trainer.command("push", adapter, "user/x", "--revision", "v2").status == 0
    assert not any(request.startswith("PUT") for request in hub.requests[sent:])  # the weights are there already
    assert hub.files("user/x", "v2").keys() == ADAPTER | REPORT | RESULTS and not hub.repositories["user/x"]


def test_what_the_hub_refuses_is_said_in_one_line(hub, trainer, adapter) -> None:
    hub.tokens = {"hf_another"}
    refused(trainer.command("push", adapter, "user/x"), "does not know the token (401)", "hf auth login")
    hub.tokens = {"hf_secret"}
    hub.forbidden_namespaces = {"company"}
    refused(trainer.command("push", adapter, "company/x"), "company/x", "may not do this (403)")
    refused(trainer.command("push", adapter, "no/such/id"), "like 'user/name'")
    hub.repositories["user/model"] = {"config.json": b"{}", "model.safetensors": b"0"}
    refused(trainer.command("push", adapter, "user/model"), "user/model holds a model", "another name")
    hub.repositories["user/open"] = {}
    refused(trainer.command("push", adapter, "user/open", "--private"), "user/open is public already")
    assert not hub.repositories["user/open"]
    assert hub.repositories["user/model"] == {"config.json": b"{}", "model.safetensors": b"0"}
    assert not hub.repositories.get("user/x")


def test_two_machines_that_push_at_once_both_push_a_whole_adapter(hub, trainer, user, adapter, tmp_path) -> None:
    other = copy_of(adapter, tmp_path)
    write_card(other, describe(other), "here", Facts())
    (other / "recipe.yaml").write_text("learning_rate: 0.1\n")
    for _ in range(3):
        trainer.start(["push", str(adapter), "user/x"])
        user.start(["push", str(other), "user/x"])
        assert trainer.finish().status == user.finish().status == 0
        files = hub.repositories["user/x"]
        mine = files["recipe.yaml"] == (adapter / "recipe.yaml").read_bytes()
        assert files.keys() == (ADAPTER | REPORT | RESULTS if mine else ADAPTER | REPORT)


@pytest.fixture(scope="module")
def other(folder) -> Path:
    """An adapter with the same config and other numbers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED), CONFIG)
    fill_vectors(model, scale=0.3, seed=1)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(folder / "other")
    return folder / "other"


def test_what_must_not_be_published_is_refused_before_anything_is_sent(hub, trainer, adapter, other, tmp_path) -> None:
    sent = len(hub.requests)
    leaking = copy_of(adapter, tmp_path)
    (leaking / "recipe.yaml").write_text("env:\n  X: hf_secret\n")
    refused(trainer.command("push", leaking, "user/x"), "recipe.yaml holds a token")
    (leaking / "recipe.yaml").write_text(f"hub_token: hf_{'a' * 34}\n")
    refused(trainer.command("push", leaking, "user/x"), "recipe.yaml holds a token")
    (leaking / "recipe.yaml").unlink()

    config = json.loads((adapter / "adapter_config.json").read_text())
    bases = {
        str(EMBEDDED): "names a folder of this machine",
        "models/qwen": "names models/qwen as its base model, which is not on the Hub",
        "C:\\models\\qwen": "which is not on the Hub",
        None: "does not name its base model",
    }
    for base, said in bases.items():
        (leaking / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        refused(trainer.command("push", leaking, "user/x"), said, "--base user/name")
    (leaking / "adapter_config.json").write_text(json.dumps(config))

    weights = (leaking / "adapter_model.safetensors").read_bytes()
    for data, said in ((weights[:-1], "cut short"), (weights[:-1] + b"\x00", "not those that adapter_config.json")):
        (leaking / "adapter_model.safetensors").write_bytes(data)
        refused(trainer.command("push", leaking, "user/x"), said)
    (leaking / "adapter_model.safetensors").write_bytes(weights)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # of another run, whose card was not written
        shutil.copy(other / name, leaking / name)
    refused(trainer.command("push", leaking, "user/x"), "README.md is of other numbers")
    (leaking / "README.md").write_text("---\ntags: [\n---\n")
    refused(trainer.command("push", leaking, "user/x"), "README.md cannot be read", "mend or remove it")
    refused(trainer.command("push", tmp_path, "user/x"), "has no adapter_config.json")
    assert all(request.startswith(("GET", "HEAD")) for request in hub.requests[sent:])


def test_an_adapter_of_a_local_base_is_pushed_with_the_id_that_is_named(hub, trainer, adapter, tmp_path) -> None:
    local = copy_of(adapter, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (local / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(EMBEDDED)}))
    write_card(local, describe(local), str(local), Facts())
    pushed(hub, trainer, local, "--base", "user/base")
    files = hub.repositories["user/x"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "user/base" and "base_model:adapter:user/base" in card.data.tags
    assert "on top of `user/base`" in card.text
    for text in (str(EMBEDDED), "trl_recipes/embedded", str(local)):
        assert text not in card.content


@pytest.mark.parametrize(
    "readme",
    [None, "# Mine\n[More Information Needed]\n", "# Model Card for Model ID\n" + "[More Information Needed]\n" * 30],
)
def test_a_card_is_made_where_there_is_none_and_somebodys_own_is_kept(
    hub, trainer, adapter, tmp_path, readme: str | None
) -> None:
    copy = copy_of(adapter, tmp_path)
    (copy / "README.md").unlink()
    if readme is not None:
        (copy / "README.md").write_text(readme)
    assert trainer.command("push", copy, "user/x").status == 0
    text = hub.repositories["user/x"]["README.md"].decode()
    assert (text == readme) if readme and "Mine" in readme else "13 trained numbers on top of `user/base`" in text
    assert contents(copy).get("README.md") == (None if readme is None else readme.encode())


def test_the_card_of_the_hub_is_read_by_its_own_parsers(hub, trainer, adapter) -> None:
    assert trainer.command("push", adapter, "user/x").status == 0
    files = hub.repositories["user/x"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    assert [(r.dataset_type, r.dataset_config, r.metric_value) for r in card.data.eval_results] == [
        ("openai/gsm8k", "main", 0.9123),
        ("openai/gsm8k", "main", 0.6),
    ]
    [entry] = yaml.safe_load(files[".eval_results/peft_tinylora_gsm8k.yaml"])
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "main"} and entry["value"] == 91.23


def test_the_tokenizer_of_an_adapter_goes_with_its_exports(hub, trainer, user, adapter, tmp_path, folder) -> None:
    changed = copy_of(adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(changed)
    pushed(hub, trainer, changed)
    for to in ("merged", "lora", "compact"):
        done = user.command("export", "user/x", f"with_tokenizer_{to}", "--to", to)
        assert done.status == 0, done.stderr
        exported = AutoTokenizer.from_pretrained(folder / "user" / f"with_tokenizer_{to}")
        assert exported.chat_template == "{{ messages }}"


def test_an_export_is_of_the_revision_of_the_base_that_the_adapter_was_trained_on(
    hub, trainer, user, adapter, tmp_path, folder
) -> None:
    hub.create_branch("user/base", "v2")
    moved = load(hub.repositories["user/base"]["model.safetensors"])
    hub.repositories["user/base"]["model.safetensors"] = save(
        {name: 2 * t for name, t in moved.items()}, {"format": "pt"}
    )
    old = copy_of(adapter, tmp_path)
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}))
    pushed(hub, trainer, old)
    done = user.command("export", "user/x", "of_v2", "--to", "merged")
    assert done.status == 0, done.stderr
    merged = load_file(folder / "user" / "of_v2" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(merged, moved["model.embed_tokens.weight"])
    code = re.search(r"```python\n(.*?)```", hub.repositories["user/x"]["README.md"].decode(), re.DOTALL).group(1)
    assert "Solution:" in user.script(code)


LOADERS = {
    "PeftModel": """
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), "user/x")""",
    "AutoPeftModelForCausalLM": """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("user/x")""",
    "AutoModelForCausalLM": """
model = AutoModelForCausalLM.from_pretrained("user/x")""",
    "load_adapter": """
model = AutoModelForCausalLM.from_pretrained("user/base")
model.load_adapter("user/x")""",
}


def by_id(user: Machine, loader: str) -> list[str]:
    """Answer and sum of logits of the adapter `user/x`, loaded in some way on a machine."""
    printed = user.script(f"{ANSWER}\nfrom transformers import AutoModelForCausalLM{LOADERS[loader]}\nanswer(model)")
    *text, logits = printed.strip().splitlines()
    return ["\n".join(text), logits]


@pytest.fixture(scope="module")
def here(adapter) -> tuple[str, float]:
    """What the adapter answers where it was trained, and the sum of its logits."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def answer(model: torch.nn.Module) -> tuple[str, float]:
        text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0], skip_special_tokens=True)
        return text.strip(), model(ids).logits.double().abs().sum().item()

    without = answer(base)
    found = answer(PeftModel.from_pretrained(base, adapter))
    assert found[0] != without[0]
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_whoever_loads_it_by_its_id_gets_the_same_answers(hub, trainer, user, adapter, here, loader: str) -> None:
    pushed(hub, trainer, adapter)
    text, logits = by_id(user, loader)
    assert text == here[0]
    assert float(logits) == pytest.approx(here[1], rel=1e-5)


def test_the_basis_comes_from_its_repository_then_from_the_cache_or_is_computed(hub, trainer, adapter, folder) -> None:
    pushed(hub, trainer, adapter)
    assert trainer.command("basis", "push", "user/base", "user/basis").status == 0
    count = (
        "from peft_tinylora import build\nfrom transformers import AutoModelForCausalLM\noriginal, done = build.compute_basis, []\n"
        f"build.compute_basis = lambda *a: done.append(1) or original(*a){LOADERS['AutoPeftModelForCausalLM']}\n"
        "build.compute_basis = original\nprint(len(done))"
    )
    fresh = Machine(hub, folder / "fresh")
    assert fresh.script(count) == "0\n"  # from the repository
    del hub.repositories["user/basis"]
    shutil.rmtree(folder / "fresh" / "hub")
    assert fresh.script(count) == "0\n"  # from the cache
    shutil.rmtree(folder / "fresh" / "basis")
    assert fresh.script(count) == "49\n"
    fresh.close()


def test_a_revision_is_a_branch_or_a_commit_and_one_that_is_not_there_is_named(
    hub, trainer, user, adapter, tmp_path
) -> None:
    pushed(hub, trainer, adapter)
    first = hub.commit_of("user/x")
    other = copy_of(adapter, tmp_path)
    tensors = load_file(other / "adapter_model.safetensors")
    assert trainer.command("push", other, "user/x", "--revision", "more/steps").status == 0
    readme = hub.files("user/x", "more/steps")["README.md"].decode()
    assert 'revision="more/steps"' in readme and "--revision more/steps" in readme
    assert "revision" not in hub.repositories["user/x"]["README.md"].decode()
    hub.repositories["user/x"].clear()
    for revision in (first, "more/steps"):
        seen = user.command("inspect", "user/x", "--revision", revision)
        assert seen.status == 0 and f"{next(iter(tensors.values()))[0].item():+.6f}" in seen.stdout
        loaded = user.script(
            f"{ANSWER}\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
            f"base = AutoModelForCausalLM.from_pretrained('user/base')\n"
            f"answer(PeftModel.from_pretrained(base, 'user/x', revision={revision!r}))"
        )
        assert "Solution:" in loaded
    refused(user.command("inspect", "user/x", "--revision", "v9"), "user/x: it has no revision 'v9'")
    refused(user.command("inspect", "user/x"), "user/x has no adapter_config.json")
    refused(user.command("inspect", "user/nobody"), "user/nobody", "no such repository")


def test_an_adapter_in_a_subfolder(hub, user, adapter, here) -> None:
    hub.repositories["user/x"] = {f"steps/100/{name}": (adapter / name).read_bytes() for name in ADAPTER}
    text = user.script(
        f"{ANSWER}\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained('user/base')\n"
        "answer(PeftModel.from_pretrained(base, 'user/x', subfolder='steps/100'))"
    )
    assert text.strip().startswith(here[0])
    assert user.command("inspect", "user/x", "--subfolder", "steps/100").status == 0


def test_a_private_repository_opens_to_its_token_alone_and_the_token_stays_out_of_sight(
    hub, trainer, user, adapter, folder
) -> None:
    hub.tokens = {"hf_secret"}
    pushed(hub, trainer, adapter, "--private")
    assert hub.private == {"user/x"}
    assert user.command("inspect", "user/x").status == 0
    stranger = Machine(hub, folder / "stranger", HF_TOKEN="")
    refused(stranger.command("inspect", "user/x"), "no such repository on the Hub, or a private one", "hf auth login")
    refused(stranger.command("pull", "user/x", "here"), "no such repository on the Hub, or a private one")
    assert not (folder / "stranger" / "here").exists()
    stranger.close()


def test_offline_it_comes_from_the_hubs_own_cache(hub, trainer, user, adapter, folder, here) -> None:
    pushed(hub, trainer, adapter)
    assert by_id(user, "PeftModel")[0] == here[0]
    offline = Machine(hub, folder / "user", HF_HUB_OFFLINE="1")
    assert by_id(offline, "PeftModel")[0] == here[0]
    assert offline.command("inspect", "user/x").status == 0
    refused(offline.command("inspect", "user/never"), "the Hub cannot be reached", "go online once")
    refused(offline.command("push", adapter, "user/x"), "to push it again")
    offline.close()


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_file_that_is_cut_short_is_fetched_again_or_refused_and_nothing_is_left(
    hub, trainer, adapter, folder, fault: str
) -> None:
    pushed(hub, trainer, adapter)
    fresh = Machine(hub, folder / f"fresh_{fault}")
    hub.faults = {"/user/x/resolve/": [fault] * 30}
    refused(fresh.command("pull", "user/x", "here"), "user/x")
    assert not list((folder / f"fresh_{fault}").glob("*here*"))
    fresh.start(f"from transformers import AutoModelForCausalLM{LOADERS['PeftModel']}")
    assert fresh.finish().status == 1
    hub.faults = {"/user/x/resolve/": [fault]}
    done = fresh.command("pull", "user/x", "here")
    if fault == "cut":
        assert done.status == 0, done.stderr
    else:
        refused(done, "user/x")
    hub.faults = {}
    assert fresh.command("pull", "user/x", "there").status == 0
    fresh.close()


def test_pulling_gives_the_files_that_were_pushed_and_no_others(hub, trainer, user, adapter, folder) -> None:
    pushed(hub, trainer, adapter)
    hub.repositories["user/x"] |= {
        "evil.py": b"import os",
        "../up.yaml": b"",
        "adapter_model.bin": b"",
        "a/b/README.md": b"",
    }
    pulled = user.command("pull", "user/x", "pulled")
    assert pulled.status == 0, pulled.stderr
    found = contents(folder / "user" / "pulled")
    assert found == {name: hub.repositories["user/x"][name] for name in ADAPTER | REPORT | RESULTS}
    assert "13 numbers in float32" in pulled.stdout and "49: down_proj" in pulled.stdout
    refused(user.command("pull", "user/x", "pulled"), "already", "another folder")
    again = user.command("push", "pulled", "user/y")
    assert again.status == 0 and hub.repositories["user/y"] == found


def test_pulling_into_a_project_adds_the_files_or_changes_nothing(hub, trainer, user, adapter, folder) -> None:
    pushed(hub, trainer, adapter)
    project = folder / "user" / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    refused(user.command("pull", "user/x", "project"), "has a file README.md already")
    assert contents(project) == {"README.md": b"mine"}
    (project / "README.md").rename(project / "NOTES.md")
    (project / "deep").mkdir()
    user.script(f"import os\nos.chdir({str(project)!r})")
    done = user.command("pull", "user/x", ".")
    user.script(f"import os\nos.chdir({str(folder / 'user')!r})")
    assert done.status == 0 and contents(project).keys() == ADAPTER | REPORT | RESULTS | {"NOTES.md"}
    assert not [path for path in (folder / "user").iterdir() if path.name.startswith(".project")]


def test_a_folder_of_the_same_name_is_not_taken_for_the_repository(hub, trainer, user, adapter, folder) -> None:
    pushed(hub, trainer, adapter)
    hub.repositories["user/x"]["adapter_model.safetensors"] = b"garbage"
    shutil.copytree(adapter, folder / "user" / "user" / "x")
    try:
        refused(user.command("pull", "user/x", "unsound"), "user/x/adapter_model.safetensors is cut short")
    finally:
        shutil.rmtree(folder / "user" / "user")
    assert not (folder / "user" / "unsound").exists()


def test_the_push_of_peft_and_of_transformers_can_be_loaded_too(hub, trainer, user, adapter, here) -> None:
    trainer.script(
        "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained('user/base')\n"
        f"PeftModel.from_pretrained(base, {str(adapter)!r}).push_to_hub('user/x')"
    )
    assert by_id(user, "PeftModel")[0] == here[0]
    del hub.repositories["user/x"]
    trainer.script(
        "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained('user/base')\n"
        f"model.load_adapter({str(adapter)!r})\nmodel.push_to_hub('user/x')"
    )
    assert by_id(user, "AutoModelForCausalLM")[0] == here[0]


def test_every_code_block_of_the_card_runs_and_answers_the_same_with_and_without_this_package(
    hub, trainer, user, adapter, here, folder
) -> None:
    pushed(hub, trainer, adapter)
    text = hub.repositories["user/x"]["README.md"].decode()
    with_package, without = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert user.script(with_package).strip() == here[0]
    [export] = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "export" in block]
    done = user.command(*export.split()[1:])
    assert done.status == 0, done.stderr
    plain = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{without}\nimport sys\nassert 'peft_tinylora' not in sys.modules"],
        capture_output=True,
        text=True,
        env=environment(hub, folder / "user"),
        cwd=folder / "user",
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == here[0]
