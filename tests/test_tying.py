"""Groups: the paper's counts, and assignments worked out by hand."""

from collections import Counter

import pytest

from peft_tinylora.errors import TyingError
from peft_tinylora.tying import group_modules, group_modules_by_ratio


TYPES = [f"self_attn.{t}_proj" for t in "qkvo"] + [f"mlp.{t}_proj" for t in ("gate", "up", "down")]


def transformer(layers: int) -> list[str]:
    return [f"model.layers.{i}.{kind}" for i in range(layers) for kind in TYPES]


@pytest.mark.parametrize(
    ("layers", "u", "n_tie", "trained"),
    [
        # Table 2 of the paper, Qwen2.5-7B (28 layers) and Qwen2.5-3B (36 layers)
        (28, 1, 16, 13),
        (28, 1, 4, 49),
        (28, 1, 1, 196),
        (28, 2, 1, 392),
        (28, 32, 1, 6_272),
        (28, 512, 1, 100_352),
        (36, 1, 16, 16),
        (36, 1, 4, 63),
        (36, 1, 1, 252),
        (36, 2, 1, 504),
        (36, 32, 1, 8_064),
        (36, 512, 1, 129_024),
        # the embedded model
        (7, 1, 4, 13),
    ],
)
def test_tiled_gives_the_counts_of_the_paper(layers: int, u: int, n_tie: int, trained: int) -> None:
    groups = group_modules(transformer(layers), "tiled", n_tie)
    assert u * len(set(groups.values())) == trained


@pytest.mark.parametrize(("n_tie", "count"), [(32, 14), (16, 21), (8, 35), (4, 63), (2, 126), (1, 252)])
def test_structured_gives_the_counts_of_figure_4(n_tie: int, count: int) -> None:
    assert len(set(group_modules(transformer(36), "structured", n_tie).values())) == count


def test_tiled_shares_between_neighbours_whatever_their_type() -> None:
    names = transformer(2)
    assert list(group_modules(names, "tiled", 4).values()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_structured_shares_between_layers_of_one_type() -> None:
    groups = group_modules(transformer(5), "structured", 2)
    q = [groups[f"model.layers.{i}.self_attn.q_proj"] for i in range(5)]
    k = [groups[f"model.layers.{i}.self_attn.k_proj"] for i in range(5)]
    assert q == [0, 0, 7, 7, 14]
    assert k == [1, 1, 8, 8, 15]


def test_every_group_but_the_last_has_n_tie_modules() -> None:
    for count in range(1, 60):
        for n_tie in range(1, 20):
            sizes = Counter(group_modules([f"m.{i}" for i in range(count)], "tiled", n_tie).values())
            assert set(list(sizes.values())[:-1]) <= {n_tie}
            assert list(sizes) == list(range(-(-count // n_tie)))


def test_none_and_full() -> None:
    names = transformer(2)
    assert list(group_modules(names, "none", None).values()) == list(range(14))
    assert set(group_modules(names, "full", None).values()) == {0}


def test_mapping_keeps_attention_and_mlp_apart() -> None:
    tie = {"attention": r".*self_attn.*", "mlp": r".*\.mlp\..*"}
    groups = group_modules(transformer(3), tie, None)
    assert {groups[name] for name in groups if "self_attn" in name} == {0}
    assert {groups[name] for name in groups if "mlp" in name} == {1}
    runs = group_modules(transformer(3), tie, 4)
    assert Counter(runs.values()) == {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 1}
    assert list(dict.fromkeys(runs.values())) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        (
            {"attention": ".*self_attn.*"},
            r"target module 'model\.layers\.0\.mlp\.gate_proj' matches none of the groups",
        ),
        ({"all": ".*", "mlp": r".*mlp.*"}, r"matches \['all', 'mlp'\] of the groups"),
        ({"all": ".*", "vision": "vision.*"}, r"no target module matches the pattern of \['vision'\]"),
    ],
)
def test_mapping_that_does_not_fit_is_refused_by_name(tie: dict[str, str], message: str) -> None:
    with pytest.raises(TyingError, match=message):
        group_modules(transformer(1), tie, None)


@pytest.mark.parametrize(
    ("count", "ratio", "sizes"),
    [
        # measured on stock PEFT 0.21.2
        (10, 0.6, [2, 2, 2, 4]),
        (7, 0.5, [1, 1, 1, 4]),
        (28, 0.4, [1] * 16 + [12]),
        (196, 0.9, [9] * 19 + [25]),
        (196, 0.49, [1] * 99 + [97]),
        (196, 1.0, [196]),
    ],
)
def test_ratio_means_what_it_means_in_peft(count: int, ratio: float, sizes: list[int]) -> None:
    groups = group_modules_by_ratio([f"m.{i}" for i in range(count)], ratio)
    assert list(Counter(groups.values()).values()) == sizes
