"""Seed and module -> the frozen projections P, of shape (u, r, r), the same numbers on every machine.

R = sum_i v_i P_i (paper, section 4). The paper leaves the distribution of P open; PEFT draws N(0, 1/r) and so does
this package. Drawn on the CPU with a generator of its own, so neither the device nor the global state matters.
"""

import hashlib

import torch


def draw_projection(u: int, r: int, seed: int) -> torch.Tensor:
    """P for one module.

    Args:
        u (`int`): how many numbers are trained in a group.
        r (`int`): rank of the frozen basis.
        seed (`int`): from [`seed_of_target`].

    Returns:
        `torch.Tensor`: shape (u, r, r), float32, on the CPU; entries from N(0, 1/r).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, r**-0.5, size=(u, r, r), generator=generator)


def seed_of_target(projection_seed: int, name: str, index: int, from_paper: bool) -> int:
    """The seed of one matrix's P: by [`seed_of_module`], or as PEFT has it, by the place in model order."""
    return seed_of_module(projection_seed, name) if from_paper else projection_seed + index


def seed_of_module(projection_seed: int, module_name: str) -> int:
    """A seed for one module that depends on nothing but the two arguments.

    Neighbouring values of `projection_seed` give independent draws, and adding a target module changes no other
    module's P; with PEFT's seed + index neither holds.

    Args:
        projection_seed (`int`): the config's seed.
        module_name (`str`): name in the base model, such as "model.layers.0.self_attn.q_proj".

    Returns:
        `int`: in [0, 2**63).
    """
    digest = hashlib.sha256(f"{projection_seed}/{module_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
