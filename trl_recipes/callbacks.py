"""Progress while a recipe trains: a short line in the terminal, a CSV row per logged step, and the curve as a PNG.

Enters: what the trainer logs. Leaves: `reward_curve.csv` or `loss_curve.csv`, flushed at every row so that it can be
watched (and survives Ctrl-C), and the same as PNG, drawn at the end from the CSV alone.

A row's reward or loss is that of the v before the step; its v is the one after it.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_recipes.trainer_setup import trained_numbers


# CSV column -> what TRL calls it in its logs. The first is what the curve shows; logs without it make no row.
REWARD_COLUMNS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "zero_std_groups": "frac_reward_zero_std",  # share of groups whose rewards are all equal: these teach nothing
    "grad_norm": "grad_norm",
    "completion_tokens": "completions/mean_length",
    "learning_rate": "learning_rate",
}
LOSS_COLUMNS = {
    "loss": "loss",
    "token_accuracy": "mean_token_accuracy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
# What the terminal shows: name -> (what TRL calls it, format). The first is beside the progress bar too.
REWARD_PROGRESS = {
    "reward": ("reward", ".3f"),
    "equal groups": ("frac_reward_zero_std", ".0%"),
    "tokens": ("completions/mean_length", ".0f"),
}
LOSS_PROGRESS = {"loss": ("loss", ".3f"), "right tokens": ("mean_token_accuracy", ".0%")}
MOST_VALUES = 32  # of v in a row; a longer v is there by its norm only
MOVING_MEAN_ROWS = 10


class CurveCallback(TrainerCallback):
    """
    Writes a CSV row for each step that the trainer logs.

    Columns of GRPO: step, reward (mean), reward_std, zero_std_groups (share, 0 to 1), grad_norm (before clipping),
    completion_tokens (mean), learning_rate, v_norm, and v_0, v_1, ... where v has at most 32 numbers. Of SFT: step,
    loss (mean over tokens, in nats), token_accuracy (share, 0 to 1), grad_norm, learning_rate, and the same of v.
    Baselines have no v, and none of its columns.

    Args:
        path (`Path`):
            The CSV file. A new run replaces it; a resumed one keeps the rows up to the step it resumes from.
        columns (`dict[str, str]`):
            `REWARD_COLUMNS` or `LOSS_COLUMNS`.
    """

    def __init__(self, path: Path, columns: dict[str, str]):
        self.path = Path(path)
        self.columns = columns
        self.main = next(iter(columns.values()))
        self.file: TextIO | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        size = trained_numbers(kwargs["model"]).numel()  # on every process: they may have to put v together
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.exists():
            rows = [row for row in read_rows(self.path) if None not in row.values()]  # but one that was cut short
            kept = [row for row in rows if int(row["step"]) <= state.global_step]
        values = [f"v_{i}" for i in range(size)] if size <= MOST_VALUES else []
        norm = ["v_norm"] if size else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not in place: a run that is killed here must not lose the rows that it would have kept.
        temporary = self.path.with_name(f".{self.path.name}")
        self.file = file = temporary.open("w", newline="")
        self.writer = csv.DictWriter(file, ["step", *self.columns, *norm, *values])
        self.writer.writeheader()
        self.writer.writerows(kept)
        file.flush()
        os.replace(temporary, self.path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        logs = kwargs["logs"]
        # No row for the summary at the end, which a run that is resumed after its last step logs again, and evaluations.
        if self.main not in logs or "train_runtime" in logs:
            return
        v = trained_numbers(kwargs["model"])
        if self.file is None:
            return
        row = {"step": state.global_step} | {column: logs.get(key) for column, key in self.columns.items()}
        if v.numel():
            row["v_norm"] = v.norm().item()
        if v.numel() <= MOST_VALUES:
            row |= {f"v_{i}": value for i, value in enumerate(v.tolist())}
        self.writer.writerow(row)
        self.file.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.file is not None:
            self.file.close()
            self.file = None


class ShortProgressCallback(ProgressCallback):
    """
    transformers' progress bar with the reward or loss beside it, and one short line for every tenth of the run.

    Trainer's own callback writes each log, some twenty metrics, as a line.

    Args:
        shown (`dict[str, tuple[str, str]]`):
            `REWARD_PROGRESS` or `LOSS_PROGRESS`.
    """

    def __init__(self, shown: dict[str, tuple[str, str]]):
        super().__init__()
        self.shown = shown

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs,
    ):
        logs = logs or {}
        main, (key, _) = next(iter(self.shown.items()))
        if self.training_bar is None or key not in logs:
            return
        self.training_bar.set_postfix_str(f"{main} {logs[key]:.2f}", refresh=False)
        every = max(1, state.max_steps // 10)
        if state.global_step % every < state.logging_steps or state.global_step == state.max_steps:
            values = [f"{name} {logs[key]:{form}}" for name, (key, form) in self.shown.items()]
            self.training_bar.write(f"step {state.global_step:>5}/{state.max_steps}  " + "  ".join(values))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads a curve's CSV: one dict of strings a row."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def moving_mean(values: list[float], width: int) -> list[float]:
    """Returns the mean of each value with the up to `width - 1` before it; as many values as went in."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curve(
    csv_path: Path,
    png_path: Path,
    title: str,
    column: str,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    *,
    is_share: bool,
) -> None:
    """
    Draws a column against the step, with its moving mean and the held-out accuracies before and after.

    Args:
        csv_path (`Path`):
            What [`CurveCallback`] wrote.
        png_path (`Path`):
            Where the picture goes.
        title (`str`):
            One line above it.
        column (`str`):
            "reward" or "loss".
        before (`dict[str, float]`, *optional*):
            Held-out accuracy before training (0 to 1) by name: `{"greedy": 0.4, "sampled": 0.3}`. None: not measured.
        after (`dict[str, float]`, *optional*):
            The same after training.
        is_share (`bool`):
            Whether the column is a share of correct answers itself (the exact-match reward), so that the accuracies
            belong on its axis. Else they get one of their own, on the right.
    """
    # Not pyplot, which would pick a display: drawn on a canvas in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(csv_path) if row[column]]
    steps = [int(row["step"]) for row in rows]
    values = [float(row[column]) for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, label=f"{column} of the step's samples")
    axes.plot(
        steps, moving_mean(values, MOVING_MEAN_ROWS), color="tab:blue", label=f"mean of the last {MOVING_MEAN_ROWS}"
    )
    axes.set(xlabel="step", ylabel=column, title=title)
    axes.grid(alpha=0.3)
    shares = {"ylabel": "share correct", "ylim": (0, 1.08)}
    if is_share:
        axes.set(**shares)
    if before is not None and after is not None:
        share_axes = axes if is_share else axes.twinx()
        share_axes.set(**shares)
        last = steps[-1] if steps else 1
        # Greedy above its dots, sampled below: the two may be close.
        for name, colour, above in zip(before, ("tab:red", "tab:green"), (8, -16), strict=False):
            share_axes.plot(
                [0, last], [before[name], after[name]], "o", color=colour, clip_on=False, label=f"held out, {name}"
            )
            for step, value, side in [(0, before[name], "left"), (last, after[name], "right")]:
                share_axes.annotate(
                    f"{value:.1%}", (step, value), (0, above), textcoords="offset points", ha=side, color=colour
                )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    temporary = png_path.with_name(f".{png_path.name}")  # not in place: it says that the run is finished
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, png_path)
