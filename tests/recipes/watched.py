"""A recipe as one of several processes, which leaves behind what only it knows. Launched in the recipe's place:

    accelerate launch --config_file ... tests/recipes/watched.py FOLDER DEVICE trl_recipes/grpo.py --config ...

Leaves `rank_N.pt` in FOLDER: v after each logged step, as the process has it; of GRPO, each step's completions too.

DEVICE is `given`, or `cpu-for-gpu`: accelerate 1.15 shards by FSDP where the processes have GPUs, and on a CPU trains by
DDP without a word (`AcceleratorState.__init__` looks for MULTI_GPU and its like, not for MULTI_CPU). Then this script says
that the processes have GPUs, names gloo where NCCL would be, and puts the tensors on the CPU. All the rest is what runs
on GPUs.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer


def main(folder: str, device: str, script: str, *options: str) -> None:
    """Runs the recipe with the arguments that follow."""
    if device == "cpu-for-gpu":
        PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    sys.path[0] = str(Path(script).parent)  # as if the recipe had been started
    sys.argv = [script, *options]
    watch(Path(folder) / f"rank_{os.environ.get('RANK', 0)}.pt")
    runpy.run_path(script, run_name="__main__")


def watch(file: Path) -> None:
    """Has every trainer that is made from now on leave `file` behind."""
    from trl_recipes.trainer_setup import trained_numbers

    seen = {"v": [], "batches": [], "kind": None}
    make, generate = Trainer.__init__, GRPOTrainer._generate_and_score_completions

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen["v"].append(trained_numbers(kwargs["model"]))
            [seen["kind"]] = {type(p).__name__ for n, p in kwargs["model"].named_parameters() if "tinylora_v" in n}
            torch.save(seen, file)

    def make_watched(trainer, *args, **kwargs):
        make(trainer, *args, **kwargs)
        trainer.add_callback(Watch())

    def generate_watched(trainer, inputs):
        batch = generate(trainer, inputs)
        if trainer.model.training:
            seen["batches"].append({name: value for name, value in batch.items() if torch.is_tensor(value)})
        return batch

    Trainer.__init__, GRPOTrainer._generate_and_score_completions = make_watched, generate_watched


if __name__ == "__main__":
    main(*sys.argv[1:])
