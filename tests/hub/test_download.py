"""Adapters loaded, pulled and exported from a Hub by somebody else, by their ids."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from hub.machine import (
    ADAPTER,
    EMBEDDED,
    PROMPT,
    REPORT,
    RESULTS,
    Machine,
    contents,
    copy_of,
    environment,
    pushed,
    refused,
)
from safetensors.torch import load, load_file, save
from support import TRANSFORMERS_REFUSES_PEFT, warm_python
from transformers import AutoTokenizer


ANSWER = f"""
import torch
from transformers import AutoTokenizer
def answer(model):
    tokenizer = AutoTokenizer.from_pretrained("user/base")
    ids = tokenizer({PROMPT!r}, return_tensors="pt")["input_ids"]
    print(tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0], skip_special_tokens=True))
    print(model(ids).logits.double().abs().sum().item())
"""


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
    assert "basis       in the repository user/basis, or computed" in fresh.command("inspect", "user/x").stdout
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


def test_a_portable_adapter_answers_the_same_in_stock_peft_by_its_id(
    hub, trainer, user, adapter, here, folder, tmp_path
) -> None:
    portable = tmp_path / "portable"
    assert trainer.command("export", adapter, portable, "--to", "portable").status == 0
    pushed(hub, trainer, portable)
    code = f"{ANSWER}\nimport sys\nfrom transformers import AutoModelForCausalLM{LOADERS['PeftModel']}\nanswer(model)"
    stock = subprocess.run(
        [*warm_python(), "-c", f"{code}\nassert 'peft_tinylora' not in sys.modules"],
        capture_output=True,
        text=True,
        env=environment(hub, folder / "user"),
    )
    assert stock.returncode == 0, stock.stderr
    assert stock.stdout.strip().startswith(here[0])


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
    hub, trainer, user, adapter, here, folder
) -> None:
    hub.tokens = {"hf_secret"}
    pushed(hub, trainer, adapter, "--private")
    assert hub.private == {"user/x"}
    assert user.command("inspect", "user/x").status == 0
    for loader in LOADERS:
        assert by_id(user, loader)[0] == here[0], loader
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


def test_the_push_of_peft_can_be_loaded_too(hub, trainer, user, adapter, here) -> None:
    trainer.script(
        "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained('user/base')\n"
        f"PeftModel.from_pretrained(base, {str(adapter)!r}).push_to_hub('user/x')"
    )
    assert by_id(user, "PeftModel")[0] == here[0]


@pytest.mark.skipif(TRANSFORMERS_REFUSES_PEFT, reason="transformers wants a newer PEFT for its own adapter methods")
def test_the_push_of_transformers_can_be_loaded_too(hub, trainer, user, adapter, here) -> None:
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
        [*warm_python(), "-c", f"{without}\nimport sys\nassert 'peft_tinylora' not in sys.modules"],
        capture_output=True,
        text=True,
        env=environment(hub, folder / "user"),
        cwd=folder / "user",
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == here[0]
