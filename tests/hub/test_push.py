"""Adapters pushed to a Hub, by the real client over a loopback server, faults included."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from hub.machine import (
    ADAPTER,
    EMBEDDED,
    REPORT,
    RESULTS,
    contents,
    copy_of,
    pushed,
    refused,
)
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from peft_tinylora.card import Facts, write_card
from peft_tinylora.describe import describe


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


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "adapter_config.json", ".eval_results"])
def test_a_link_out_of_the_folder_is_not_followed(hub, trainer, adapter, tmp_path, name: str) -> None:
    sent = len(hub.requests)
    cloned, elsewhere = copy_of(adapter, tmp_path), tmp_path / "elsewhere"
    (cloned / ".eval_results").mkdir()
    (cloned / ".eval_results/peft_tinylora_greedy.yaml").write_text("private: 1\n")
    (cloned / name).rename(elsewhere)
    (cloned / name).symlink_to(elsewhere)
    refused(trainer.command("push", cloned, "user/x"), name, f"is a link to {elsewhere}", "Nothing was pushed")
    assert hub.requests[sent:] == []


def test_a_snapshot_in_the_cache_whose_files_are_links_is_pushed(hub, trainer, adapter, tmp_path) -> None:
    pushed(hub, trainer, adapter)
    first = dict(hub.repositories["user/x"])
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('user/x'))"
    snapshot = Path(trainer.script(code).split()[-1])
    assert (snapshot / "README.md").is_symlink()
    done = trainer.command("push", snapshot, "user/again")
    assert done.status == 0, done.stderr
    assert hub.repositories["user/again"].keys() == first.keys()


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
    [entry] = yaml.safe_load(files[".eval_results/peft_tinylora_openai--gsm8k--main--test.yaml"])
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "main"} and entry["value"] == 91.23
