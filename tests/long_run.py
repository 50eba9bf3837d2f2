"""A long training run of `simulation.SmallModel` on the package, beside the same run in float64.

Between steps, at seeded points: adapters are merged and unmerged, saved and loaded onto a base made anew, switched, two
made active together, disabled; and, where asked, autocast to bf16 goes on and off.
"""

import copy
import random
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from simulation import MATRICES, TOKENS, Adapter, Optimizer, Simulation, SmallModel
from torch import nn

from peft_tinylora import TinyLoraConfig


BATCH, PERIOD = 8, 20  # steps between two events
EVENTS = ("merge", "save", "switch", "switch", "disable", "autocast", "autocast")


def make_base(kind: str) -> SmallModel:
    """The same base at each call: float32, float64, bfloat16, or nf4, whose linear layers are in 4 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallModel().requires_grad_(False)
    if kind != "nf4":
        return model.to(getattr(torch, kind))
    import bitsandbytes

    for name in ("first", "last"):
        linear = model.get_submodule(name)
        quantized = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantized.load_state_dict(linear.state_dict())
        model.set_submodule(name, quantized.to("cpu"))
    return model.requires_grad_(False)


def make_adapters() -> dict[str, Adapter]:
    """Three that differ in everything, v zero."""
    experts = len(MATRICES) - 4
    adapters = {
        "one": Adapter(
            2, 1, "left", 0, "tiled", 2, tuple(i // 2 for i in range(4 + experts)), Optimizer("adamw", 1e-3)
        ),
        "two": Adapter(4, 3, "split", 5, "none", None, tuple(range(4 + experts)), Optimizer("sgd", 3e-2)),
        "three": Adapter(1, 2, "left", 9, "full", None, (0,) * (4 + experts), Optimizer("adamw", 3e-4)),
    }
    for adapter in adapters.values():
        adapter.v = torch.zeros(max(adapter.groups) + 1, adapter.u, dtype=torch.float64)
    return adapters


def config_of(adapter: Adapter) -> TinyLoraConfig:
    """The config that means this adapter."""
    return TinyLoraConfig(
        r=adapter.r,
        u=adapter.u,
        sigma=adapter.sigma,
        projection_seed=adapter.seed,
        tie=adapter.tie,
        n_tie=adapter.n_tie,
        target_modules=["embed", "first", "conv", "last"],
        target_parameters=["experts.weight"],
    )


def bits_of_base(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that the base model holds, scales of quantized weights too, as bytes."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): tensor.detach().clone().view(torch.uint8)
        for name, tensor in model.state_dict().items()
        if "tinylora" not in name
    }


class LongRun:
    """One model in training, and its simulation.

    Args:
        kind (`str`): of base; see [`make_base`].
        with_autocast (`bool`): whether autocast goes on and off.
        folder (`Path`): for checkpoints.
    """

    def __init__(self, kind: str, with_autocast: bool, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.draw = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        base = make_base(kind)
        self.adapters = make_adapters()
        self.simulation = Simulation(base, self.adapters)
        self.bits = bits_of_base(base)
        self.bare = copy.deepcopy(base)
        (first, adapter), *others = self.adapters.items()
        self.model = get_peft_model(base, config_of(adapter), adapter_name=first)
        for name, adapter in others:
            self.model.add_adapter(name, config_of(adapter))
        self.optimizers = {name: a.optimizer.as_torch(self.vectors(name)) for name, a in self.adapters.items()}
        self.teacher = {"two": 0.5 * torch.randn(7, 3, generator=self.generator).double()}
        self.active, self.autocast = [first], False
        self.events = [event for event in EVENTS if with_autocast or event != "autocast"]
        self.done: Counter = Counter()
        self.largest_deviation = 0.0

    def vectors(self, name: str) -> list[nn.Parameter]:
        """The v of an adapter, one for each group, in order."""
        return [self.model.tinylora_v[name][group] for group in sorted(self.model.tinylora_v[name], key=int)]

    def train(self, steps: int) -> None:
        """`steps` steps with an event every `PERIOD`."""
        for step in range(1, steps + 1):
            self.step()
            if step % PERIOD == 0:
                self.measure()
                event = self.draw.choice(self.events)
                getattr(self, f"do_{event}")()
                self.done[event] += 1
        self.measure()
        self.check_base()

    def step(self) -> None:
        """The same step of the model and of the simulation."""
        ids = torch.randint(0, TOKENS, (BATCH,), generator=self.generator)
        noise = 0.1 * torch.randn(BATCH, TOKENS, generator=self.generator)
        targets = self.simulation.outputs(ids, self.teacher) + noise
        targets = targets if self.kind == "float64" else targets.float()
        self.simulation.step(ids, targets.double(), self.active)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            outputs = self.model(ids)
        (outputs.to(targets.dtype) - targets).square().mean().backward()
        for name in self.active:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def measure(self) -> None:
        """Every v has its precision, and how far it is from the simulation's, relative to the largest entry there."""
        for name, adapter in self.adapters.items():
            v = torch.stack(self.vectors(name)).detach()
            assert v.dtype == (torch.float64 if self.kind == "float64" else torch.float32)
            if adapter.v.any():
                deviation = (v.double() - adapter.v).abs().max() / adapter.v.abs().max()
                self.largest_deviation = max(self.largest_deviation, deviation.item())

    def check_base(self) -> None:
        """No bit of the base model has changed."""
        now = bits_of_base(self.model)
        assert now.keys() == self.bits.keys()
        changed = [name for name, bits in self.bits.items() if not torch.equal(now[name], bits)]
        assert not changed

    def do_merge(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Merging lost")
            self.model.merge_adapter()
        self.model.unmerge_adapter()
        self.check_base()

    def do_save(self) -> None:
        self.model.save_pretrained(self.folder)
        saved = {name: torch.stack(self.vectors(name)).detach() for name in self.adapters}
        first, *others = self.adapters
        self.model = PeftModel.from_pretrained(
            make_base(self.kind), self.folder / first, adapter_name=first, is_trainable=True
        )
        for name in others:
            self.model.load_adapter(self.folder / name, name, is_trainable=True)
        for name, optimizer in self.optimizers.items():
            assert torch.equal(torch.stack(self.vectors(name)), saved[name])
            self.optimizers[name] = self.adapters[name].optimizer.as_torch(self.vectors(name))
            self.optimizers[name].load_state_dict(optimizer.state_dict())
        self.activate(self.active)
        self.check_base()

    def do_switch(self) -> None:
        names = self.draw.choice([["one"], ["two"], ["three"], ["one", "two"]])
        self.activate(names)

    def activate(self, names: list[str]) -> None:
        """Make these adapters the active ones, and the trained ones."""
        self.active = names
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(names)

    def do_disable(self) -> None:
        ids = torch.arange(TOKENS)
        with self.model.disable_adapter(), torch.no_grad():
            assert torch.equal(self.model(ids), self.bare(ids))

    def do_autocast(self) -> None:
        self.autocast = not self.autocast
