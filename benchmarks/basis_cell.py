"""One cell of benchmarks/basis.py, in a process of its own: create, load or weigh an adapter of 13 numbers.

    python -m benchmarks.basis_cell '{"task": "create", "project": "ours", "model": "FOLDER", "adapter": "FOLDER"}'

Prints one line of JSON. Only the project "ours" imports peft_tinylora, whose import takes PEFT's TINYLORA over; PEFT's
own is measured in a process that never saw it. Needs Linux, whose kernel keeps a process's high-water mark of memory.
"""

import copy
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel, TinyLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks import PYTHONPATH
from benchmarks.shapes import shape_of


NUMBERS = 13
RANK = 2
STD = 0.02  # of the bulk of a weight
SPIKES = (4, 3, 2.4, 2, 1.8, 1.5, 1.3, 1.2)  # in largest singular values of the bulk
PLACEHOLDER_SEED = 0


@dataclass
class Cell:
    """What one process does.

    Args:
        task (`str`): "create" and save an adapter, "load" it, or "weigh" the files of one on the meta device.
        project (`str`): "ours" or "stock".
        model (`str`): folder of the base model; for "weigh" its id in shapes.py.
        adapter (`str`): folder to save to or load from; of ours, of which the forms are subfolders.
    """

    task: str
    project: str
    model: str
    adapter: str


def run_cell(cell: Cell, cache: Path, keep_nothing: bool = False) -> dict:
    """Runs a cell in a process of its own; returns what it printed.

    Args:
        cell ([`Cell`]): what to do.
        cache (`Path`): folder of bases.
        keep_nothing (`bool`, *optional*, defaults to `False`): whether glibc returns all freed blocks from 1 MB on. By
            default it keeps and splits them, differently in every run, by up to a GB here. Slower, so not for timing.

    Raises:
        RuntimeError: if it failed, with the end of what it said.
    """
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PEFT_TINYLORA_CACHE": str(cache)}
    # Offline, because saving would look the base model up; no bars, because what is said is passed on.
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if keep_nothing else {}
    command = [sys.executable, "-m", "benchmarks.basis_cell", json.dumps(asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{cell} failed:\n{done.stderr[-3000:]}")
    for line in done.stderr.splitlines():
        if "gemm_4bit_forward" not in line:  # bitsandbytes' complaint on every import without a GPU
            print(line, file=sys.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def trained_like(rows: int, columns: int, generator: torch.Generator, spikes: int = len(SPIKES)) -> torch.Tensor:
    """A Gaussian matrix plus `spikes` singular values beyond its own, as training leaves them, in fp32."""
    W = STD * torch.randn(rows, columns, generator=generator)
    edge = STD * (math.sqrt(rows) + math.sqrt(columns))
    left = torch.linalg.qr(torch.randn(rows, spikes, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, spikes, generator=generator))[0]
    return W.addmm_(left * (edge * torch.tensor(SPIKES[:spikes])), right.T)


def base_config(quick: bool) -> Qwen2Config:
    """The shape of Qwen2.5-0.5B with a small vocabulary, or a tiny one with as many groups of modules."""
    config = copy.deepcopy(shape_of("Qwen/Qwen2.5-0.5B-Instruct"))
    config.vocab_size = 1024
    if quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = Qwen2Config(**sizes, num_hidden_layers=7, num_key_value_heads=2, vocab_size=1024)
    return config


def save_base(folder: Path, quick: bool) -> int:
    """Saves a random model whose linear weights have separated leading values, in bfloat16 as Qwen's is.

    Returns:
        `int`: bytes that its largest adapted weight takes in fp32.
    """
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(base_config(quick), dtype=torch.bfloat16)
    largest = 0
    for layer in (module for module in model.model.modules() if isinstance(module, nn.Linear)):
        layer.weight.data.copy_(trained_like(layer.out_features, layer.in_features, generator, spikes=3))
        largest = max(largest, 4 * layer.weight.numel())
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return largest


def adapter_config(project: str, base: PretrainedConfig) -> TinyLoraConfig:
    """The settings that train 13 numbers: groups of neighbours (ours), one vector for all modules (stock)."""
    if project == "stock":
        return TinyLoraConfig(r=RANK, u=NUMBERS, weight_tying=1.0, target_modules="all-linear")
    import peft_tinylora  # here, or the process of "stock" would have it too

    modules = 7 * base.num_hidden_layers
    return peft_tinylora.TinyLoraConfig(
        r=RANK,
        u=1,
        tie="tiled",
        n_tie=math.ceil(modules / NUMBERS),
        target_modules="all-linear",
        save_dtype="float32",
    )


def create(cell: Cell) -> dict:
    """Adds an adapter to the base, which is timed, and saves it, which is not."""
    base = load_base(cell.model)
    config = adapter_config(cell.project, base.config)
    start_bytes = start_of_peak()
    start = time.perf_counter()
    model = get_peft_model(base, config)
    seconds = time.perf_counter() - start
    peak_bytes = memory_bytes("VmHWM") - start_bytes
    return {"seconds": seconds, "peak_bytes": peak_bytes, "files": save(model, cell)}


def load(cell: Cell) -> dict:
    """Loads a saved adapter onto the base."""
    base = load_base(cell.model)
    folder = Path(cell.adapter)
    if cell.project == "ours":
        import peft_tinylora  # noqa: F401  registers the tuner

        folder /= "compact, float32"
    start_bytes = start_of_peak()
    start = time.perf_counter()
    model = PeftModel.from_pretrained(base, folder)
    seconds = time.perf_counter() - start
    peak_bytes = memory_bytes("VmHWM") - start_bytes
    check_numbers(model)
    return {"seconds": seconds, "peak_bytes": peak_bytes}


def weigh(cell: Cell) -> dict:
    """The bytes of an adapter's files for a model too large to be made here: its factors are placeholders."""
    config = shape_of(cell.model)
    config.name_or_path = cell.model  # which adapter_config.json names
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, adapter_config(cell.project, config))
    (put_factors_of_ours if cell.project == "ours" else put_factors_of_stock)(model)
    vectors = model.base_model.tinylora_v["default"]
    for group, v in vectors.items():
        vectors[group] = nn.Parameter(torch.zeros_like(v, device="cpu"))
    return {"files": save(model, cell)}


def put_factors_of_ours(model: PeftModel) -> None:
    """Random factors, said to be exact: of those that were never computed no compact file can be written."""
    from peft_tinylora import TinyLoraLayer
    from peft_tinylora.basis import Basis

    generator = torch.Generator().manual_seed(PLACEHOLDER_SEED)
    for layer in (module for module in model.modules() if isinstance(module, TinyLoraLayer)):
        A = torch.randn(RANK, layer.in_features, generator=generator)
        B = torch.randn(layer.out_features, RANK, generator=generator)
        layer.set_basis("default", Basis(A, B, angle=0.0))


def put_factors_of_stock(model: PeftModel) -> None:
    """Zeros of the same shape and dtype: safetensors does not compress."""
    for layer in (module for module in model.modules() if hasattr(module, "tinylora_A")):
        for buffers in (layer.tinylora_A, layer.tinylora_B, layer.tinylora_P):
            if buffers["default"].is_meta:
                buffers["default"] = torch.zeros_like(buffers["default"], device="cpu")


def save(model: PeftModel, cell: Cell) -> dict[str, dict[str, int]]:
    """Saves an adapter in each form that its project has.

    Returns:
        `dict`: form -> file -> bytes.
    """
    check_numbers(model)
    if cell.project == "stock":
        model.save_pretrained(cell.adapter)
        return {"stock PEFT": sizes(Path(cell.adapter))}
    config = model.peft_config["default"]
    found = {}
    for form, save_dtype, save_basis in (
        ("compact, float32", "float32", False),
        ("compact, bfloat16", "bfloat16", False),
        ("portable", None, True),
    ):
        config.save_dtype, config.save_basis = save_dtype, save_basis
        model.save_pretrained(Path(cell.adapter, form))
        found[form] = sizes(Path(cell.adapter, form))
    return found


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the two files of an adapter."""
    return {name: (folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")}


def check_numbers(model: PeftModel) -> None:
    """Raises unless the adapter has the 13 numbers that are said."""
    found = sum(v.numel() for v in model.base_model.tinylora_v["default"].values())
    if found != NUMBERS:
        raise RuntimeError(f"the adapter has {found} numbers instead of {NUMBERS}")


def load_base(folder: str) -> PreTrainedModel:
    """The base model with all of its weights in memory: a mapped file would be read during what is measured."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def start_of_peak() -> int:
    """Starts the high-water mark of this process anew; returns its memory now."""
    torch.linalg.svd(torch.randn(64, 64))  # what the maths libraries set up once is no part of building
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what loading freed would hide what building takes
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS is the memory now, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def seconds_of_others() -> float:
    """CPU seconds since boot that programs other than this one and the processes it ran have taken."""
    user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def main() -> None:
    """Runs the cell and prints what it found as one line of JSON."""
    cell = Cell(**json.loads(sys.argv[1]))
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = {"create": create, "load": load, "weigh": weigh}[cell.task](cell)
    if cell.project == "stock" and "peft_tinylora" in sys.modules:
        raise RuntimeError("peft_tinylora was imported in the process of stock PEFT")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
