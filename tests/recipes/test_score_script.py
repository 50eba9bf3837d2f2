"""score.py as a script: what it prints and leaves behind, its controls, the card, and a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from recipes.adapters import BATCH, LENGTH, OPTIONS
from recipes.fake_vllm import FakeServer
from recipes.runs import ROOT, in_fork
from transformers import AutoModelForCausalLM

from peft_tinylora.card import FACTS_FILE, read_facts
from peft_tinylora.describe import describe
from peft_tinylora.inline import parse_inline
from trl_recipes.answer_log import FILE
from trl_recipes.arguments import RecipeError
from trl_recipes.score import main, score


@pytest.fixture
def file_of_sums(tmp_path: Path, sums: list[dict]) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


def run_script(capsys, monkeypatch, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["score.py", *OPTIONS, *options])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_full_fine_tune_is_compared_with_the_base_that_is_named(
    model, tokenizer, adapter, tiny_model_dir, file_of_sums, tmp_path, capsys, monkeypatch
) -> None:
    """Merged, the adapter differs from its base as it does unmerged, but for rounding."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    options = ("--dataset", str(file_of_sums), "--max_problems", "40")
    of_adapter = run_script(
        capsys, monkeypatch, *options, "--adapter", str(adapter), "--model_name_or_path", str(tiny_model_dir)
    )
    named = ("--model_name_or_path", str(tmp_path / "merged"), "--base_model", str(tiny_model_dir))
    result = run_script(capsys, monkeypatch, *options, *named, "--output_dir", str(tmp_path / "out"))
    assert list(result["variants"]) == ["model", "base"] and result["changed_by_zero_adapter"] is None
    assert result["variants"]["base"] == of_adapter["variants"]["base"]
    assert result["variants"]["model"] == of_adapter["variants"]["adapter"]
    assert result["difference"] == of_adapter["difference"] and result["difference"]["greedy"]["strict"]["mean"]
    assert "| model - base | greedy |" in (tmp_path / "out" / "results.md").read_text()
    again = run_script(capsys, monkeypatch, *options, *named, "--output_dir", str(tmp_path / "out"))
    assert again == result


def test_a_killed_process_is_taken_up_by_the_next(
    adapter, model, tokenizer, tiny_model_dir, sums, tmp_path, capsys, monkeypatch
) -> None:
    """By SIGKILL in the middle of writing, with the options of a user."""
    data, out = tmp_path / "sums.jsonl", tmp_path / "out"
    many = [{**row, "prompt": f"{'so ' * (n % 3)}{row['prompt']}"} for n, row in enumerate(sums * 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in many))
    command = [
        *(sys.executable, "trl_recipes/score.py", "--adapter", str(adapter), "--dataset", str(data)),
        *("--model_name_or_path", str(tiny_model_dir), "--output_dir", str(out), "--samples", "2", *OPTIONS),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not ((out / FILE).exists() and (out / FILE).read_bytes().count(b"\n") > 100):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    torn = (out / FILE).read_bytes()
    assert not (out / "results.json").exists()
    finished = in_fork(*command[1:])
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert (out / FILE).read_bytes().startswith(torn[: torn.rfind(b"\n") + 1])
    assert json.loads((out / "results.json").read_text()) == result
    assert "| adapter - base | greedy |" in (out / "results.md").read_text()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = score(model, tokenizer, many, batch_size=BATCH, max_completion_length=LENGTH)
    finally:
        torch.set_num_threads(threads)
    assert result["greedy_answers_sha256"] == expected.answers_sha256 and result["greedy"] == expected.fraction

    with pytest.raises(RecipeError, match="max_completion_length=6 there and 5 now"):
        run_script(capsys, monkeypatch, *command[2:], "--max_completion_length", "5")


def test_the_script_prints_what_it_always_did_and_the_controls(
    adapter, tiny_model_dir, file_of_sums, capsys, monkeypatch
) -> None:
    options = ("--adapter", str(adapter), "--model_name_or_path", str(tiny_model_dir), "--dataset", str(file_of_sums))
    result = run_script(capsys, monkeypatch, *options, "--sampled", "true")
    assert {"model", "adapter", "dataset", "problems", "greedy", "greedy_answers_sha256", "sampled"} < result.keys()
    assert {"max_completion_length", "batch_size", "dtype", "device", "threads"} < result.keys()
    assert list(result["variants"]) == ["adapter", "zero adapter", "base"]
    alone = run_script(capsys, monkeypatch, *options, "--controls", "false")
    assert alone["greedy_answers_sha256"] == result["greedy_answers_sha256"]
    assert list(alone["variants"]) == ["adapter"] and alone["difference"] is None
    base = run_script(capsys, monkeypatch, "--model_name_or_path", str(tiny_model_dir), "--dataset", str(file_of_sums))
    assert list(base["variants"]) == ["model"] and base["adapter"] is None
    assert base["variants"]["model"] == {"greedy": result["variants"]["base"]["greedy"]}


def test_results_go_into_the_card_and_stay_there(
    adapter, tiny_model_dir, file_of_sums, tmp_path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "README.md").unlink(missing_ok=True)
    options = ("--adapter", str(folder), "--model_name_or_path", str(tiny_model_dir), "--dataset", str(file_of_sums))
    for most in ("3", "6"):
        update = ("--update_card", "true", "--samples", "2", "--max_completion_length", most)
        result = run_script(capsys, monkeypatch, *options, *update)
    text = (folder / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    [entry] = metadata["model-index"][0]["results"]
    assert [metric["value"] for metric in entry["metrics"]] == [
        round(result["variants"]["adapter"][decoding]["strict"]["mean"], 4) for decoding in ("greedy", "samples")
    ]
    assert [metric["name"] for metric in entry["metrics"]] == [
        "accuracy, greedy",
        "accuracy, 2 samples, temperature 1, top-p 1",
    ]
    assert text.count("| adapter - base | greedy |") == 1
    assert "--samples 2" in text and "--max_completion_length 6" in text and "{{" not in text
    facts = read_facts(folder, describe(folder))
    assert [each.after["greedy"] for each in facts.more] == [result["greedy"]]

    # somebody's own card keeps its text, and another result
    (folder / FACTS_FILE).unlink()
    own = text.split("---\n")[0] + "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(own)
    for _ in range(2):
        run_script(capsys, monkeypatch, *options, "--update_card", "true")
    text = (folder / "README.md").read_text()
    assert text.endswith("# Mine\n")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "mit" and len(metadata["model-index"][0]["results"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--adapter", "some/id"), "is no folder here"),
        ((), "is no folder here"),
        (("--adapter", "{adapter}", "--controls", "false"), "with controls: false"),
        (("--adapter", "{adapter}", "--max_problems", "5"), "with max_problems=5"),
    ],
)
def test_what_a_card_cannot_take_is_refused_before_anything_runs(adapter, options, said, capsys, monkeypatch) -> None:
    options = [option.format(adapter=adapter) for option in options]
    with pytest.raises(RecipeError, match=said):
        run_script(capsys, monkeypatch, *options, "--update_card", "true", "--dataset", "missing.jsonl")


def test_servers_are_sent_the_adapter_zeros_and_the_bases_name(
    adapter, tiny_model_dir, file_of_sums, start, tmp_path, capsys, monkeypatch
) -> None:
    server: FakeServer = start()
    options = ("--adapter", str(adapter), "--model_name_or_path", str(tiny_model_dir), "--dataset", str(file_of_sums))
    out = tmp_path / "out"
    options += ("--samples", "1", "--seed", "5", "--output_dir", str(out), "--max_problems", "20")
    monkeypatch.setattr(sys, "argv", ["score.py", *options, "--vllm_server_base_url", server.url])
    monkeypatch.setattr("trl_recipes.variants.name_of", lambda text: text)  # the fake names an adapter by its text
    main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["variants"]) == ["adapter", "zero adapter", "base"]
    models = list(dict.fromkeys(body["model"] for body in server.bodies))
    assert len(models) == 3 and models[2] == "a/base" and all(text.startswith("tinylora:1.") for text in models[:2])
    assert len(server.bodies) == 120 and {body["temperature"] for body in server.bodies} == {0.0, 1.0}
    # they draw with their own seed, and so none is said to be that of the result
    assert result["samples"] == 1 and "seed" not in result
    assert "seed" not in json.loads((out / FILE).read_text().splitlines()[0])["settings"]
    ours, zero = (parse_inline(text, 10**6) for text in models[:2])
    assert ours.v.any() and not zero.v.any() and torch.equal(ours.sketches, zero.sketches)
