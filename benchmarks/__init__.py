"""What things cost: a formula for a recipe's memory, and side-by-side measurements.

shapes.py           a model id -> its transformers config, offline
peak.py             a block of code -> the most bytes of tensors that were alive in it
memory.py           a recipe's YAML -> the memory that it is expected to need, item by item; also a command
training.py         the command that measures GRPO and SFT side by side and prints one table
training_cell.py    one cell of that table, in a process of its own
basis.py            the command that measures the frozen factors beside stock PEFT: time, exactness, files, memory
basis_cell.py       one row of its tables, in a process of its own
basis_gpu.py        the same of one weight on a GPU, and an adapter on a whole 7B there
algorithms.py       ways to a weight's leading singular triplets, side by side: why peft_tinylora has the one it has
speed.py            the command that measures time, memory and operators beside the bare model, LoRA and stock PEFT
speed_cell.py       one model of its tables, in a process of its own
mixed.py            the command that measures batches of many adapters, and thousands in memory, beside LoRA
thin.py             converting bfloat16 activations against products in parts, by their number
report.py           what every benchmark says of the run that its tables come from
merging.py          what is left of an adapter once it is merged
results/            tables that were measured, each with its command, machine, versions and date
"""

import os
from pathlib import Path


# For the processes that the commands start: this checkout first, then what the user has there.
PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
