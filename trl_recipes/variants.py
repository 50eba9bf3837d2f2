"""What is evaluated, and its controls: the adapter, the adapter with all of its numbers at zero, and the untrained base.

    adapter        as saved
    zero adapter   the same path through the same kernels, and nothing added: where its greedy answers differ from the base's,
                   rounding on that path did it, and that much of the adapter's difference is no learning
    base           the same weights, the adapter switched off

The zero of a TinyLoRA is v = 0, that of a plain LoRA B = 0, with whole modules that training saved back at the base's. Of
DoRA, and of methods that multiply, no zero is the base's function, so that they have two variants. A model without an
adapter (a base, a merged one, a full fine-tune) is a variant alone, "model", or beside the untrained one that `base_model`
names, which is loaded after it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from peft_tinylora import TinyLoraConfig
from peft_tinylora.inline import PREFIX, inline_adapter_of_folder, name_of
from peft_tinylora.served import skeleton
from trl_recipes.completing import complete, encode, evaluation_mode, generation_config
from trl_recipes.errors import RecipeError, shown
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.trainer_setup import load_model, model_name
from trl_recipes.vllm_requests import Prompt
from trl_recipes.vllm_servers import VllmServers, split_urls


ADAPTER, ZERO, BASE, MODEL = "adapter", "zero adapter", "base", "model"
SERVER_BATCH = 512  # prompts after which completions of servers are on disk


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at a temperature, from the likeliest that hold `top_p` of the probability together."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Variant:
    """A model that can be asked.

    Args:
        name (`str`): one of the names above.
        complete (`Callable`): prompts and [`Sampling`], or `None` for the likeliest tokens -> a completion each.
        active (`Callable`): a context in which `complete` may be called.
        batch_size (`int`): prompts in a call.
    """

    name: str
    complete: Callable[[list, Sampling | None], list[str]]
    active: Callable[[], AbstractContextManager]
    batch_size: int


def variants_of_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: ScoreArguments,
) -> list[Variant]:
    """The variants of a loaded model, the one that is asked for first.

    Raises:
        RecipeError: if the base cannot be had by switching the adapter off.
    """
    ask = asks_model(model, tokenizer, arguments.longest)
    states: dict[str, Callable[[], AbstractContextManager]] = {
        ADAPTER if isinstance(model, PeftModel) else MODEL: nullcontext
    }
    if isinstance(model, PeftModel) and arguments.controls:
        if zeroed_parameters(model):
            states[ZERO] = lambda: zeroed(model)
        bias = getattr(model.peft_config[model.active_adapter], "bias", "none")
        if bias != "none":
            raise RecipeError(
                f"the adapter was trained with bias={shown(bias)}: its biases stay when it is switched off, so that this is no "
                "base: set controls: false."
            )
        states[BASE] = model.disable_adapter
    return [Variant(name, ask, active, arguments.batch_size) for name, active in states.items()]


def asks_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_completion_length: int
) -> Callable[[list, Sampling | None], list[str]]:
    """Returns what [`Variant`] calls `complete`, of a loaded model."""

    def ask(prompts: list, sampling: Sampling | None) -> list[str]:
        drawn = sampling or Sampling()
        config = generation_config(
            model, tokenizer, max_completion_length, sampling is not None, drawn.temperature, drawn.top_p
        )
        with evaluation_mode(model), torch.no_grad():
            return complete(model, tokenizer, prompts, config)

    return ask


def variants_on_servers(
    arguments: ScoreArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Variant]:
    """The same of vLLM servers: adapters are sent as text, zeros too, and the base is asked for by its name.

    Raises:
        RecipeError: if no server answers.
        TinyLoraError: if the adapter is none that a request can carry.
    """
    servers = VllmServers(split_urls(cast(str, arguments.vllm_server_base_url)))
    if arguments.adapter is None:
        models = {MODEL: servers.base_model()}
    else:
        base = skeleton(model_name(model_args), model_args.model_revision, arguments.trust_remote_code)
        adapter = inline_adapter_of_folder(arguments.adapter, base)
        models = {ADAPTER: adapter.text()}
        if arguments.controls:
            models |= {ZERO: adapter.with_vectors(torch.zeros_like(adapter.v)).text(), BASE: servers.base_model()}

    def asks(model: str) -> Callable[[list, Sampling | None], list[str]]:
        def ask(prompts: list, sampling: Sampling | None) -> list[str]:
            answers = servers.generate(
                model,
                [Prompt(encode(tokenizer, [prompt])["input_ids"][0].tolist(), 1) for prompt in prompts],
                max_tokens=arguments.longest,
                expected_model=name_of(model) if model.startswith(PREFIX) else model,
                temperature=0.0 if sampling is None else sampling.temperature,
                top_p=1.0 if sampling is None else sampling.top_p,
                top_k=-1,
                min_p=0.0,
                repetition_penalty=1.0,
            )
            return tokenizer.batch_decode([answer[0].token_ids for answer in answers], skip_special_tokens=True)

        return ask

    return [Variant(name, asks(model), nullcontext, SERVER_BATCH) for name, model in models.items()]


def load_for_scoring(arguments: ScoreArguments, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """Loads the base, and the adapter onto it, on the device where it shall run."""
    model: PreTrainedModel | PeftModel = load_model(model_args, arguments.trust_remote_code)
    if arguments.adapter is not None:
        config = PeftConfig.from_pretrained(arguments.adapter)
        if arguments.basis is not None:
            config.basis = arguments.basis
        model = PeftModel.from_pretrained(model, arguments.adapter, config=config)
    device = "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"
    if not (model_args.load_in_4bit or model_args.load_in_8bit):  # a quantized model was put there while loading
        cast(torch.nn.Module, model).to(device)  # in place; transformers wraps `to` so that its type is lost
    return model


def refuse_options_of_a_loaded_model(arguments: ScoreArguments, model_args: ModelConfig) -> None:
    """Raises [`RecipeError`] for options that servers, which have their own weights, would not heed."""
    given = {
        "basis": arguments.basis,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
    names = [name for name, value in given.items() if value]
    if names:
        raise RecipeError(
            f"{', '.join(names)} with vllm_server_base_url: the servers have their own weights: leave it out."
        )


def check_base_model(arguments: ScoreArguments) -> None:
    """Raises [`RecipeError`] where `base_model` is given and the base is measured without it, or cannot be loaded."""
    if arguments.base_model is None:
        return
    if arguments.adapter is not None:
        raise RecipeError(
            f"base_model={shown(arguments.base_model)} with an adapter: its own base is measured beside it: leave base_model out."
        )
    if arguments.vllm_server_base_url is not None:
        raise RecipeError(
            f"base_model={shown(arguments.base_model)} with vllm_server_base_url: a server has one base, so score each model "
            "with a server of its own, or leave vllm_server_base_url out."
        )


def zeroed_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """The parameters of an adapter whose zero is the base's function; none where there is no such zero."""
    config = model.peft_config[model.active_adapter]
    if isinstance(config, TinyLoraConfig):
        names: tuple[str, ...] = ("tinylora_v",)
    elif isinstance(config, LoraConfig) and not config.use_dora and config.bias == "none":
        names = ("lora_B.", "lora_embedding_B.")
    else:
        return []
    return [parameter for name, parameter in model.named_parameters() if any(part in name for part in names)]


@contextmanager
def zeroed(model: PeftModel) -> Iterator[None]:
    """Sets an adapter's numbers to zero, and whole saved modules to the base's, and puts all back."""
    parameters = zeroed_parameters(model)
    saved = [parameter.detach().clone() for parameter in parameters]
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    try:
        for parameter in parameters:
            parameter.data.zero_()
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        yield
    finally:
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.data.copy_(value)
        for wrapper in wrappers:
            wrapper.enable_adapters(True)
