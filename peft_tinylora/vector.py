"""The trained vector v of a group: the only numbers that a TinyLoRA adapter learns.

v is made in fp32 (float64 on a float64 base) whatever the base's dtype, and stays so unless the user casts the whole
model, as with `model.to(torch.bfloat16)`: in bf16 an Adam step of 1e-4 on |v| = 0.03
rounds to nothing, and the paper finds fp32 the best even for the bytes it takes (section 6, figure 4).
"""

import torch
from torch import nn


def new_vector(u: int, init_weights: bool | str, init_v_bound: float, dtype: torch.dtype) -> nn.Parameter:
    """A new v.

    Args:
        u (`int`): length.
        init_weights (`bool` or `str`): `True` for zeros, so that a new adapter changes nothing; `"uniform"` or `False`
            for draws from [-init_v_bound, init_v_bound] with torch's global generator.
        init_v_bound (`float`): bound of the draws.
        dtype (`torch.dtype`): float32 or float64.

    Returns:
        `nn.Parameter`: shape (u,), on the CPU.
    """
    v = nn.Parameter(torch.zeros(u, dtype=dtype))
    if init_weights is not True:
        nn.init.uniform_(v, -init_v_bound, init_v_bound)
    return v
