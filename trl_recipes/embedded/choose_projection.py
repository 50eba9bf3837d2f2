"""Which projection seed points where the reward is? Prints the seeds whose 13 numbers move it most at the start.

    python -m trl_recipes.embedded.choose_projection

The projections P are random and frozen, and with one number for four modules a draw may point nearly across the
direction that matters. The gradient of the expected reward at v = 0 is linear in P, so one batch of rollouts on GRPO's
own training problems ranks any number of seeds: for each module it gives g = dE[reward]/dR, and a seed's gradient is
then dE[reward]/dv_group = sum over the group's modules of <P, g>. Held-out problems are not looked at.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tinylora import TinyLoraConfig, TinyLoraLayer
from peft_tinylora.projection import draw_projection, seed_of_module
from peft_tinylora.tying import group_modules
from trl_recipes.rewards import exact_match_reward


FOLDER = Path(__file__).parent
R = 2


def main() -> None:
    """Rolls out, takes the gradient for each module, and ranks the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to rank, from 0")
    parser.add_argument("--problems", type=int, default=2048, help="training problems rolled out")
    parser.add_argument("--n_tie", type=int, default=4, help="modules that share a number")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    rows = [json.loads(line) for line in (FOLDER / "data/grpo_train.jsonl").read_text().splitlines()]
    gradients = reward_gradients(rows[: arguments.problems])
    groups = group_modules(list(gradients), "tiled", arguments.n_tie)
    norms = {}
    for seed in range(arguments.seeds):
        gradient = torch.zeros(max(groups.values()) + 1)
        for name, g in gradients.items():
            gradient[groups[name]] += (draw_projection(1, R, seed_of_module(seed, name))[0] * g).sum()
        norms[seed] = gradient.norm().item()
    ranked = sorted(norms, key=lambda seed: norms[seed], reverse=True)
    print(f"median over {len(ranked)} seeds: {sorted(norms.values())[len(ranked) // 2]:.4f}")
    for seed in ranked[:8]:
        print(f"projection_seed {seed}: {norms[seed]:.4f}")


def reward_gradients(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """dE[reward]/dR of each adapted module at R = 0, by the score function with the mean reward as a baseline.

    Args:
        rows (`list[dict[str, str]]`): problems, {"prompt", "answer"}.

    Returns:
        `dict[str, torch.Tensor]`: module name -> (2, 2), in model order.
    """
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    # u = r * r and the unit matrices for P: v is then R itself, and its gradient what is wanted.
    config = TinyLoraConfig(r=R, u=R * R, tie="none", target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER / "model"), config).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, TinyLoraLayer)}
    for layer in layers.values():
        layer.tinylora_P["default"] = torch.eye(R * R).reshape(R * R, R, R)

    baseline, batch_size = None, 64
    for start in trange(0, len(rows), batch_size, desc="rolling out"):
        batch = rows[start : start + batch_size]
        prompts = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        length = prompts["input_ids"].shape[1]
        ids = model.generate(**prompts, max_new_tokens=40, do_sample=True, top_k=0)
        texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        rewards = torch.tensor(exact_match_reward(prompts["input_ids"].tolist(), texts, [r["answer"] for r in batch]))
        baseline = rewards.mean() if baseline is None else baseline
        chosen = ids[:, length:]
        mask = torch.cat([prompts["attention_mask"], (chosen != tokenizer.pad_token_id).long()], dim=1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, length - 1 : -1]
        log_probabilities = logits.log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
        of_completion = (log_probabilities * (chosen != tokenizer.pad_token_id)).sum(dim=1)
        ((rewards - baseline) * of_completion).sum().div(len(rows)).backward()
    gradients = {name: layer.vectors("default")[0].grad for name, layer in layers.items()}
    return {name: gradient.reshape(R, R) for name, gradient in gradients.items() if gradient is not None}


if __name__ == "__main__":
    main()
