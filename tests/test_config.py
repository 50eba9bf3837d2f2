"""What a config accepts, what it refuses, and what it writes."""

import copy
import dataclasses
import json
from pathlib import Path

import peft
import pytest

from peft_tinylora import ConfigError, TinyLoraConfig
from peft_tinylora.config import conventions_of


def test_the_papers_config() -> None:
    config = TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=16, target_modules="all-linear")
    assert conventions_of(config) == ("tiled", 16, "left", True)


def test_peft_fields_only_means_peft_conventions() -> None:
    for config in (TinyLoraConfig(u=4, weight_tying=0.5), peft.TinyLoraConfig(u=4, weight_tying=0.5)):
        assert conventions_of(config) == (None, None, "split", False)


@pytest.mark.parametrize(("weight_tying", "tie"), [(0.0, "none"), (1.0, "full")])
def test_a_field_of_ours_translates_weight_tying(weight_tying: float, tie: str) -> None:
    config = TinyLoraConfig(weight_tying=weight_tying, sigma="split")
    assert conventions_of(config) == (tie, None, "split", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie": "tile"}, r"tie='tile': allowed are 'none', 'full', 'tiled', 'structured', or a mapping"),
        ({"tie": 3}, r"tie=3: allowed are"),
        ({"tie": {}}, r"tie=\{\}: a mapping needs group names"),
        ({"tie": {"a": 1}}, r"a mapping needs group names with a pattern each"),
        ({"tie": "tiled"}, r"tie='tiled' needs `n_tie`"),
        ({"tie": "structured"}, r"tie='structured' needs `n_tie`"),
        ({"tie": "tiled", "n_tie": 0}, r"`n_tie` should be a positive integer value but the value passed is 0"),
        ({"tie": "tiled", "n_tie": -4}, r"`n_tie`.*-4"),
        ({"tie": "tiled", "n_tie": 2.0}, r"`n_tie`.*2\.0"),
        ({"tie": "tiled", "n_tie": True}, r"`n_tie`.*True"),
        ({"tie": "full", "n_tie": 4}, r"tie='full' takes no `n_tie`; got 4"),
        ({"n_tie": 4}, r"tie='none' takes no `n_tie`; got 4"),
        ({"tie": "full", "weight_tying": 0.5}, r"weight_tying=0\.5 and tie='full' both say"),
        ({"sigma": "right"}, r"sigma='right': allowed are 'left' \(paper\) and 'split' \(PEFT\)"),
        ({"sigma": "left", "weight_tying": 0.5}, r"weight_tying=0\.5 cannot be combined"),
        ({"r": 0}, r"`r` should be a positive integer value but the value passed is 0"),
        ({"r": 2.0}, r"`r`.*2\.0"),
        ({"u": 0}, r"`u` should be a positive integer value but the value passed is 0"),
        ({"u": 1.5}, r"`u`.*1\.5"),
        ({"projection_seed": None}, r"projection_seed=None: must be an integer"),
        ({"weight_tying": "full"}, r"weight_tying.*'full'"),
        ({"weight_tying": None}, r"weight_tying.*None"),
        ({"weight_tying": True}, r"weight_tying.*True"),
        ({"weight_tying": float("nan")}, r"weight_tying.*nan"),
        ({"weight_tying": -1.0}, r"weight_tying.*-1\.0"),
        ({"init_weights": "bogus"}, r"init_weights='bogus': allowed are"),
        ({"init_v_bound": -1}, r"init_v_bound=-1: must be a finite number, 0 or more"),
        ({"basis_repo": "../up"}, r"basis_repo='\.\./up': must be the id of a repository on the Hub"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [1], "tie": "full"},
            r"target_modules='all-linear' with layers_to_transform=\[1\]: name the modules in a list",
        ),
    ],
)
def test_bad_value_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyLoraConfig(**fields)
    with pytest.raises(ValueError):  # also the standard error
        TinyLoraConfig(**fields)


def test_a_config_of_peft_fields_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    ours, theirs = TinyLoraConfig(u=4, r=3), peft.TinyLoraConfig(u=4, r=3)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"tie": "tiled", "n_tie": 16, "u": 1},
        {"tie": {"a": ".*attn.*", "b": ".*mlp.*"}, "n_tie": 3, "sigma": "split"},
        {"weight_tying": 1.0, "exclude_modules": ["lm_head"]},
        {"u": 4, "weight_tying": 0.25},
    ],
)
def test_round_trip_through_the_file(tmp_path: Path, fields: dict) -> None:
    config = TinyLoraConfig(target_modules=["q_proj"], **fields)
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is TinyLoraConfig
    assert conventions_of(loaded) == conventions_of(config)
    assert loaded.exclude_modules == config.exclude_modules or set(loaded.exclude_modules) == config.exclude_modules


def test_copies_of_a_config_are_not_taken_for_files(tmp_path: Path) -> None:
    config = TinyLoraConfig(tie="tiled", n_tie=4)
    config.save_pretrained(tmp_path)
    assert TinyLoraConfig.from_pretrained(tmp_path).is_from_file
    for twin in (dataclasses.replace(config), copy.deepcopy(config), TinyLoraConfig(**config.to_dict())):
        assert not twin.is_from_file
        assert conventions_of(twin) == conventions_of(config)
