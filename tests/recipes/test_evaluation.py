"""score.py with its controls: what is compared with what, and that an interruption changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from recipes.fake_vllm import FakeServer
from recipes.runs import ROOT, in_new_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import FACTS_FILE, read_facts
from peft_tinylora.describe import describe
from trl_recipes.answer_log import FILE, Answer, AnswerLog
from trl_recipes.arguments import RecipeError
from trl_recipes.evaluation import Plan, evaluate, summarize
from trl_recipes.score import digest_of, main, score
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.variants import Sampling, Variant, check_base_model, variants_of_model


LENGTH, BATCH = 6, 16
OPTIONS = (
    "--max_completion_length",
    str(LENGTH),
    "--batch_size",
    str(BATCH),
    "--use_cpu",
    "true",
    "--dtype",
    "float32",
)


def add_adapter(model_dir: Path, config, folder: Path, size: float = 0.3) -> Path:
    """Saves an adapter whose numbers are drawn, and change many answers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tinylora_v" in name or "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory) -> Path:
    config = TinyLoraConfig(task_type="CAUSAL_LM", tie="tiled", n_tie=2, target_modules="all-linear")
    return add_adapter(tiny_model_dir, config, tmp_path_factory.mktemp("adapters") / "tinylora", 1.0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    return AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)


@pytest.fixture
def file_of_sums(tmp_path: Path, sums: list[dict]) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


def arguments(**options) -> ScoreArguments:
    return ScoreArguments(max_completion_length=LENGTH, batch_size=BATCH, **options)


def run_script(capsys, monkeypatch, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["score.py", *OPTIONS, *options])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_variants_are_the_adapter_its_zero_and_the_base(model, tokenizer, sums, tiny_model_dir) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    variants = variants_of_model(model, tokenizer, arguments())
    log = AnswerLog(None, {})
    evaluate(variants, sums, Plan(), log)
    greedy = {
        variant.name: [log.answers[variant.name, "greedy", n, 0].completion for n in range(len(sums))]
        for variant in variants
    }
    options = {"batch_size": BATCH, "max_completion_length": LENGTH}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert greedy["adapter"] == score(model, tokenizer, sums, **options).completions
    assert greedy["base"] == score(base, tokenizer, sums, **options).completions == greedy["zero adapter"]
    assert greedy["adapter"] != greedy["base"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    summary = summarize([variant.name for variant in variants], sums, Plan(), log)
    assert summary["changed_by_zero_adapter"] == 0
    strict = {name: summary["variants"][name]["greedy"]["strict"]["mean"] for name in greedy}
    assert strict["adapter"] == score(model, tokenizer, sums, **options).fraction
    gain = summary["difference"]["greedy"]["strict"]
    assert gain["mean"] == pytest.approx(strict["adapter"] - strict["base"])
    assert gain["gained"] - gain["lost"] == round(len(sums) * gain["mean"])


def test_strict_and_lenient_stand_side_by_side() -> None:
    """Of three answers one is marked, one is said, and one is wrong."""
    texts = {"a": "#### 5", "b": "The answer is 5.", "c": "The answer is 6."}
    variant = Variant("model", lambda prompts, sampling: [texts[prompt] for prompt in prompts], nullcontext, 2)
    log = AnswerLog(None, {})
    problems = [{"prompt": prompt, "answer": "5"} for prompt in texts]
    evaluate([variant], problems, Plan(), log)
    measured = summarize(["model"], problems, Plan(), log)["variants"]["model"]["greedy"]
    assert measured["strict"]["mean"] == pytest.approx(1 / 3) and measured["lenient"]["mean"] == pytest.approx(2 / 3)


def test_a_difference_that_the_path_makes_is_counted(model, tokenizer, sums) -> None:
    variants = variants_of_model(model, tokenizer, arguments())
    log = AnswerLog(None, {})
    by_name = {variant.name: variant for variant in variants}
    evaluate([by_name["adapter"], by_name["base"]], sums, Plan(), log)
    answers = list(log.answers.values())
    log.add(
        type(answer)(**(vars(answer) | {"variant": "zero adapter"}))
        for answer in answers
        if answer.variant == "adapter"
    )
    changed = summarize(["adapter", "zero adapter", "base"], sums, Plan(), log)["changed_by_zero_adapter"]
    ours, theirs = ([a.completion for a in answers if a.variant == name] for name in ("adapter", "base"))
    assert changed == sum(a != b for a, b in zip(ours, theirs, strict=True)) > 0


@pytest.mark.parametrize(("use_dora", "has_zero"), [(False, True), (True, False)])
def test_a_plain_lora_has_a_zero_and_dora_none(tiny_model_dir, tokenizer, sums, tmp_path, use_dora, has_zero) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", use_dora=use_dora)
    folder = add_adapter(tiny_model_dir, config, tmp_path / "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
    variants = variants_of_model(model, tokenizer, arguments())
    assert ("zero adapter" in [variant.name for variant in variants]) == has_zero
    log = AnswerLog(None, {})
    evaluate(variants, sums[:20], Plan(), log)
    summary = summarize([variant.name for variant in variants], sums[:20], Plan(), log)
    assert summary["changed_by_zero_adapter"] == (0 if has_zero else None)
    answers = {name: [log.answers[name, "greedy", n, 0].completion for n in range(20)] for name in ("adapter", "base")}
    assert answers["adapter"] != answers["base"]


def test_whole_saved_modules_are_the_bases_in_the_zero_adapter(tiny_model_dir, tokenizer, sums, tmp_path) -> None:
    config = TinyLoraConfig(task_type="CAUSAL_LM", tie="full", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    head = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.copy_(torch.roll(head.weight, 1, 0))
    log = AnswerLog(None, {})
    variants = variants_of_model(model, tokenizer, arguments())
    evaluate(variants, sums[:20], Plan(), log)
    assert summarize([variant.name for variant in variants], sums[:20], Plan(), log)["changed_by_zero_adapter"] == 0
    adapter, base = ([log.answers[name, "greedy", n, 0].completion for n in range(20)] for name in ("adapter", "base"))
    assert adapter != base and model.base_model.model.lm_head._disable_adapters is False


@pytest.mark.parametrize("controls", [True, False])
def test_a_lora_with_biases_has_no_base_to_switch_to(tiny_model_dir, tokenizer, controls) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", bias="all")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    if controls:
        with pytest.raises(RecipeError, match="bias='all'.*controls: false"):
            variants_of_model(model, tokenizer, arguments())
    else:
        assert [v.name for v in variants_of_model(model, tokenizer, arguments(controls=False))] == ["adapter"]


def test_verdicts_are_those_of_the_rules_now(tmp_path) -> None:
    """What an interrupted run left on disk is judged with the rest of it."""
    log = AnswerLog(tmp_path, {})
    log.add([Answer("model", "greedy", 0, 0, "#### 5")])
    log.file.close()
    variant = Variant("model", lambda prompts, sampling: ["#### 6"] * len(prompts), nullcontext, 1)
    log = AnswerLog(tmp_path, {})
    problems = [{"prompt": "a", "answer": "5"}, {"prompt": "b", "answer": "5"}]
    evaluate([variant], problems, Plan(), log)
    assert summarize(["model"], problems, Plan(), log)["variants"]["model"]["greedy"]["strict"]["mean"] == 0.5
    assert "true" not in (tmp_path / FILE).read_text()


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


@pytest.mark.parametrize(("option", "value"), [("adapter", "a/b"), ("vllm_server_base_url", "http://localhost:1")])
def test_a_base_is_not_named_where_it_is_known(option: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"base_model='c/d' with .*{option.split('_')[0]}.*leave"):
        check_base_model(arguments(base_model="c/d", **{option: value}))


def test_sampled_is_what_training_measures_and_samples_have_seeds(model, tokenizer, sums) -> None:
    plan = Plan(sampled=True, samples=3, sampling=Sampling(0.8, 0.9), seed=4)
    [variant, *_] = variants_of_model(model, tokenizer, arguments(controls=False))
    logs = [AnswerLog(None, {}) for _ in range(3)]
    state = torch.get_rng_state()
    evaluate([variant], sums, plan, logs[0])
    assert torch.equal(torch.get_rng_state(), state)
    evaluate([variant], sums, plan, logs[1])
    assert logs[0].answers == logs[1].answers
    evaluate([variant], sums, Plan(samples=3, sampling=Sampling(0.8, 0.9), seed=5), logs[2])
    drawn = [{key: answer for key, answer in log.answers.items() if key[1] == "samples"} for log in logs]
    assert drawn[0] != drawn[2] and len(drawn[0]) == 300
    assert len({drawn[0]["adapter", "samples", 7, n].completion for n in range(3)}) > 1
    sampled = [logs[0].answers["adapter", "sampled", n, 0].completion for n in range(len(sums))]
    options = {"batch_size": BATCH, "max_completion_length": LENGTH, "sampled": True}
    assert sampled == score(model, tokenizer, sums, **options).completions


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(model, tokenizer, sums, tmp_path, stop_after) -> None:
    plan = Plan(sampled=True, samples=2)
    variants = variants_of_model(model, tokenizer, arguments())
    whole = AnswerLog(None, {})
    evaluate(variants, sums[:40], plan, whole)

    calls = []

    def broken(prompts, sampling):
        calls.append(prompts)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return variants[0].complete(prompts, sampling)

    first = [type(variant)(**(vars(variant) | {"complete": broken})) for variant in variants]
    log = AnswerLog(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, sums[:40], plan, log)
    log.file.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-30])  # and the last line is torn
    log = AnswerLog(tmp_path, {})
    there = len(log.answers)
    assert 0 < there < len(whole.answers)
    evaluate(variants, sums[:40], plan, log)
    assert log.answers == whole.answers
    assert len(path.read_text().splitlines()) == 1 + len(whole.answers)


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
    finished = in_new_process(*command)
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
    from peft_tinylora.inline import parse_inline

    ours, zero = (parse_inline(text, 10**6) for text in models[:2])
    assert ours.v.any() and not zero.v.any() and torch.equal(ours.sketches, zero.sketches)


def test_a_digest_tells_texts_apart() -> None:
    assert digest_of(["a", "b"]) != digest_of(["ab"]) and len(digest_of([])) == 16
