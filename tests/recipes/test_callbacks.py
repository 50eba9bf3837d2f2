"""callbacks.py: the CSV against logs made by hand, the picture against its own bytes."""

import csv
import math

import pytest
import torch
from PIL import Image
from transformers import TrainerControl, TrainerState

from trl_recipes.callbacks import (
    LOSS_COLUMNS,
    LOSS_PROGRESS,
    REWARD_COLUMNS,
    REWARD_PROGRESS,
    CurveCallback,
    ShortProgressCallback,
    draw_curve,
    moving_mean,
    read_rows,
)


class Model(torch.nn.Module):
    """Three trained numbers under the name that the tuner gives them, beside a frozen weight."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.tinylora_v = torch.nn.Parameter(torch.zeros(size))
        self.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)


def logs(reward: float) -> dict:
    return {
        "reward": reward,
        "reward_std": 0.5,
        "frac_reward_zero_std": 0.25,
        "grad_norm": 1.5,
        "completions/mean_length": 21.0,
        "learning_rate": 0.01,
        "entropy": 9.0,
    }


def start(callback, model, step: int = 0) -> TrainerState:
    state = TrainerState(global_step=step, max_steps=10, logging_steps=1, is_world_process_zero=True)
    callback.on_train_begin(None, state, TrainerControl(), model=model)
    return state


def log(callback, state, model, step: int, values: dict) -> None:
    state.global_step = step
    callback.on_log(None, state, TrainerControl(), model=model, logs=values)


def test_a_row_for_each_step_is_on_disk_while_training_goes_on(tmp_path):
    model, callback = Model(), CurveCallback(tmp_path / "run" / "reward_curve.csv", REWARD_COLUMNS)
    state = start(callback, model)
    with torch.no_grad():
        model.tinylora_v.copy_(torch.tensor([3.0, 0.0, -4.0]))
    log(callback, state, model, 1, logs(0.25))
    log(callback, state, model, 2, logs(0.5))
    rows = read_rows(callback.path)  # before on_train_end
    assert [row["step"] for row in rows] == ["1", "2"]
    assert [float(row["reward"]) for row in rows] == [0.25, 0.5]
    first = {name: float(value) for name, value in rows[0].items()}
    assert first == {
        "step": 1,
        "reward": 0.25,
        "reward_std": 0.5,
        "zero_std_groups": 0.25,
        "grad_norm": 1.5,
        "completion_tokens": 21,
        "learning_rate": 0.01,
        "v_norm": 5,
        "v_0": 3,
        "v_1": 0,
        "v_2": -4,
    }
    callback.on_train_end(None, state, TrainerControl())


def test_logs_without_a_reward_make_no_row(tmp_path):
    model, callback = Model(), CurveCallback(tmp_path / "c.csv", REWARD_COLUMNS)
    state = start(callback, model)
    log(callback, state, model, 10, {"train_runtime": 3.0})
    log(callback, state, model, 10, {"eval_reward": 0.5})
    assert read_rows(callback.path) == []


def test_sft_has_the_loss_in_place_of_the_reward(tmp_path, capsys):
    model, callback, progress = (
        Model(),
        CurveCallback(tmp_path / "c.csv", LOSS_COLUMNS),
        ShortProgressCallback(LOSS_PROGRESS),
    )
    values = {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 0.01, "mean_token_accuracy": 0.75, "entropy": 9.0}
    for one in (callback, progress):
        state = start(one, model)
        log(one, state, model, 1, values)
        log(one, state, model, 1, {"eval_loss": 2.0})
    [row] = read_rows(callback.path)
    assert list(row) == ["step", "loss", "token_accuracy", "grad_norm", "learning_rate", "v_norm", "v_0", "v_1", "v_2"]
    assert [float(value) for value in row.values()] == [1, 1.25, 0.75, 0.5, 0.01, 0, 0, 0, 0]
    assert capsys.readouterr().out.split() == "step 1/10 loss 1.250 right tokens 75%".split()


def test_a_long_vector_is_there_by_its_norm_only(tmp_path):
    model, callback = Model(33), CurveCallback(tmp_path / "c.csv", REWARD_COLUMNS)
    log(callback, start(callback, model), model, 1, logs(0.5))
    assert [name for name in read_rows(callback.path)[0] if name.startswith("v_")] == ["v_norm"]


def test_a_new_run_starts_anew_and_a_resumed_one_goes_on(tmp_path):
    model, path = Model(), tmp_path / "c.csv"
    callback = CurveCallback(path, REWARD_COLUMNS)
    state = start(callback, model)
    for step in range(1, 5):
        log(callback, state, model, step, logs(step / 10))
    resumed = CurveCallback(path, REWARD_COLUMNS)
    state = start(resumed, model, step=2)
    log(resumed, state, model, 3, logs(0.9))
    assert [(row["step"], float(row["reward"])) for row in read_rows(path)] == [("1", 0.1), ("2", 0.2), ("3", 0.9)]
    start(CurveCallback(path, REWARD_COLUMNS), model)
    assert read_rows(path) == []


def test_a_row_that_a_kill_cut_short_is_not_kept(tmp_path):
    model, path = Model(), tmp_path / "c.csv"
    callback = CurveCallback(path, REWARD_COLUMNS)
    state = start(callback, model)
    for step in range(1, 12):
        log(callback, state, model, step, logs(step / 100))
    text = path.read_text()
    whole_rows = text.rindex("\n11,") + 1
    path.write_text(text[: whole_rows + 1])  # of the row of step 11, "1" is left
    start(CurveCallback(path, REWARD_COLUMNS), model, step=10)
    assert path.read_bytes() == text[:whole_rows].encode().replace(b"\n", b"\r\n")


def test_a_kill_while_the_rows_to_keep_are_written_loses_none(tmp_path, monkeypatch):
    model, path = Model(), tmp_path / "c.csv"
    callback = CurveCallback(path, REWARD_COLUMNS)
    log(callback, start(callback, model), model, 1, logs(0.5))
    before = path.read_text()
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(CurveCallback(path, REWARD_COLUMNS), model, step=1)
    assert path.read_text() == before


def test_the_summary_at_the_end_makes_no_row(tmp_path):
    """A run that is resumed after its last step logs it a second time."""
    model, callback = Model(), CurveCallback(tmp_path / "c.csv", REWARD_COLUMNS)
    log(callback, start(callback, model), model, 10, logs(0.5) | {"train_runtime": 3.0})
    assert read_rows(callback.path) == []


def test_only_the_main_process_writes(tmp_path):
    callback = CurveCallback(tmp_path / "c.csv", REWARD_COLUMNS)
    state = TrainerState(global_step=0, is_world_process_zero=False)
    callback.on_train_begin(None, state, TrainerControl(), model=Model())
    log(callback, state, Model(), 1, logs(0.5))
    callback.on_train_end(None, state, TrainerControl())
    assert not callback.path.exists()


def test_a_moving_mean_is_over_a_value_and_those_before_it():
    assert moving_mean([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]
    assert moving_mean([1.0, 2.0, 3.0], 10) == [1.0, 1.5, 2.0]
    assert moving_mean([], 3) == []


@pytest.mark.parametrize("steps", [0, 1, 25])
def test_the_picture_is_drawn_from_any_number_of_rows(tmp_path, steps):
    model, callback = Model(), CurveCallback(tmp_path / "c.csv", REWARD_COLUMNS)
    state = start(callback, model)
    for step in range(1, steps + 1):
        log(callback, state, model, step, logs(1 - math.exp(-step / 10)))
    png = tmp_path / "c.png"
    marks = {(214, 39, 40), (44, 160, 44)}  # of before and after, matplotlib's red and green
    before, after = {"greedy": 0.4, "sampled": 0.3}, {"greedy": 0.9, "sampled": 0.6}
    for is_share in (True, False):
        draw_curve(callback.path, png, "a run", "reward", before, after, is_share=is_share)
        assert marks <= colours_of(png)
    draw_curve(callback.path, png, "a run", "reward", None, None, is_share=False)
    assert not marks & colours_of(png)


def colours_of(png) -> set[tuple[int, int, int]]:
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        return {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}


def test_progress_is_one_short_line_for_each_tenth(capsys):
    callback, model = ShortProgressCallback(REWARD_PROGRESS), Model()
    state = start(callback, model)
    for step in range(1, 11):
        log(callback, state, model, step, logs(step / 10))
    log(callback, state, model, 10, {"train_runtime": 3.0})
    callback.on_train_end(None, state, TrainerControl())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[4].split() == "step 5/10 reward 0.500 equal groups 25% tokens 21".split()
    assert all(len(line) < 80 for line in lines)
