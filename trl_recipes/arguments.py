"""What can be set, from a YAML file (`--config`) or the command line, which wins.

TRL's and transformers' own classes hold the rest (`GRPOConfig`, `ModelConfig`, `DatasetMixtureConfig`). The parser is
strict: an unknown key in YAML is an error. Field names are unique across all the classes parsed together, hence the
`tinylora_` prefix (as TRL has `lora_`).
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from transformers.utils import is_bitsandbytes_available
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from peft_tinylora import TinyLoraError
from peft_tinylora.config import SAVE_DTYPES
from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.yaml_files import read_yaml


METHODS = ("tinylora", "lora", "lora-xs", "full")
# Of TRL's `ModelConfig`: those of a LoRA, and which of them the other methods read.
LORA_OPTIONS = (*(f.name for f in fields(ModelConfig) if f.name.startswith("lora_")), "use_rslora", "use_dora")
LORA_OPTIONS_READ = {"lora": LORA_OPTIONS, "lora-xs": ("lora_r", "lora_dropout", "lora_target_modules")}


@dataclass
class ProblemArguments:
    """How a row becomes a problem.

    Args:
        question_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the question.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the true answer.
        prompt_template (`str`, *optional*, defaults to `"{question}"`):
            What the model reads.
        chat (`bool`, *optional*, defaults to `False`):
            Whether to make the prompt a user message and apply the tokenizer's chat template.
    """

    question_column: str = field(
        default="prompt", metadata={"help": "Column that holds the question (GSM8K: `question`)."}
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column that holds the true answer: a bare answer, or a solution that marks it with ####."},
    )
    prompt_template: str = field(
        default="{question}", metadata={"help": "What the model reads; must contain `{question}`."}
    )
    chat: bool = field(
        default=False,
        metadata={"help": "Make the prompt a user message, so that the tokenizer's chat template is applied."},
    )

    def __post_init__(self):
        if "{question}" not in self.prompt_template:
            raise RecipeError(f"prompt_template must contain {{question}}, got {shown(self.prompt_template)}.")


@dataclass
class RecipeArguments(ProblemArguments, ScriptArguments):
    """What a training recipe reads, besides TRL's own arguments. `dataset_name` may be a JSON, JSONL or Parquet file.

    Args:
        method (`str`, *optional*, defaults to `"tinylora"`):
            What is trained: `"tinylora"`, or beside it as baselines `"lora"`, `"lora-xs"` and `"full"`; see methods.py.
        eval_dataset_name (`str`, *optional*):
            Held-out problems, a dataset id or a local file. Without it: `dataset_test_split` of the training dataset,
            where it has one.
        max_eval_problems (`int`, *optional*):
            Score on the first so many held-out problems only.
        score_batch_size (`int`, *optional*, defaults to `64`):
            Problems generated at once when scoring.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to replace a finished adapter in `output_dir`.
        hub_base_model (`str`, *optional*):
            Hub id of the base model, which a pushed adapter must name, where `model_name_or_path` is a folder.
    """

    method: str = field(
        default="tinylora",
        metadata={
            "help": "What is trained: tinylora; or a baseline: lora (TRL's lora_* options, with TRL's defaults), lora-xs "
            "(lora_r, lora_dropout, lora_target_modules; its r x r matrices alone are trained), or full (all weights). "
            "Baselines don't read tinylora_*, adapt all linear layers by default, and want learning rates of their own."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out problems: a dataset id or a local JSON, JSONL or Parquet file. Without it, "
            "`dataset_test_split` of `dataset_name`, where it has one; with neither, nothing is scored."
        },
    )
    max_eval_problems: int | None = field(
        default=None, metadata={"help": "Score on the first so many held-out problems only (None: all)."}
    )
    score_batch_size: int = field(
        default=64,
        metadata={
            "help": "Problems generated at once when scoring before and after. More is faster, and takes memory."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a finished adapter in `output_dir` instead of refusing to start."}
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "With push_to_hub: the base model's id on the Hub, if `model_name_or_path` is a folder."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise RecipeError(f"method={shown(self.method)}: allowed are {', '.join(map(repr, METHODS))}.")


@dataclass
class GRPOArguments(RecipeArguments, GRPOScriptArguments):
    """What grpo.py reads, besides TRL's own arguments: [`RecipeArguments`], and the rewards as `trl grpo` takes them.

    Without `reward_funcs` and `reward_model_name_or_path` the reward is `exact_match_reward`, on the question and
    answer columns.

    Args:
        rollout (`str`, *optional*, defaults to `"transformers"`):
            What generates completions: `"transformers"`, or TRL's own vLLM with `use_vllm`; `"vllm"`, the servers of
            `vllm_server_base_url`, several separated by commas; `"vllm-colocate"`, vLLM beside the trainer on one GPU.
        rollout_request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds after which a request without an answer goes to another server.
    """

    rollout: str = field(
        default="transformers",
        metadata={
            "help": "What generates completions: transformers; vllm, the servers of `vllm_server_base_url` (several, "
            "separated by commas), with v in each request; vllm-colocate, vLLM beside the trainer on one GPU."
        },
    )
    rollout_request_timeout: float = field(
        default=600.0, metadata={"help": "Seconds after which a request without an answer goes to another server."}
    )


@dataclass
class SFTArguments(RecipeArguments):
    """What sft.py reads, besides TRL's own arguments: [`RecipeArguments`], and what follows.

    Args:
        completion_column (`str`, *optional*):
            Column to learn from, after the question. Without it: rows in one of TRL's own formats are taken as they
            are, and of others the whole text of `answer_column`.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Most tokens in an answer when scoring.
    """

    completion_column: str | None = field(
        default=None,
        metadata={
            "help": "Column to learn from, after the question. Without it, rows in one of TRL's own formats "
            "(messages, text, prompt and completion) are taken as they are, and of others the whole text of "
            "`answer_column`."
        },
    )
    max_completion_length: int = field(default=512, metadata={"help": "Most tokens in an answer when scoring."})


@dataclass
class TinyLoraArguments:
    """The adapter; each field is the one of that name in [`peft_tinylora.TinyLoraConfig`].

    Args:
        tinylora_r (`int`, *optional*, defaults to `2`):
            Frozen rank.
        tinylora_u (`int`, *optional*, defaults to `1`):
            Trained numbers a group of modules.
        tinylora_tie (`str` or `dict`, *optional*, defaults to `"none"`):
            Which modules share their numbers.
        tinylora_n_tie (`int`, *optional*):
            Modules in a group, for `tiled` and `structured`.
        tinylora_sigma (`str`, *optional*, defaults to `"left"`):
            Where the singular values stand.
        tinylora_target_modules (`list[str]`, *optional*, defaults to `["all-linear"]`):
            Modules to adapt.
        tinylora_exclude_modules (`list[str]`, *optional*):
            Modules to leave out.
        tinylora_target_parameters (`list[str]`, *optional*):
            Fused expert weights to adapt, beside the modules.
        tinylora_modules_to_save (`list[str]`, *optional*):
            Modules to train and save whole.
        tinylora_projection_seed (`int`, *optional*, defaults to `42`):
            Seed of the fixed random projections.
        tinylora_basis (`str`, *optional*, defaults to `"base"`):
            The weights that the frozen factors come from: `base` as loaded, or `full-precision`.
        tinylora_save_basis (`bool`, *optional*, defaults to `False`):
            Whether the adapter file holds the frozen factors.
        tinylora_dtype (`str`, *optional*, defaults to `"float32"`):
            What the trained numbers are trained in: `float32`, or `bfloat16` to compare with the paper's figure 4.
        tinylora_save_dtype (`str`, *optional*, defaults to `"float32"`):
            What the trained numbers are rounded to once, after training: `float32` or `bfloat16`.
    """

    tinylora_r: int = field(default=2, metadata={"help": "Frozen rank: singular directions kept of each weight."})
    tinylora_u: int = field(default=1, metadata={"help": "Trained numbers a group."})
    # HfArgumentParser reads a field of three types from the command line as the second, here a string.
    tinylora_tie: dict | str | None = field(
        default="none",
        metadata={
            "help": "Which modules share their numbers: none, full, tiled (nearby modules), structured (nearby modules "
            'of a type), or a mapping of group name to a pattern over module names, as JSON: {"mlp": ".*mlp.*"}.'
        },
    )
    tinylora_n_tie: int | None = field(
        default=None, metadata={"help": "Modules that share their numbers, for tiled and structured."}
    )
    tinylora_sigma: str = field(
        default="left",
        metadata={"help": "Where the singular values stand: left (the paper) or split (PEFT)."},
    )
    tinylora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt: all-linear, names, or one pattern."},
    )
    tinylora_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to leave out: names, or one pattern."}
    )
    tinylora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Fused expert weights to adapt, beside the modules: mlp.experts.gate_up_proj, say."},
    )
    tinylora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, beside the adapter."}
    )
    tinylora_projection_seed: int = field(default=42, metadata={"help": "Seed of the fixed random projections."})
    tinylora_basis: str = field(
        default="base",
        metadata={
            "help": "The weights the frozen factors come from: base (as they are loaded, dequantized if they are "
            "quantized) or full-precision (those of the checkpoint, so that the adapter fits every form of the base)."
        },
    )
    tinylora_save_basis: bool = field(
        default=False, metadata={"help": "Put the frozen factors into the file, so that stock PEFT loads it."}
    )
    tinylora_dtype: str = field(
        default="float32",
        metadata={
            "help": "What the trained numbers are trained in: float32; or bfloat16, in which small steps round to "
            "nothing, to compare with the paper's figure 4."
        },
    )
    tinylora_save_dtype: str = field(
        default="float32",
        metadata={"help": "What the trained numbers are rounded to after training: float32 or bfloat16."},
    )

    def __post_init__(self):
        if isinstance(self.tinylora_tie, str) and self.tinylora_tie.lstrip().startswith("{"):
            try:
                self.tinylora_tie = json.loads(self.tinylora_tie)
            except (ValueError, RecursionError) as error:
                raise RecipeError(
                    f"tinylora_tie is no JSON mapping: {shown(self.tinylora_tie)} ({in_one_line(error)})."
                ) from error
        for name in ("tinylora_dtype", "tinylora_save_dtype"):
            if getattr(self, name) not in SAVE_DTYPES:
                raise RecipeError(
                    f"{name}={shown(getattr(self, name))}: allowed are {', '.join(map(repr, SAVE_DTYPES))}."
                )


R = TypeVar("R", bound=RecipeArguments)
T = TypeVar("T", GRPOConfig, SFTConfig)


class Options(NamedTuple, Generic[R, T]):
    """All that a recipe was set to, as [`parse`] returns it."""

    recipe: R
    training: T
    model: ModelConfig
    mixture: DatasetMixtureConfig
    tinylora: TinyLoraArguments

    @property
    def output_dir(self) -> Path:
        """Where the run leaves what it made."""
        return Path(cast(str, self.training.output_dir))  # transformers fills it in


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what the user can mend is one line on stderr, and exit code 1."""
    try:
        main()
    except (RecipeError, TinyLoraError) as error:
        sys.exit(f"error: {error}")


def parse(classes: Iterable[type], usage: str, argv: Sequence[str] | None = None) -> tuple:
    """
    Parses YAML and command line strictly into one object of each class.

    Args:
        classes (`Iterable[type]`):
            Dataclasses whose field names don't overlap.
        usage (`str`):
            One line shown with a wrong option, in place of a list of the some 300 that there are.
        argv (`Sequence[str]`, *optional*):
            The command line without the script, `sys.argv[1:]` by default.

    Raises:
        RecipeError: if the file is missing or no YAML mapping, or a key or value is not accepted.
    """
    argv = sys.argv[1:] if argv is None else [*argv]
    if "--config" in argv:
        if argv[-1] == "--config":
            raise RecipeError("--config: name the YAML file behind it.")
        read_yaml(Path(argv[argv.index("--config") + 1]), "config file")  # before TRL does, which looks at nothing
    # transformers' type is of one dataclass and its instances; `type[Any]` is what all of them are.
    parser = TrlParser(cast(Iterable[Any], classes), usage=usage)
    try:
        return parser.parse_args_and_config(argv)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(in_one_line(error)) from error


def refuse_lora_options(model_args: ModelConfig, method: str = "tinylora") -> None:
    """Raises [`RecipeError`] for options of a LoRA in `ModelConfig` that the method does not read.

    `use_peft` asks for an adapter only, and one is trained anyway.
    """
    read = LORA_OPTIONS_READ.get(method, ())
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    given = [name for name in LORA_OPTIONS if name not in read and getattr(model_args, name) != defaults[name]]
    if given:
        remedy = {
            "tinylora": "LoRA options, and this recipe trains TinyLoRA: use tinylora_* instead.",
            "lora-xs": f"LoRA-XS has none of these and reads {', '.join(read)} only: leave them out.",
            "full": "LoRA options, and full fine-tuning has no adapter: leave them out, or set method: lora.",
        }
        raise RecipeError(f"{', '.join(given)}: {remedy[method]}")


def refuse_quantization_options(model_args: ModelConfig, use_vllm: bool = False) -> None:
    """Raises [`RecipeError`] where a quantized base is asked for that cannot be loaded, or not with these rollouts."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return
    name = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"  # ModelConfig refuses both
    if not is_bitsandbytes_available():
        raise RecipeError(
            f"{name} needs bitsandbytes, which is missing or too old: pip install 'peft-tinylora[quantization]'."
        )
    if name == "load_in_4bit" and model_args.dtype in (None, "auto"):
        raise RecipeError(
            f"load_in_4bit with dtype: {model_args.dtype}: set dtype to the one to compute in, bfloat16 say."
        )
    if use_vllm:
        why = {
            "load_in_4bit": "TRL would send vLLM the packed 4-bit bytes as if they were the weights",
            "load_in_8bit": "TRL cannot start vLLM on an 8-bit base",
        }
        raise RecipeError(
            f"use_vllm with {name}: {why[name]}: set use_vllm: false, or {name}: false with dtype: bfloat16."
        )
