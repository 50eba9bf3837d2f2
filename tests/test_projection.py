"""P: the same numbers everywhere, N(0, 1/r), independent between modules and seeds."""

import torch

from peft_tinylora.projection import draw_projection, seed_of_module


def test_numbers_are_the_same_on_every_machine() -> None:
    # Written down once; an adapter without its P would change its function if these moved.
    seed = seed_of_module(42, "model.layers.0.self_attn.q_proj")
    assert seed == 2821272633290627465
    P = draw_projection(u=1, r=2, seed=seed)
    expected = torch.tensor([[[0.44036078453063965, 0.4948955476284027], [-0.48534950613975525, 0.12572187185287476]]])
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-6)


def test_variance_is_one_over_r() -> None:
    for r in (1, 2, 8):
        P = draw_projection(u=40_000 // r**2, r=r, seed=1)
        assert abs(P.mean().item()) < 0.02
        assert abs(P.var().item() * r - 1) < 0.03


def test_drawing_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    draw_projection(4, 2, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_neighbouring_seeds_and_modules_are_independent() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(30)]
    draws = [draw_projection(1, 2, seed_of_module(seed, name)) for seed in range(5) for name in names]
    flat = torch.stack(draws).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == len(draws)
    correlation = torch.corrcoef(flat.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.3
