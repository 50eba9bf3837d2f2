"""Sweep files: what they mean, and that a mistake in one is named."""

from pathlib import Path

import pytest
import yaml

from trl_recipes.arguments import RecipeError
from trl_recipes.sweep_file import load_sweep


CONFIG = {"model_name_or_path": "m", "learning_rate": 0.5, "output_dir": "elsewhere", "max_steps": 9}
PLAIN = {"reproduces": "a figure", "recipe": "grpo", "config": "config.yaml", "seeds": [0, 1], "points": {"a": {}}}


@pytest.fixture
def write(tmp_path):
    def write(values: dict | str, name: str = "sweep.yaml") -> Path:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


def load(path: Path):
    return load_sweep(path, path.parent)


def test_every_rate_runs_with_every_seed_as_in_the_paper(write) -> None:
    sweep = load(write(PLAIN | {"learning_rates": [0.1, 0.2], "points": {"a": {"u": 1}, "b": {"u": 2}}}))
    runs = sweep.first_runs()
    assert {(run.point, run.learning_rate, run.seed) for run in runs} == {
        (point, rate, seed) for point in "ab" for rate in (0.1, 0.2) for seed in (0, 1)
    }
    assert {run.stage for run in runs} == {"measure"} and sweep.last_runs({"a": 0.1, "b": 0.1}) == []
    assert len({run.folder for run in runs}) == len(runs)
    first = next(run for run in runs if (run.point, run.learning_rate, run.seed) == ("b", 0.2, 1))
    assert first.options == {"model_name_or_path": "m", "max_steps": 9, "u": 2, "learning_rate": 0.2, "seed": 1}


def test_without_rates_that_of_the_config_is_used(write) -> None:
    [run] = load(write(PLAIN | {"seeds": [3]})).first_runs()
    assert run.options["learning_rate"] == 0.5 and run.learning_rate is None and run.options["seed"] == 3


def test_rates_are_chosen_on_other_problems_and_only_the_chosen_one_is_measured(write) -> None:
    choose = {"seeds": [7], "options": {"eval_dataset_name": "tuning"}}
    sweep = load(write(PLAIN | {"learning_rates": [0.1, 0.2], "choose": choose}))
    first = sweep.first_runs()
    assert [(run.stage, run.learning_rate, run.seed, run.options["eval_dataset_name"]) for run in first] == [
        ("choose", 0.1, 7, "tuning"),
        ("choose", 0.2, 7, "tuning"),
    ]
    last = sweep.last_runs({"a": 0.2})
    assert [(run.stage, run.options["learning_rate"], run.seed) for run in last] == [
        ("measure", 0.2, 0),
        ("measure", 0.2, 1),
    ]
    assert all("eval_dataset_name" not in run.options for run in last)


def test_a_point_may_have_rates_of_its_own(write) -> None:
    points = {"a": {}, "b": {"learning_rates": [1.5], "u": 3}}
    runs = load(write(PLAIN | {"seeds": [0], "learning_rates": [0.1], "points": points})).first_runs()
    assert [(run.point, run.learning_rate) for run in runs] == [("a", 0.1), ("b", 1.5)]
    assert "learning_rates" not in runs[1].options and runs[1].options["u"] == 3


def test_a_seed_sets_all_the_options_that_are_named(write) -> None:
    runs = load(write(PLAIN | {"seeded": ["seed", "tinylora_projection_seed"]})).first_runs()
    assert [(run.options["seed"], run.options["tinylora_projection_seed"]) for run in runs] == [(0, 0), (1, 1)]


def test_a_grid_is_the_product_of_its_lists(write) -> None:
    values = {key: value for key, value in PLAIN.items() if key != "points"}
    sweep = load(write(values | {"grid": {"r": [1, 2], "u": [1, 4, 16]}}))
    assert len(sweep.points) == 6 and sweep.points["r=2,u=16"] == {"r": 2, "u": 16}


def test_a_file_extends_another_and_wins_option_by_option(write) -> None:
    write({"seeds": [1, 2, 3], "options": {"a": 1, "b": 1}, "learning_rates": [0.1], "grid": {"u": [1]}}, "base.yaml")
    write({"extends": "base.yaml", "options": {"b": 2, "c": 2}}, "middle.yaml")
    values = {key: value for key, value in PLAIN.items() if key != "seeds"}
    sweep = load(write(values | {"extends": "middle.yaml", "options": {"c": 3}}))
    assert sweep.seeds == [1, 2, 3] and list(sweep.points) == ["a"] and sweep.rates == {"a": [0.1]}
    assert {key: sweep.config[key] for key in "abc"} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "ppo"}, "recipe: 'ppo': allowed are grpo, sft"),
        ({"seeds": []}, "seeds is missing"),
        ({"seeds": 3}, "seeds: wants a list, and got 3"),
        ({"seeds": [0, 0]}, "seeds: 0 is there twice"),
        ({"point": {}}, "unknown key 'point'"),
        ({"points": {}}, "points: wants a mapping"),
        ({"points": {"a": 3}}, "points: 'a': wants a mapping of options, and got 3"),
        ({"points": {13: {}}}, "points: 13 becomes a folder's name"),
        ({"points": {"../a": {}}}, "becomes a folder's name"),
        ({"points": {"..": {}}}, "becomes a folder's name"),
        ({"grid": {"u": [1]}}, "points or grid, one of them"),
        ({"learning_rates": ["1e-4"]}, "'1e-4' is no positive number"),
        ({"learning_rates": [-1.0]}, "-1.0 is no positive number"),
        ({"choose": {"options": {}}}, "choose: wants seeds"),
        ({"reported": {"b": 0.5}}, "reported: 'b' is no point: a"),
        ({"config": "no.yaml"}, "no file .*no.yaml"),
        ({"extends": "sweep.yaml"}, "extends itself"),
        ({"extends": "nothing.yaml"}, "no file .*nothing.yaml"),
    ],
)
def test_a_mistake_in_a_sweep_file_is_refused_by_its_key(write, values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(PLAIN | values))


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "holds list"), ("", "holds NoneType"), ("a: [", "no valid|not valid")]
)
def test_a_file_that_is_no_mapping_is_refused(write, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(text))
