"""What is left of an adapter once it is merged, in the logits: rounding to nearest, stochastic rounding, NF4.

    python -m benchmarks.merging [--adapter outputs/embedded_grpo]

The adapter that `make demo` left, on the embedded model in bf16 and in NF4, with v as trained and scaled down to the
sizes that larger models learn. Logits are computed in float64 (NF4: fp32) from the merged weights, so that the only
error is that of the weights: on the full text of held-out problems and the adapted model's own answers. Of effect = logits(adapter) -
logits(base), "error" is |effect of merged - effect| / |effect|, and "kept" the component of the merged effect along it.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import peft_tinylora  # noqa: F401  registers the tuner
from trl_recipes.problems import load_rows
from trl_recipes.score import score
from trl_recipes.trainer_setup import hide_known_noise


EMBEDDED = Path(__file__).parents[1] / "trl_recipes" / "embedded"
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
SCALES = (1.0, 0.1, 0.01, 0.001, 0.0001)
SEEDS = range(5)
PROBLEMS = 128


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="outputs/embedded_grpo", help="an adapter of the embedded model")
    adapter = parser.parse_args().adapter
    warnings.filterwarnings("ignore", "Merging lost")
    hide_known_noise()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model", padding_side="left")
    problems = list(load_rows(str(EMBEDDED / "data" / "held_out.jsonl")).take(PROBLEMS))

    def load(quantized: bool) -> PreTrainedModel:
        if quantized:
            return AutoModelForCausalLM.from_pretrained(
                EMBEDDED / "model", quantization_config=NF4, device_map={"": "cpu"}, dtype=torch.float32
            )
        return AutoModelForCausalLM.from_pretrained(EMBEDDED / "model", dtype=torch.bfloat16)

    def with_adapter(scale: float, quantized: bool) -> PeftModel:
        # The file's factors are those of the fp32 weights; those of this base are computed anew, as its own training
        # would have had them.
        config = peft_tinylora.TinyLoraConfig(**settings_of(adapter))
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED / "model"), adapter)
        model = PeftModel(load(quantized), config)
        for group, v in model.tinylora_v["default"].items():
            v.data.copy_(scale * trained.tinylora_v["default"][group])
        return model

    print(f"{'base':<6}{'v times':>8}  {'merged':<34}{'error':>8}{'kept':>8}{'weights: error':>16}{'greedy':>9}")
    for quantized in (False, True):
        for scale in SCALES:
            exact = wide(with_adapter(scale, quantized))
            texts = [p["prompt"] + c for p, c in zip(problems, answers(exact, tokenizer, problems), strict=True)]
            batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
            with exact.disable_adapter():
                base = logits(exact, batch)
            effect = logits(exact, batch) - base
            name = "NF4" if quantized else "bf16"
            row(name, scale, "not merged", [(effect, None, greedy(exact, tokenizer, problems))], effect)
            for label, options in ways(quantized):
                results = []
                for choice in options:
                    model = with_adapter(scale, quantized)
                    merged = wide(model.merge_and_unload(**choice))
                    lost = model.merge_report.total.relative_error
                    results.append((logits(merged, batch) - base, lost, greedy(merged, tokenizer, problems)))
                row(name, scale, label, results, effect)


def wide(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The model in float64 where it is not quantized, ready for evaluation."""
    return model.eval() if getattr(model, "is_quantized", False) else model.double().eval()


def ways(quantized: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """The ways to merge: a label, and the options of `merge_and_unload`, several where they are averaged."""
    if quantized:
        return [("into NF4", [{}]), ("dequantized, fp32", [{"dequantize": True}])]
    stochastic = [{"stochastic_rounding_seed": seed} for seed in SEEDS]
    return [("to nearest", [{}]), (f"stochastic, mean of {len(SEEDS)} seeds", stochastic)]


def settings_of(adapter: str) -> dict[str, Any]:
    """The fields of the adapter's config that say what it is."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    names = ("r", "u", "tie", "n_tie", "sigma", "projection_seed", "target_modules")
    return {name: config[name] for name in names if name in config}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the real tokens, shape (tokens, vocabulary)."""
    return model(**batch).logits[batch["attention_mask"].bool()]


def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]]) -> list[str]:
    """The model's greedy answers."""
    return score(model, tokenizer, problems, batch_size=len(problems), max_completion_length=40).completions


def greedy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]]) -> float:
    """Share of problems solved greedily."""
    return score(model, tokenizer, problems, batch_size=len(problems), max_completion_length=40).fraction


def row(
    base: str,
    scale: float,
    label: str,
    results: list[tuple[torch.Tensor, float | None, float]],
    effect: torch.Tensor,
) -> None:
    """Prints one line, the mean of `results`."""
    count = len(results)
    error = sum((merged - effect).norm() / effect.norm() for merged, _, _ in results) / count
    kept = sum((merged * effect).sum() / (effect * effect).sum() for merged, _, _ in results) / count
    lost = "" if results[0][1] is None else f"{sum(lost or 0.0 for _, lost, _ in results) / count:.3f}"
    solved = sum(solved for _, _, solved in results) / count
    print(f"{base:<6}{scale:>8g}  {label:<34}{error:>8.3f}{kept:>8.3f}{lost:>16}{solved:>9.1%}", flush=True)


if __name__ == "__main__":
    main()
