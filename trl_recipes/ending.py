"""How a run ends that something else ends: SIGTERM, want of memory, a disk that is full or read-only.

In one line that says what to do, and with a whole checkpoint to go on from, where one was written.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_tinylora import TinyLoraError
from peft_tinylora.errors import first_line
from peft_tinylora.trouble import disk_trouble, is_out_of_memory
from trl_recipes.checkpoints import checkpoints_in, complaint
from trl_recipes.errors import RecipeError


STOPPED = 128 + signal.SIGTERM  # exit status, as shells give it
# What takes memory: those of them that a recipe has are named.
SIZES = ("max_completion_length", "max_length")


class StopWhenAsked(TrainerCallback):
    """
    Has a trainer stop after SIGTERM, which schedulers send some time before they kill: at the end of its step, with a
    checkpoint, also where none was due. A second SIGTERM ends the process at once, as one outside of training does.

    Attributes:
        has_stopped (`bool`): whether training ended because of it.
    """

    def __init__(self) -> None:
        self.has_stopped = self._is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a trainer trains. Only the main thread of Python may catch signals: in others nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.has_stopped = self._is_asked = False
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: object) -> None:
        self._is_asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._is_asked_anywhere(args):
            self.has_stopped = control.should_save = control.should_training_stop = True

    def _is_asked_anywhere(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self._is_asked
        # Each process may learn it in another step, and all must stop after the same.
        asked = torch.tensor(float(self._is_asked), device=args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


@contextmanager
def explained(training_args: TrainingArguments) -> Iterator[None]:
    """Turns the errors of too little memory, and of a full or read-only disk, into a [`RecipeError`]."""
    try:
        yield
    except (RecipeError, TinyLoraError):
        raise
    except Exception as error:
        trouble = disk_trouble(error, training_args.output_dir)
        if trouble is None and is_out_of_memory(error):
            trouble = f"out of memory ({first_line(error)}): {smaller(training_args)}"
        if trouble is None:
            raise
        raise RecipeError(f"{trouble}. {going_on(Path(training_args.output_dir))}") from error


def smaller(args: TrainingArguments) -> str:
    """What takes less memory, with the values now."""
    lengths = "".join(f", or {name}={value}" for name in SIZES if (value := getattr(args, name, None)) is not None)
    return (
        f"lower per_device_train_batch_size={args.per_device_train_batch_size} and raise gradient_accumulation_steps="
        f"{args.gradient_accumulation_steps} by as much, or set gradient_checkpointing: true, or lower score_batch_size "
        f"if it came while scoring{lengths}"
    )


def going_on(folder: Path) -> str:
    """How to go on from what a run's folder holds; by name, as "true" wants the settings that the run had."""
    whole = [checkpoint for checkpoint in checkpoints_in(folder) if complaint(checkpoint) is None]
    if not whole:
        return "There is no checkpoint yet: start again."
    return f"Then go on by resume_from_checkpoint={str(whole[-1])!r}."
