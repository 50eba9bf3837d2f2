"""Progress while a recipe trains: a short line in the terminal, a CSV row per logged step, and the curve as a PNG.

Enters: what the trainer logs. Leaves: `reward_curve.csv`, flushed at every row so that it can be watched (and survives
Ctrl-C), and `reward_curve.png`, drawn at the end from the CSV alone.

A row's reward was earned by the v before the step; its v is the one after it.
"""

import csv
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_recipes.trainer_setup import trained_numbers


# CSV column -> what TRL calls it in its logs
COLUMNS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "zero_std_groups": "frac_reward_zero_std",  # share of groups whose rewards are all equal: these teach nothing
    "grad_norm": "grad_norm",
    "completion_tokens": "completions/mean_length",
    "learning_rate": "learning_rate",
}
MOST_VALUES = 32  # of v in a row; a longer v is there by its norm only
MOVING_MEAN_ROWS = 10


class RewardCurveCallback(TrainerCallback):
    """
    Writes a CSV row for each step that the trainer logs.

    Columns: step, reward (mean), reward_std, zero_std_groups (share, 0 to 1), grad_norm (before clipping),
    completion_tokens (mean), learning_rate, v_norm, and v_0, v_1, ... where v has at most 32 numbers.

    Args:
        path (`Path`):
            The CSV file. A new run replaces it; a resumed one keeps the rows up to the step it resumes from.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.file = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.exists():
            kept = [row for row in read_rows(self.path) if int(row["step"]) <= state.global_step]
        size = trained_numbers(kwargs["model"]).numel()
        values = [f"v_{i}" for i in range(size)] if size <= MOST_VALUES else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ["step", *COLUMNS, "v_norm", *values])
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.file.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        logs = kwargs["logs"]
        if self.file is None or "reward" not in logs:  # the summary at the end has none
            return
        v = trained_numbers(kwargs["model"])
        row = {"step": state.global_step, "v_norm": v.norm().item()}
        row |= {column: logs.get(key) for column, key in COLUMNS.items()}
        if v.numel() <= MOST_VALUES:
            row |= {f"v_{i}": value for i, value in enumerate(v.tolist())}
        self.writer.writerow(row)
        self.file.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.file is not None:
            self.file.close()
            self.file = None


class ShortProgressCallback(ProgressCallback):
    """transformers' progress bar with the reward beside it, and one short line for every tenth of the run.

    Trainer's own callback writes each log, some twenty metrics, as a line.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        logs = kwargs["logs"]
        if self.training_bar is None or "reward" not in logs:
            return
        self.training_bar.set_postfix_str(f"reward {logs['reward']:.2f}", refresh=False)
        every = max(1, state.max_steps // 10)
        if state.global_step % every < state.logging_steps or state.global_step == state.max_steps:
            self.training_bar.write(
                f"step {state.global_step:>5}/{state.max_steps}  reward {logs['reward']:.3f}  "
                f"equal groups {logs['frac_reward_zero_std']:.0%}  tokens {logs['completions/mean_length']:.0f}"
            )


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads a reward curve's CSV: one dict of strings a row."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def moving_mean(values: list[float], width: int) -> list[float]:
    """Returns the mean of each value with the up to `width - 1` before it; as many values as went in."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_reward_curve(
    csv_path: Path, png_path: Path, title: str, before: dict[str, float], after: dict[str, float]
) -> None:
    """
    Draws reward against step, with its moving mean and the held-out accuracies before and after.

    Args:
        csv_path (`Path`):
            What [`RewardCurveCallback`] wrote.
        png_path (`Path`):
            Where the picture goes.
        title (`str`):
            One line above it.
        before (`dict[str, float]`):
            Held-out accuracy before training (0 to 1) by name: `{"greedy": 0.4, "sampled": 0.3}`.
        after (`dict[str, float]`):
            The same after training.
    """
    # Not pyplot, which would pick a display: drawn on a canvas in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(csv_path) if row["reward"]]
    steps = [int(row["step"]) for row in rows]
    rewards = [float(row["reward"]) for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, rewards, color="tab:blue", alpha=0.3, label="reward of the step's samples")
    axes.plot(
        steps, moving_mean(rewards, MOVING_MEAN_ROWS), color="tab:blue", label=f"mean of the last {MOVING_MEAN_ROWS}"
    )
    last = steps[-1] if steps else 1
    # Greedy above its dots, sampled below: the two may be close.
    for name, colour, above in zip(before, ("tab:red", "tab:green"), (8, -16), strict=True):
        axes.plot([0, last], [before[name], after[name]], "o", color=colour, clip_on=False, label=f"held out, {name}")
        for step, value, side in [(0, before[name], "left"), (last, after[name], "right")]:
            axes.annotate(f"{value:.1%}", (step, value), (0, above), textcoords="offset points", ha=side, color=colour)
    axes.set(xlabel="step", ylabel="share correct", ylim=(0, 1.08), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    FigureCanvasAgg(figure).print_png(png_path)
