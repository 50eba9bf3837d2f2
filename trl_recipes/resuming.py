"""A Trainer whose killed run, resumed, ends with the same numbers to the bit as one that was left alone.

What transformers 5.23 and TRL 1.16 leave out of a checkpoint, or get wrong when they go on from one, is here in one
place; tests/recipes/test_resume.py shows each with their own trainers:

- a checkpoint is written in place, file by file, and deleted so: see checkpoints.py
- GRPO's completions that are not used up yet (`steps_per_generation`, `num_iterations`), and how many batches it has seen
- GRPO's order of problems in the second epoch and later ones, which is that of the first after resuming
- sums of what was not logged yet (`logging_steps`)
- a run that was killed after its last step takes one more
"""

import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer, SFTTrainer

from peft_tinylora import TinyLoraError
from trl_recipes.checkpoints import UNFINISHED, choose, differences, publish, read_marker, rotate, tidy
from trl_recipes.ending import STOPPED, StopWhenAsked
from trl_recipes.errors import RecipeError


# Of Trainer's and of TRL's trainers, where they have them: what lives from step to step. Not public.
SUMS = ("_tr_loss", "_globalstep_last_logged", "_total_train_tokens")
# Beginnings of the names of training arguments that do not change what is trained.
IMMATERIAL = (
    *("output_dir", "run_name", "report_to", "project", "trackio", "logging_", "log_", "num_completions_to_print"),
    *("save_", "hub_", "push_to_hub", "resume_from_checkpoint", "disable_tqdm", "dataloader_", "vllm_server", "ddp_"),
)
# How GRPO's completions are split among steps: where one of these was changed, those in a checkpoint fit no more.
SPLITS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")


class ResumableTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose checkpoints are whole and hold all that it needs; TRL's get it as their first base.

    `_save_checkpoint` and `_get_output_dir` are not public; there is no other place between the last file of a checkpoint
    and the deletion of older ones, and TRL's trainers override the first too.
    """

    model: PreTrainedModel | PeftModel  # Trainer's own type allows none
    _metrics: dict[str, defaultdict[Any, list[Any]]]  # of TRL's trainers: what was not logged yet
    _saves_unfinished = False
    _resumes_from: Path | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.order = DataOrder()
        self.recipe_settings: dict[str, Any] = {}  # what the recipe was set to beside `args`; compared as they are
        self.add_callback(BetweenSteps(self))
        self._stop = StopWhenAsked()
        self.add_callback(self._stop)

    def checkpoint_to_resume(self) -> Path | None:
        """
        Finds the checkpoint that `resume_from_checkpoint` means, and says where it passes over one or finds none.

        Every process calls it, before training. It tidies up after a killed run, too.

        Returns:
            `Path`, *optional*: for [`train`]; `None` to start from the beginning.

        Raises:
            RecipeError: if the folder named is no whole checkpoint; if the checkpoint is that of another adapter or number
                of processes, or in a later pass over streamed data; if it is found by "true", and that of a run with other settings.
        """
        args = self.args
        if getattr(args, "enable_jit_checkpoint", False):
            raise RecipeError(
                "enable_jit_checkpoint: true: it saves in the middle of a step, from which a run cannot go on to the bit, "
                "and ends training as if it were finished: leave it out, and set save_steps."
            )
        folder = Path(cast(str, args.output_dir))
        if args.should_save:
            tidy(folder)
        self.accelerator.wait_for_everyone()
        checkpoint, lines = choose(args.resume_from_checkpoint, folder)
        for line in lines:
            self.accelerator.print(line)
        if checkpoint is None:
            return None
        marker = read_marker(checkpoint)
        self._check_adapter(checkpoint, marker)
        if not (checkpoint / self._between_steps_file()).exists():
            raise RecipeError(
                f"{checkpoint} was not written by {args.world_size} processes: start as many as there were."
            )
        if self._is_past_a_stream(checkpoint):
            raise RecipeError(
                f"{checkpoint} is in a later pass over streamed data, whose order Trainer does not find again: name one of the "
                "first pass, or start anew with streaming: false."
            )
        other = differences(marker["settings"], settings_of(self))
        if other is not None and str(args.resume_from_checkpoint).lower() == "true":
            raise RecipeError(
                f"{checkpoint} is that of another run: {other}. Set it back, choose another output_dir, or go on from it all "
                f"the same by resume_from_checkpoint={str(checkpoint)!r}."
            )
        if args.should_save and str(args.resume_from_checkpoint).lower() == "true":
            # A run that ended after its last checkpoint and before this has one too many.
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self._rotate(checkpoint, state.best_model_checkpoint)
        self.accelerator.print(f"resuming from {checkpoint}" + (f", another run's: {other}" if other else ""))
        return checkpoint

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer.train`], from what [`checkpoint_to_resume`] returned; SIGTERM: see ending.py."""
        checkpoint = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        self._resumes_from = None if checkpoint is None else Path(checkpoint)
        try:
            with self._stop.listening():
                result = super().train(checkpoint, *args, **kwargs)
        except TinyLoraError as error:  # another base, another quantization of it
            raise RecipeError(f"{checkpoint}: {error}" if checkpoint else str(error)) from error
        if self._stop.has_stopped:
            self.accelerator.print(
                f"stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}, which is saved: go on by "
                "resume_from_checkpoint: true",
                flush=True,
            )
            sys.exit(STOPPED)
        return result

    def restore(self) -> None:
        """Gets back what was held at the checkpoint that [`train`] goes on from; [`BetweenSteps`] calls it."""
        if self._resumes_from is not None:
            self._restore_between_steps(self._load_between_steps(self._resumes_from))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As Trainer's; nothing after the last step."""
        # A checkpoint of the last step has nothing to go on with, and Trainer looks for the end after a step only.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saves_unfinished else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        place = folder / f"checkpoint-{self.state.global_step}"
        unfinished = folder / UNFINISHED / place.name
        self._saves_unfinished = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_unfinished = False
        torch.save(self._between_steps(), unfinished / self._between_steps_file())
        is_best = self.state.best_model_checkpoint == str(unfinished)
        if is_best:
            self.state.best_model_checkpoint = str(place)
        self.accelerator.wait_for_everyone()  # until all have written
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
            publish(unfinished, place, {"settings": settings_of(self), "adapter": adapter_of(self)})
            self._rotate(place, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # nobody writes the next one before

    def _rotate(self, newest: Path, best: str | None) -> None:
        rotate(newest.parent, self.args.save_total_limit, {newest, Path(best)} if best else {newest})
        shutil.rmtree(newest.parent / UNFINISHED, ignore_errors=True)

    def _between_steps_file(self) -> str:
        return f"between_steps_{self.args.process_index}_of_{self.args.world_size}.pt"

    def _between_steps(self) -> dict[str, Any]:
        """What the trainer holds from step to step, of tensors, numbers and strings in lists and dictionaries."""
        held = {name: getattr(self, name) for name in SUMS if hasattr(self, name)}
        held["order"] = self.order.state(is_at_end=float(self.state.epoch or 0.0).is_integer())
        held["metrics"] = {mode: dict(values) for mode, values in self._metrics.items()}
        return held

    def _load_between_steps(self, checkpoint: Path) -> dict[str, Any]:
        device = self.args.device if self.args.device.type != "cpu" else "cpu"  # torch does not know cpu:0 here
        path = checkpoint / self._between_steps_file()
        try:
            held = torch.load(path, map_location=device, weights_only=True)
            metrics = {mode: dict(held["metrics"][mode]) for mode in self._metrics}
            return held | {"order": dict(held["order"]), "metrics": metrics}
        except Exception as error:  # torch has many for a file that is damaged
            raise RecipeError(
                f"{path} is damaged ({type(error).__name__}): name another checkpoint by resume_from_checkpoint."
            ) from error

    def _restore_between_steps(self, held: Mapping[str, Any]) -> None:
        for name in SUMS:
            if name in held:
                setattr(self, name, held[name])
        self.order.restore(held["order"])
        for mode, values in held["metrics"].items():
            self._metrics[mode].update(values)

    def _is_past_a_stream(self, checkpoint: Path) -> bool:
        if hasattr(self.train_dataset, "__len__"):
            return False
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return (
            state.epoch or 0.0
        ) >= 1 and state.global_step < self.args.max_steps  # Trainer counts all steps into each pass

    def _check_adapter(self, checkpoint: Path, marker: Mapping[str, Mapping[str, Any]]) -> None:
        there, here = marker["adapter"], adapter_of(self)
        # LoRA and LoRA-XS have one kind of config.
        methods = ({"method": settings.get("method")} for settings in (marker["settings"], self.recipe_settings))
        other = differences(*methods) or differences(there, here)
        if other is None and bool(there) != bool(here):
            other = "there is none" if here else "this run trains none"
        if other is not None:
            raise RecipeError(
                f"{checkpoint} holds another adapter: {other}. Set it back, or choose another output_dir or checkpoint."
            )


class ResumableGRPOTrainer(ResumableTrainer, GRPOTrainer):
    """TRL's GRPO, resumable: with the completions that are not used up yet."""

    args: GRPOConfig

    def _between_steps(self) -> dict[str, Any]:
        assert self.args.steps_per_generation is not None  # GRPOConfig fills it in
        is_used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        own = {"step": self._step, "completions": None if is_used_up else self._buffered_inputs}
        return super()._between_steps() | own

    def _restore_between_steps(self, held: Mapping[str, Any]) -> None:
        super()._restore_between_steps(held)
        assert self._resumes_from is not None
        there, here = read_marker(self._resumes_from)["settings"], settings_of(self)
        if all(there.get(name) == here[name] for name in SPLITS):
            self._step, self._buffered_inputs = held["step"], held["completions"]


class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFT, resumable."""


class BetweenSteps(TrainerCallback):
    """Gives a resumed trainer back what it held; tells its [`DataOrder`] of each epoch."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer.restore()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer.order.begin_epoch(int(state.epoch or 0), kwargs["train_dataloader"])


class DataOrder:
    """The random states that an epoch's order of the data is drawn from."""

    def __init__(self) -> None:
        self._sampler: Any = None  # of torch, accelerate, transformers or TRL: told apart by what they have
        self._at_begin: dict[str, torch.Tensor] = {}
        self._to_restore: dict[str, torch.Tensor] | None = None

    def state(self, *, is_at_end: bool) -> dict[str, torch.Tensor]:
        """Those at the begin of the epoch that goes on from here: this one's, or at its end the next one's."""
        return self._now() if is_at_end else self._at_begin

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """The next epoch that begins has this order."""
        self._to_restore = state

    def begin_epoch(self, epoch: int, loader: DataLoader) -> None:
        """Before the order is drawn."""
        self._sampler = innermost_sampler(loader)
        if self._to_restore is not None:
            state, self._to_restore = self._to_restore, None
            torch.set_rng_state(state["torch"].cpu())  # Trainer sets the one of the step after this
            if "sampler" in state:
                self._sampler.generator.set_state(state["sampler"].cpu())
            if self._is_seeded_by_epoch():  # accelerate misses it where batches are skipped on several processes
                self._sampler.set_epoch(epoch)
        self._at_begin = self._now()

    def _is_seeded_by_epoch(self) -> bool:
        return hasattr(self._sampler, "set_epoch")

    def _now(self) -> dict[str, torch.Tensor]:
        generator = getattr(self._sampler, "generator", None)
        now = {"torch": torch.get_rng_state()}
        if generator is not None and not self._is_seeded_by_epoch():
            now["sampler"] = generator.get_state()
        return now


def innermost_sampler(loader: DataLoader) -> Sampler | None:
    """The sampler of single rows under accelerate's wrappers; `None` for a stream."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def settings_of(trainer: ResumableTrainer) -> dict[str, Any]:
    """What decides over the result of a run, as JSON values: training arguments, the base's name, the data's extent."""
    given = {name: value for name, value in trainer.args.to_dict().items() if not name.startswith(IMMATERIAL)}
    data: Any = trainer.train_dataset
    if hasattr(data, "__len__") and len(data):
        first = hashlib.sha256(json.dumps(plain(data[0]), sort_keys=True).encode()).hexdigest()[:16]
        given |= {"training rows": len(data), "first training row (SHA-256)": first}
    base = trainer.model.config
    assert isinstance(base, PreTrainedConfig)
    given |= {"base model": base.name_or_path, "processes": trainer.args.world_size}
    return plain(given | trainer.recipe_settings)


def adapter_of(trainer: Trainer) -> dict[str, Any]:
    """What of an adapter's config decides over what its numbers mean, as JSON values; empty without an adapter.

    The base is not among it: its weights are compared on loading.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return {}
    ignored = (
        *("inference_mode", "base_model_name_or_path", "revision", "fingerprint", "format_version", "auto_mapping"),
        *("save_dtype", "save_basis", "peft_version", "peft_tinylora_version"),
    )
    config = plain(model.peft_config["default"].to_dict())
    return {name: value for name, value in config.items() if name not in ignored}


def plain(value: Any) -> Any:
    """A value as it comes back from JSON; of what JSON does not know, no more than two processes agree on."""

    def known(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        return os.fspath(value) if isinstance(value, os.PathLike) else type(value).__name__

    return json.loads(json.dumps(value, default=known))
