"""GRPO's completions from vLLM, with the adapter in every request: on servers, or on the GPU that trains.

TRL's own vLLM mode merges the adapter into the weights, rounds, and sends all of them, at each step. Here nothing is merged
or sent but v, as text (peft_tinylora/inline.py); vLLM adds the update beside its own weights. What differs from the
trainer's probabilities is left to TRL's importance sampling, for which the log-probabilities come back with the tokens.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

from transformers import BatchEncoding, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from peft_tinylora.inline import InlineAdapter, inline_adapter, name_of
from trl_recipes.arguments import GRPOArguments, TinyLoraArguments
from trl_recipes.errors import RecipeError, shown
from trl_recipes.vllm_requests import Completion, Prompt
from trl_recipes.vllm_servers import VllmServers, split_urls


# The launcher's, by which vLLM would take itself for a process of the training run, and wait for the others.
LAUNCHER_VARIABLES = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)"
)


class Generator(Protocol):
    """Where completions come from."""

    def generate(
        self, model: str, prompts: Sequence[Prompt], *, max_tokens: int, expected_model: str | None, **sampling: Any
    ) -> list[list[Completion]]:
        """Completes all prompts with the adapter that `model` says; see [`VllmServers.generate`]."""


class Rollouts:
    """TRL's `rollout_func`: prompts -> completions under the v that the trainer has now.

    Beside what TRL asks for it returns `v_version`, the optimizer steps that v had taken, for each completion; reward
    functions get it as an argument.

    Args:
        generator ([`Generator`]): servers, or vLLM in this process.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._adapter: InlineAdapter | None = None

    def __call__(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """
        Completes each prompt once.

        Args:
            prompts (`list`): strings or lists of messages, one for each completion wanted: equal ones stand together.
            trainer ([`~trl.GRPOTrainer`]): whose adapter and sampling options are used.

        Returns:
            `dict[str, list]`: "prompt_ids", "completion_ids" and "logprobs", lists of numbers for each prompt given, and
            "v_version".
        """
        prompt_ids = tokenize(trainer, prompts)
        counts: dict[tuple[int, ...], int] = {}
        for ids in prompt_ids:
            counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
        requests = [Prompt(list(ids), n) for ids, n in counts.items()]
        answers = self._generate(trainer, requests, cast(int, trainer.max_completion_length))
        left = {ids: list(completions) for ids, completions in zip(counts, answers, strict=True)}
        completions = [left[tuple(ids)].pop(0) for ids in prompt_ids]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
            "v_version": [trainer.state.global_step] * len(completions),
        }

    def check(self, trainer: GRPOTrainer) -> None:
        """Asks for one token, so that what is wrong is said before anything was waited for.

        Raises:
            RecipeError: if the adapter is refused, or the log-probabilities are not those that are sampled from.
        """
        prompt = Prompt([tokenizer_of(trainer).eos_token_id], 1)
        self._generate(trainer, [prompt], 1)
        is_plain = trainer.temperature == 1 and trainer.top_p == 1 and not trainer.top_k and not trainer.min_p
        if not (is_plain and trainer.repetition_penalty == 1):
            [[completion]] = self._generate(trainer, [prompt], 1, top_k=1)
            if completion.logprobs[0] < -1e-3:  # of the likeliest token, the only one that may be sampled
                raise RecipeError(
                    "the server's log-probabilities are those before temperature, top_p and top_k: start it with "
                    "--logprobs-mode processed_logprobs."
                )
        self._adapter = None  # a run that resumes may have the signs of another machine

    def _generate(
        self, trainer: GRPOTrainer, requests: list[Prompt], max_tokens: int, **more: object
    ) -> list[list[Completion]]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._adapter is None:
            self._adapter = inline_adapter(model)
        text = self._adapter.with_vectors(model.base_model.tinylora_v.vectors_of("default")).text()
        sampling = {
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k or -1,  # 0 and None: all tokens, which vLLM calls -1
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            **cast(dict[str, Any], config_of(trainer).generation_kwargs or {}),
            **more,
        }
        return self._generator.generate(
            text, requests, max_tokens=max_tokens, expected_model=name_of(text), **sampling
        )


def tokenize(trainer: GRPOTrainer, prompts: list) -> list[list[int]]:
    """Prompts -> token ids, as TRL does it for a model of text."""
    tokenizer = tokenizer_of(trainer)
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    encoded = tokenizer.apply_chat_template(
        prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **cast(dict[str, Any], trainer.chat_template_kwargs),  # a string in the config only, which TRL reads as JSON
    )
    return cast(BatchEncoding, encoded)["input_ids"]  # as return_dict asks for


def tokenizer_of(trainer: GRPOTrainer) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe gave the trainer, whose type allows processors of pictures and sound."""
    return cast(PreTrainedTokenizerBase, trainer.processing_class)


def config_of(trainer: GRPOTrainer) -> GRPOConfig:
    """The trainer's settings, which are TRL's: the type is Trainer's."""
    return cast(GRPOConfig, trainer.args)


class ColocatedVllm:
    """vLLM beside the trainer on one GPU, in a process of its own; each step's v is an adapter of its own there.

    Args:
        model_args ([`~trl.ModelConfig`]): which base, in which dtype.
        training_args ([`~trl.GRPOConfig`]): `vllm_gpu_memory_utilization`, `vllm_max_model_length`,
            `trust_remote_code`.
        rank (`int`): of the adapter.

    Raises:
        RecipeError: if vLLM is not installed.
    """

    def __init__(self, model_args: ModelConfig, training_args: GRPOConfig, rank: int) -> None:
        os.environ |= {"PEFT_TINYLORA_VLLM": "inline", "PEFT_TINYLORA_VLLM_RANK": str(rank)}
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        try:
            from vllm import LLM
        except ImportError as error:
            raise RecipeError("rollout: vllm-colocate needs vLLM: pip install 'peft-tinylora[vllm]'.") from error
        self._ids = itertools.count(1)
        self._last = None  # the request of the last v
        dtype = model_args.dtype if model_args.dtype in ("float32", "float16", "bfloat16") else "auto"
        with without_launcher():
            self._llm = LLM(
                model=model_args.model_name_or_path,
                revision=model_args.model_revision,
                dtype=dtype,
                trust_remote_code=training_args.trust_remote_code,
                gpu_memory_utilization=training_args.vllm_gpu_memory_utilization,
                max_model_len=training_args.vllm_max_model_length,
                enable_lora=True,
                max_lora_rank=served_rank(rank),
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # and not the sampling options that a base model recommends
                seed=training_args.seed,
            )

    def generate(
        self, model: str, prompts: Sequence[Prompt], *, max_tokens: int, expected_model: str | None, **sampling: Any
    ) -> list[list[Completion]]:
        """See [`VllmServers.generate`]."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        if self._last is None or self._last.lora_path != model:
            self._last = LoRARequest(name_of(model), next(self._ids), model)
            [reason] = self._llm.collective_rpc("tinylora_reason", args=(model,))
            if reason is not None:
                raise RecipeError(f"vLLM cannot load the adapter: {reason or 'see the error above.'}")
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in prompts],
            [SamplingParams(n=prompt.n, max_tokens=max_tokens, logprobs=0, **sampling) for prompt in prompts],
            lora_request=self._last,
            use_tqdm=False,
        )
        return [
            [
                Completion(
                    list(choice.token_ids),
                    [at[token].logprob for token, at in zip(choice.token_ids, choice.logprobs, strict=True)],
                )
                for choice in output.outputs
            ]
            for output in outputs
        ]


def served_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM's kernels have for an adapter of a rank."""
    return next((served for served in (8, 16, 32, 64, 128, 256, 320, 512) if served >= rank), rank)


@contextmanager
def without_launcher() -> Iterator[None]:
    """While this lasts, the environment does not say which process of a training run this is."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if LAUNCHER_VARIABLES.fullmatch(name)}
    try:
        yield
    finally:
        os.environ |= kept


def make_rollouts(
    recipe_args: GRPOArguments, training_args: GRPOConfig, model_args: ModelConfig, tinylora_args: TinyLoraArguments
) -> Rollouts | None:
    """The rollouts that the options ask for; `None` for TRL's own.

    Raises:
        RecipeError: if the options do not go together, or vLLM is not installed; names them.
    """
    if recipe_args.rollout == "transformers":
        return None
    _check_options(recipe_args, training_args, model_args, tinylora_args)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL's warning that rollout_func may change
    if recipe_args.rollout == "vllm-colocate":
        return Rollouts(ColocatedVllm(model_args, training_args, tinylora_args.tinylora_r))
    return Rollouts(
        VllmServers(
            split_urls(cast(str, training_args.vllm_server_base_url)),
            request_timeout=recipe_args.rollout_request_timeout,
            patience=training_args.vllm_server_timeout,
        )
    )


def _check_options(
    recipe_args: GRPOArguments, training_args: GRPOConfig, model_args: ModelConfig, tinylora_args: TinyLoraArguments
) -> None:
    if recipe_args.rollout not in ("vllm", "vllm-colocate"):
        raise RecipeError(
            f"rollout: {shown(recipe_args.rollout)}: allowed are 'transformers', 'vllm' (servers) and 'vllm-colocate'."
        )
    if training_args.use_vllm:
        raise RecipeError(
            "rollout and use_vllm: the second is TRL's own way, which merges the adapter and sends all weights: set one."
        )
    is_quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if is_quantized and tinylora_args.tinylora_basis != "full-precision":
        raise RecipeError(
            f"rollout: {recipe_args.rollout} on a quantized base: vLLM has the weights of the checkpoint, and the adapter's "
            "basis would be that of the quantized ones: set tinylora_basis: full-precision."
        )
    modes = ("token_truncate", "token_mask")
    if training_args.loss_type == "vespo" and training_args.vllm_importance_sampling_mode not in modes:
        raise RecipeError(
            f"loss_type: vespo with vllm_importance_sampling_mode: {training_args.vllm_importance_sampling_mode}: that loss "
            f"needs {' or '.join(modes)}."
        )
    if recipe_args.rollout == "vllm" and not training_args.vllm_server_base_url:
        raise RecipeError("rollout: vllm: set vllm_server_base_url to the servers' URLs, separated by commas.")
    if recipe_args.rollout == "vllm-colocate" and training_args.world_size > 1:
        raise RecipeError(
            f"rollout: vllm-colocate with {training_args.world_size} processes: it is for one. With more GPUs, let vLLM "
            "servers have some of them: rollout: vllm."
        )


class _NothingToSend:
    """In the place of TRL's connection to vLLM: each request carries v."""

    def sync_weights(self) -> None:
        """TRL calls this after each step."""


def weigh_by_importance(trainer: GRPOTrainer) -> None:
    """Lets TRL correct the loss for the difference between vLLM's probabilities and the trainer's, if its options say so.

    TRL does so for its own vLLM only, of which it is told here that it is in use. Not public; the options are
    `vllm_importance_sampling_correction`, `_mode`, `_clip_max` and `_clip_min`.
    """
    trainer.use_vllm = trainer.vllm_importance_sampling_correction
    trainer.vllm_generation = cast(Any, _NothingToSend())
    trainer._last_loaded_step = -1
