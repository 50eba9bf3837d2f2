"""Held-out problems, scored before and after training, in a recipe.

The base is scored as the adapter is, by one model: before training, or where the model is sharded after it, when it is on
its devices. Where there are no problems all scores are `None`.
"""

from dataclasses import fields
from typing import cast

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_recipes.arguments import LORA_OPTIONS, Options, ProblemArguments, RecipeArguments
from trl_recipes.methods import without_adapter
from trl_recipes.problems import NOT_SCORED
from trl_recipes.reporting import Scores
from trl_recipes.resuming import ResumableTrainer
from trl_recipes.score import score
from trl_recipes.score_arguments import command_options
from trl_recipes.sharding import is_sharded, ready_to_generate


class HeldOut:
    """
    The problems and what was measured on them so far.

    Args:
        problems ([`~datasets.Dataset`], *optional*):
            `{"prompt": str or list of messages, "answer": str}`; `None` where nothing is to be scored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        recipe_args ([`RecipeArguments`]):
            `method` and `score_batch_size`.
        max_completion_length (`int`):
            Most tokens in an answer.

    Attributes:
        before, after (`dict[str, float]`, *optional*): share solved, 0 to 1, "greedy" and "sampled" at temperature 1.
        answers_sha256 (`str`, *optional*): of the greedy answers after training; see [`Score`].
    """

    def __init__(
        self,
        problems: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        recipe_args: RecipeArguments,
        max_completion_length: int | None,
    ) -> None:
        self.problems = problems
        self.tokenizer = tokenizer
        self.recipe_args = recipe_args
        self.max_completion_length = cast(int, max_completion_length)  # GRPOConfig's type allows none
        self.before: Scores = None
        self.after: Scores = None
        self.answers_sha256: str | None = None

    def __len__(self) -> int:
        return 0 if self.problems is None else len(self.problems)

    def score_before(self, trainer: ResumableTrainer) -> None:
        """Scores the untrained model and says what it got; where it is sharded, [`score_after`] does. Every process calls it."""
        say = PartialState().print
        if self.problems is None:
            say(NOT_SCORED)
        elif not is_sharded(trainer):
            with without_adapter(trainer.model):
                before, _ = self._score(trainer.model, self.problems)
            self.before = before
            say(f"before: greedy {before['greedy']:.1%}, sampled {before['sampled']:.1%}")

    def score_after(self, trainer: ResumableTrainer) -> None:
        """Scores the trained model. Every process calls it."""
        with ready_to_generate(trainer) as policy:
            if self.problems is None:
                return
            self.after, self.answers_sha256 = self._score(policy, self.problems)
            if is_sharded(trainer) and self.recipe_args.method != "full":
                with without_adapter(policy):
                    self.before, _ = self._score(policy, self.problems)

    def _score(self, model: PreTrainedModel | PeftModel, problems: Dataset) -> tuple[dict[str, float], str]:
        """The share of problems solved by way of decoding, and the `answers_sha256` of the greedy answers."""
        scores = {
            decoding: score(
                model,
                self.tokenizer,
                problems,
                batch_size=self.recipe_args.score_batch_size,
                max_completion_length=self.max_completion_length,
                sampled=decoding == "sampled",
                progress=decoding if PartialState().is_main_process else None,
            )
            for decoding in ("greedy", "sampled")
        }
        return {decoding: scored.fraction for decoding, scored in scores.items()}, scores["greedy"].answers_sha256

    def score_again(self, options: Options) -> str | None:
        """The options of score.py that measure the same on the saved adapter; `None` where nothing was scored, or after a
        mixture, whose held-out part was split off at random.
        """
        recipe_args, training_args, model_args = options.recipe, options.training, options.model
        dataset = recipe_args.eval_dataset_name or recipe_args.dataset_name
        if self.problems is None or dataset is None:
            return None
        again = {
            "dataset": dataset,
            "dataset_config": None if recipe_args.eval_dataset_name else recipe_args.dataset_config,
            "dataset_split": recipe_args.dataset_test_split,
            "batch_size": recipe_args.score_batch_size,
            "max_completion_length": self.max_completion_length,
            "max_problems": recipe_args.max_eval_problems,
            "use_cpu": training_args.use_cpu,
            "trust_remote_code": training_args.trust_remote_code,
            "sampled": True,
        }
        again |= {f.name: vars(recipe_args)[f.name] for f in fields(ProblemArguments)}
        of_training = ("model_name_or_path", "use_peft", *LORA_OPTIONS)
        again |= {name: value for name, value in vars(model_args).items() if name not in of_training}
        return command_options(again)
