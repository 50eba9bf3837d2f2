"""The bytes that each of two processes receives in a training step, by DDP and by FSDP2, with what is trained.

    python -m benchmarks.exchange --output benchmarks/results/exchange_cpu.md     # half a minute on two CPU cores

Two processes with gloo on one machine. The bytes are the kernel's own count (TCP_INFO) over all TCP connections of the
process, before and after some steps: what really came, gloo's headers and each collective's own way of sending
included, and nothing of other programs. How long it took is no subject here: the network of a machine with itself is none.

FSDP2 shards each decoder layer and then the whole, as accelerate does by accelerate_configs/fsdp2.yaml.
"""

import argparse
import os
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from benchmarks.basis import markdown
from benchmarks.basis_cell import seconds_of_others
from benchmarks.report import publish, run_lines
from peft_tinylora import TinyLoraConfig


PROCESSES, WARM_UP, STEPS = 2, 2, 4
MODEL = Qwen2Config(  # 7 layers of 7 modules, 4 of them to a number: 13 numbers
    hidden_size=256,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=704,
    vocab_size=2048,
    tie_word_embeddings=True,
)
TINYLORA = TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=4, target_modules="all-linear")
TRAINED: dict[str, tuple[PeftConfig | None, bool]] = {  # what is trained, and whether DDP sends buffers, its default
    "TinyLoRA, 13 numbers": (TINYLORA, False),
    "the same, with DDP's default of sending buffers": (TINYLORA, True),
    "LoRA r=2": (LoraConfig(r=2, target_modules="all-linear"), True),
    "LoRA r=8": (LoraConfig(r=8, target_modules="all-linear"), True),
    "all weights": (None, True),
}
RECEIVED_OFFSET = 128  # of tcpi_bytes_received, 8 bytes, in Linux's struct tcp_info


def bytes_received() -> int:
    """By all TCP connections of this process that are open, since they were opened."""
    total = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:  # the one by which the folder was read
            continue
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, RECEIVED_OFFSET)[0]
    return total


def model_with(config: PeftConfig | None) -> PreTrainedModel:
    """The model with an adapter, or to be trained whole; the same numbers in every process."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32)
    return base if config is None else get_peft_model(base, config)


def by_ddp(model: PreTrainedModel, sends_buffers: bool) -> torch.nn.Module:
    """The model as DDP has it."""
    return DistributedDataParallel(model, broadcast_buffers=sends_buffers)


def by_fsdp2(model: PreTrainedModel, sends_buffers: bool) -> torch.nn.Module:
    """The model sharded layer by layer; FSDP2 never sends buffers."""
    for layer in [module for module in model.modules() if isinstance(module, Qwen2DecoderLayer)]:
        fully_shard(layer)
    return fully_shard(model)


def step_of(model: torch.nn.Module) -> Callable[[], None]:
    """Returns a step of SGD on 2 examples of 16 tokens."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    tokens = torch.randint(MODEL.vocab_size, (2, 16))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_of_a_step(step: Callable[[], None]) -> float:
    """What this process receives in one, the mean of some after the first ones, which set up what they send."""
    for _ in range(WARM_UP):
        step()
    dist.barrier()
    before = bytes_received()
    for _ in range(STEPS):
        step()
    dist.barrier()
    return (bytes_received() - before) / STEPS


def measure(rank: int, folder: str) -> None:
    """One of the processes: leaves what it received in `folder`, by what is trained and how."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    received = {}
    for name, (config, sends_buffers) in TRAINED.items():
        for way in (by_ddp, by_fsdp2):
            model = model_with(config)
            numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
            received[name, way.__name__] = numbers, bytes_of_a_step(step_of(way(model, sends_buffers)))
    torch.save(received, f"{folder}/received_{rank}")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.exchange", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    started, others_before = time.perf_counter(), seconds_of_others()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder,), PROCESSES)
        received = [torch.load(f"{folder}/received_{rank}", weights_only=True) for rank in range(PROCESSES)]
    lines = [["trained", "numbers", "their gradient, bytes", "DDP", "FSDP2"]]
    for name in TRAINED:
        numbers, _ = received[0][name, "by_ddp"]
        cells = [sum(each[name, way][1] for each in received) / PROCESSES for way in ("by_ddp", "by_fsdp2")]
        lines.append([name, f"{numbers:,}", f"{4 * numbers:,}", *(f"{cell:,.0f}" for cell in cells)])
    parameters = sum(p.numel() for p in model_with(None).parameters())
    head = "\n".join(
        [
            "# Bytes that a process receives in a step",
            "",
            *run_lines(
                "benchmarks.exchange",
                argv,
                started,
                seconds_of_others() - others_before,
                ("peft-tinylora", "torch", "transformers", "peft"),
            ),
            f"- {PROCESSES} processes with gloo, the kernel's count of what came in by TCP, mean of {STEPS} steps and the processes",
            f"- a random Qwen2 of {parameters:,} numbers in fp32 ({4 * parameters:,} bytes); a batch of 2 x 16 tokens each",
            "",
            markdown(lines),
        ]
    )
    publish(head, {}, options.output)


if __name__ == "__main__":
    main()
