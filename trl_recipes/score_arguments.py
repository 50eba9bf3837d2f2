"""What the script score.py can be told, from YAML or the command line; see arguments.py."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from trl import ModelConfig

from trl_recipes.arguments import ProblemArguments
from trl_recipes.errors import RecipeError


DEFAULT_LENGTH = 512  # tokens of an answer at most


@dataclass
class ScoreArguments(ProblemArguments):
    """What the script `score.py` reads, besides TRL's `ModelConfig`.

    Args:
        benchmark (`str`, *optional*):
            One of [`benchmark_sets.BENCHMARKS`]: dataset, columns, prompt and longest answer, as far as they are not given.
        dataset (`str`, *optional*):
            Problems, a dataset id or a local JSON, JSONL or Parquet file. With `benchmark`, a copy of it.
        dataset_config (`str`, *optional*):
            The dataset's configuration.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Its split; a file is one split.
        adapter (`str`, *optional*):
            A saved adapter, folder or id. Without it the base model is scored.
        base_model (`str`, *optional*):
            The untrained model, to compare a merged or fully fine-tuned one with under the same prompts. Of an adapter it
            is measured anyway; servers do not need it, of which each has one base.
        basis (`str`, *optional*):
            `basis` of the adapter's config, in place of the saved one.
        batch_size (`int`, *optional*, defaults to `64`):
            Problems generated at once.
        max_completion_length (`int`, *optional*):
            Most tokens in an answer; the benchmark's by default, else 512.
        max_problems (`int`, *optional*):
            Score on the first so many problems only.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether to score a sample at temperature 1 of each problem too, the one that training scores.
        samples (`int`, *optional*, defaults to `0`):
            Score so many samples of each problem too: pass@1 is their mean.
        temperature, top_p (`float`, *optional*, default to `1.0`):
            How these are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Of these. Servers draw with their own.
        controls (`bool`, *optional*, defaults to `True`):
            Whether to score, beside an adapter, the zero adapter and the base.
        output_dir (`str`, *optional*):
            Where completions go as they come, then results.json and results.md. With an evaluation that was broken off in
            it, go on with that.
        update_card (`bool`, *optional*, defaults to `False`):
            Whether to put the result into the card of the adapter's folder.
        vllm_server_base_url (`str`, *optional*):
            Let these vLLM servers answer, URLs separated by commas, and send them the adapter.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to stay on the CPU where there is a GPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the code that a model ships with.
    """

    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "gsm8k, math500, minerva, olympiadbench, aime24, amc23, gaokao2023en, collegemath or embedded: sets "
            "dataset, columns, prompt and longest answer, as far as they are not given."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Problems: a dataset id or a JSON, JSONL or Parquet file. With `benchmark`: a copy of it."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    dataset_split: str = field(default="test", metadata={"help": "The dataset's split (a file is one split)."})
    adapter: str | None = field(default=None, metadata={"help": "A saved adapter: folder or id (None: the base)."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "The untrained model to compare a merged or fully fine-tuned one with (an adapter's base is measured "
            "anyway)."
        },
    )
    basis: str | None = field(
        default=None,
        metadata={
            "help": "Where to take the adapter's frozen factors from on another form of the base than it was trained on: "
            "full-precision or unchecked (None: as it was trained)."
        },
    )
    batch_size: int = field(
        default=64, metadata={"help": "Problems generated at once. The same number gives the same answers again."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens in an answer (None: the benchmark's, else 512)."}
    )
    max_problems: int | None = field(default=None, metadata={"help": "The first so many problems only (None: all)."})
    sampled: bool = field(
        default=False, metadata={"help": "Score a sample at temperature 1 of each problem too, as training does."}
    )
    samples: int = field(
        default=0, metadata={"help": "Score so many samples of each problem too; pass@1 is their mean (0: none)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of `samples`."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of `samples`."})
    seed: int = field(default=0, metadata={"help": "Seed of `samples`; servers draw with their own."})
    controls: bool = field(
        default=True, metadata={"help": "Score the zero adapter and the base beside an adapter, and the difference."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Keep completions here as they come, and results.json and results.md; an evaluation that was broken "
            "off goes on where it stopped."
        },
    )
    update_card: bool = field(
        default=False, metadata={"help": "Put the result into the card (README.md) of the adapter's folder."}
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Let these vLLM servers answer (URLs, separated by commas), and send them the adapter."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model ships with."})

    @property
    def longest(self) -> int:
        """Most tokens in an answer: what was set, or what the benchmark says, or else 512."""
        return DEFAULT_LENGTH if self.max_completion_length is None else self.max_completion_length

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("samples", 0), ("batch_size", 1), ("max_problems", 1), ("max_completion_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}={value}: it must be {least} or more.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise RecipeError(
                f"temperature={self.temperature:g}, top_p={self.top_p:g}: a temperature is above 0 (greedy is measured "
                "anyway), top_p above 0 and at most 1."
            )


def command_options(values: Mapping[str, object], defaults: Mapping[str, object] | None = None) -> str:
    """
    Options of score.py as a command line has them, without those that have their default value.

    Args:
        values (`dict[str, object]`):
            Value by option.
        defaults (`dict[str, object]`, *optional*):
            Those that are not the script's own.
    """
    own = {f.name: f.default for f in (*fields(ScoreArguments), *fields(ModelConfig))}
    of_script = own | dict(defaults or {})
    given = [(name, str(value)) for name, value in values.items() if value != of_script[name]]
    return shlex.join(part for name, value in given for part in (f"--{name}", value))
