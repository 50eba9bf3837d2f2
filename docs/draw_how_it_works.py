"""Draws the pictures of how_it_works.md from the embedded model and the adapter in model_cards/embedded_grpo.

python docs/draw_how_it_works.py     from the root of a clone; some seconds
"""

import tempfile
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peft_tinylora import TinyLoraConfig  # noqa: E402
from peft_tinylora.targets import target_names  # noqa: E402
from peft_tinylora.tying import group_modules  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
PICTURES = Path(__file__).resolve().parent / "how_it_works"
BASE = ROOT / "trl_recipes/embedded/model"
ADAPTER = ROOT / "model_cards/embedded_grpo"
RANK, N_TIE = 2, 4
TRAINED, FROZEN, BASE_COLOUR = "#d1495b", "#2e6f95", "#9aa5b1"


def main() -> None:
    """Draw every picture."""
    plt.rcParams.update({"font.size": 10, "figure.dpi": 110, "savefig.bbox": "tight", "axes.titlesize": 10.5})
    PICTURES.mkdir(exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    names = target_names(base, TinyLoraConfig(tie="none", target_modules="all-linear"))
    draw_singular_values(base)
    draw_update(base)
    draw_tying(names)
    model = PeftModel.from_pretrained(base, ADAPTER)
    draw_sizes(model, names)
    model.peft_config["default"].save_dtype = "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        draw_bytes((Path(folder) / "adapter_model.safetensors").read_bytes())


def save(name: str) -> None:
    """Write the current figure; without matplotlib's version in it, so that the file changes only when the picture does."""
    plt.savefig(PICTURES / f"{name}.png", metadata={"Software": None})
    plt.close()


def draw_singular_values(base: torch.nn.Module) -> None:
    """All singular values of four weights of the middle layer, and the r that are kept."""
    layer = base.model.layers[3]
    modules = {"q_proj": layer.self_attn.q_proj, "o_proj": layer.self_attn.o_proj}
    modules |= {"gate_proj": layer.mlp.gate_proj, "down_proj": layer.mlp.down_proj}
    _, axes = plt.subplots(1, 4, figsize=(12, 2.9), sharey=True)
    for axis, (name, module) in zip(axes, modules.items(), strict=True):
        weight = module.weight.detach().double()
        values = torch.linalg.svdvals(weight)
        places = range(1, len(values) + 1)
        axis.bar(places, values, width=1.0, color=BASE_COLOUR)
        axis.bar(places[:RANK], values[:RANK], width=1.0, color=FROZEN)
        axis.annotate(
            f"kept: {values[0]:.1f}, {values[1]:.1f}",
            (2.5, values[1].item()),
            (30, 2.3),
            color=FROZEN,
            arrowprops={"arrowstyle": "->", "color": FROZEN},
        )
        axis.set_title(f"layers.3 {name}, {weight.shape[0]} x {weight.shape[1]}")
        axis.set_xlabel("place, from the largest")
    axes[0].set_ylabel("singular value")
    save("singular_values")


def draw_update(base: torch.nn.Module) -> None:
    """The matrices of one module's update, to scale, and who makes each."""
    weight = base.model.layers[3].mlp.gate_proj.weight
    out, inner = weight.shape
    _, axis = plt.subplots(figsize=(11, 3.6))
    scale, small = 1 / 100, 0.28  # small: the side of an r x r matrix, drawn larger than to scale
    x = 0.0

    def box(width: float, height: float, colour: str, title: str, below: str, gap: float = 0.95) -> None:
        nonlocal x
        axis.add_patch(Rectangle((x, -height / 2), width, height, color=colour))
        axis.text(x + width / 2, height / 2 + 0.12, title, ha="center", va="bottom", weight="bold")
        axis.text(x + width / 2, -height / 2 - 0.12, below, ha="center", va="top", fontsize=9)
        x += width + gap

    def sign(text: str, gap: float = 0.5) -> None:
        nonlocal x
        axis.text(x - 0.5, 0, text, ha="center", va="center", fontsize=15)
        x += gap

    box(inner * scale, out * scale, BASE_COLOUR, "W", f"{out} x {inner}\nthe base model's")
    sign("+", 0.3)
    box(0.14, out * scale, FROZEN, "B = U S", f"{out} x {RANK}\nfrom W", 1.3)
    sign("(", -0.15)
    box(small / 2, small / 2, TRAINED, "v", "1 number\ntrained", 0.95)
    sign("x", 0.15)
    box(small, small, FROZEN, "P", f"{RANK} x {RANK}\nfrom a seed", 1.0)
    sign(")", 0.15)
    box(inner * scale, 0.14, FROZEN, r"A = V$^{\rm T}$", f"{RANK} x {inner}\nfrom W")
    axis.text(x + 0.15, 0.55, "red: trained and stored", color=TRAINED, weight="bold")
    axis.text(
        x + 0.15, 0.0, "blue: frozen, computed\nagain where it is needed", color=FROZEN, weight="bold", va="center"
    )
    axis.text(x + 0.15, -0.6, "grey: the base, untouched", color="#5c6670", weight="bold", va="center")
    axis.set_xlim(-0.4, x + 3.2)
    axis.set_ylim(-2.1, 1.9)
    axis.set_aspect("equal")
    axis.axis("off")
    axis.set_title("layers.3 mlp.gate_proj of the embedded model; W, A and B to scale along their long sides")
    save("update")


def draw_tying(names: list[str]) -> None:
    """Which v each module reads: layers by modules, coloured by group."""
    types = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    layers = len(names) // len(types)
    _, axes = plt.subplots(1, 2, figsize=(11, 4.1))
    for axis, tie in zip(axes, ("tiled", "structured"), strict=True):
        groups = group_modules(names, tie, N_TIE)
        count = len(set(groups.values()))
        colours = plt.get_cmap("tab20")
        for index, (name, group) in enumerate(groups.items()):
            layer, column = index // len(types), types.index(name.rpartition(".")[2])
            axis.add_patch(
                Rectangle((column, layer), 1, 1, facecolor=colours(group % 20), alpha=0.75, ec="white", lw=2)
            )
            axis.text(column + 0.5, layer + 0.5, str(group), ha="center", va="center", fontsize=11)
        axis.set_title(f'tie="{tie}", n_tie={N_TIE}: {len(names)} modules read {count} v')
        axis.set_xticks([i + 0.5 for i in range(len(types))], [t.removesuffix("_proj") for t in types])
        axis.set_yticks([i + 0.5 for i in range(layers)], [f"layer {i}" for i in range(layers)])
        axis.set_xlim(0, len(types))
        axis.set_ylim(layers, 0)
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    save("tying")


def draw_sizes(model: torch.nn.Module, names: list[str]) -> None:
    """Bytes of what is stored and of what is computed again."""
    v = sum(p.numel() for name, p in model.named_parameters() if "tinylora_v" in name)
    weights = [model.get_submodule(f"base_model.model.{name}").base_layer.weight for name in names]
    rows = [
        ("the base model's weights", sum(p.numel() * 4 for n, p in model.named_parameters() if "tinylora" not in n)),
        ("A and B of 49 modules", sum(RANK * sum(weight.shape) * 4 for weight in weights)),
        ("P of 49 modules", len(names) * RANK * RANK * 4),
        ("adapter_config.json", (ADAPTER / "adapter_config.json").stat().st_size),
        ("adapter_model.safetensors", (ADAPTER / "adapter_model.safetensors").stat().st_size),
        ("v, float32", v * 4),
        ("v, bfloat16", v * 2),
    ]
    colours = [BASE_COLOUR, FROZEN, FROZEN, TRAINED, TRAINED, TRAINED, TRAINED]
    _, axis = plt.subplots(figsize=(11, 3.4))
    bars = axis.barh(range(len(rows)), [size for _, size in rows], color=colours)
    axis.bar_label(bars, [f"{size:,} bytes" for _, size in rows], padding=4)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(10, 5e7)
    axis.set_xlabel("bytes, on a logarithmic axis")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("grey: there already      blue: computed again, not in the adapter      red: what an adapter is")
    save("sizes")


def draw_bytes(data: bytes) -> None:
    """The file of 13 bfloat16 numbers, byte by byte."""
    header = 8 + int.from_bytes(data[:8], "little")
    width = 20
    _, axis = plt.subplots(figsize=(11, 4.0))
    for place, byte in enumerate(data):
        colour = "#e0e4e8" if place < 8 else "#b9d3e4" if place < header else "#f0a6b0"
        column, row = place % width, place // width
        axis.add_patch(Rectangle((column, row), 1, 1, color=colour, ec="white", lw=1.5))
        text = f"{byte:02x}" if place < 8 or place >= header else chr(byte)
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", family="monospace", fontsize=10)
    rows = -(-len(data) // width)
    keys = [
        ("#e0e4e8", "8 bytes: length of the header"),
        ("#b9d3e4", f"{header - 8} bytes: the header, JSON"),
        ("#f0a6b0", f"{len(data) - header} bytes: 13 numbers"),
    ]
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour, _ in keys]
    legend_below(axis, handles, [text for _, text in keys])
    axis.set_xlim(0, width)
    axis.set_ylim(rows, 0)
    axis.axis("off")
    axis.set_title(f"adapter_model.safetensors of 13 numbers in bfloat16: {len(data)} bytes")
    save("bytes")


def legend_below(axis: Axes, handles: list[Rectangle], labels: list[str]) -> None:
    """A legend in one line under the picture."""
    axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels), frameon=False)


if __name__ == "__main__":
    main()
