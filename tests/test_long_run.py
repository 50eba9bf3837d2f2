"""Thousands of steps beside a float64 simulation: v stays near it, and the base model as it was, to the bit.

The tolerances are about five times what 5,000 steps measured; docs/numbers.md has the figures.
"""

from pathlib import Path

import pytest
import torch
from long_run import EVENTS, LongRun, bits_of_base, config_of, make_base
from peft import get_peft_model
from simulation import TOKENS, Adapter, Optimizer, Simulation


# Kind of base, whether autocast goes on and off, and how far v may be from the simulation's, relative to its largest entry.
RUNS = [
    pytest.param("float64", False, 2e-12, id="float64"),
    pytest.param("float32", False, 5e-5, id="float32"),
    pytest.param("nf4", False, 5e-5, id="4-bit"),
    pytest.param("float32", True, 0.04, id="float32-autocast"),
    pytest.param("bfloat16", False, 0.04, id="bfloat16"),
]


@pytest.mark.parametrize(
    "steps", [pytest.param(300, id="short"), pytest.param(5000, marks=pytest.mark.slow, id="long")]
)
@pytest.mark.parametrize(("kind", "with_autocast", "tolerance"), RUNS)
def test_v_is_that_of_the_simulation_and_the_base_keeps_its_bits(
    kind: str, with_autocast: bool, tolerance: float, steps: int, tmp_path: Path
) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    run = LongRun(kind, with_autocast, tmp_path)
    run.train(steps)
    print(f"{kind}, autocast {with_autocast}, {steps} steps: {run.largest_deviation:.2g}, events {dict(run.done)}")
    assert set(run.done) == set(run.events) or steps < 1000
    assert sum(run.done.values()) == steps // 20
    assert all(adapter.v.abs().max() > 0.01 for adapter in run.adapters.values())  # it did train
    assert run.largest_deviation < tolerance


def test_every_event_has_a_method() -> None:
    assert all(callable(getattr(LongRun, f"do_{event}")) for event in EVENTS)


def test_steps_that_bfloat16_would_round_away_add_up_under_autocast() -> None:
    """200 steps of 1e-5 on a v of 0.5, where the next number of bfloat16 is 0.002 away."""
    adapter = Adapter(2, 2, "left", 1, "full", None, (0,) * 7, Optimizer("sgd", 1e-6, momentum=0.0))
    start = torch.full((1, 2), 0.5, dtype=torch.float64)
    base = make_base("float32")
    exact, rounded = (Simulation(base, {"only": Adapter(**vars(adapter) | {"v": start})}) for _ in range(2))
    model = get_peft_model(base, config_of(adapter), adapter_name="only")
    v = model.tinylora_v["only"]["0"]
    v.data.fill_(0.5)
    generator = torch.Generator().manual_seed(0)
    targets = 3 * torch.randn(TOKENS, TOKENS, generator=generator)
    ids = torch.arange(TOKENS)
    exact.step(ids, targets.double(), ["only"])
    lr = 1e-5 / (exact.adapters["only"].v - start).abs().max().item() * adapter.optimizer.lr
    exact.adapters["only"].v = start
    for simulation in (exact, rounded):
        simulation.adapters["only"].optimizer = Optimizer("sgd", lr, momentum=0.0)
    optimizer = torch.optim.SGD([v], lr)
    for _ in range(200):
        exact.step(ids, targets.double(), ["only"])
        rounded.step(ids, targets.double(), ["only"])
        rounded.adapters["only"].v = rounded.adapters["only"].v.bfloat16().double()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(ids)
        (outputs.float() - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = exact.adapters["only"].v - start
    assert torch.equal(rounded.adapters["only"].v, start)  # what is tested for would be seen
    assert moved.abs().max() > 1e-3
    deviation = ((v.detach().double() - start - moved).abs().max() / moved.abs().max()).item()
    assert v.dtype == torch.float32 and deviation < 0.02


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
@pytest.mark.filterwarnings("ignore:Merging lost", "ignore:Already following adapters")
def test_a_thousand_merges_leave_the_bits(kind: str, times: int, tmp_path: Path) -> None:
    """One adapter, several, one upon another, a refused one, and with stochastic rounding."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    run = LongRun(kind, with_autocast=False, folder=tmp_path)
    model, generator = run.model, torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    ids = torch.arange(TOKENS)
    changed = 0
    for count in range(times):
        for name in run.adapters:
            for v in run.vectors(name):
                v.data.normal_(0, 10.0 ** (count % 7 - 3), generator=generator)
        names = [["one"], ["two", "three"], ["one", "two", "three"]][count % 3]
        model.merge_adapter(names, stochastic_rounding_seed=count if kind == "bfloat16" and count % 2 else None)
        unmerged = [name for name in run.adapters if name not in names]
        if unmerged and count % 5 == 0:
            model.merge_adapter(unmerged[:1])
        elif unmerged and count % 7 == 0:
            run.vectors(unmerged[-1])[0].data.fill_(torch.nan)
            with pytest.raises(ValueError, match="NaNs detected"):
                model.merge_adapter(unmerged, safe_merge=True)
        changed += not torch.equal(bits_of_base(model)["conv.weight"], run.bits["conv.weight"])
        model.unmerge_adapter()
        run.check_base()
    assert changed == times
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids), run.bare(ids))
