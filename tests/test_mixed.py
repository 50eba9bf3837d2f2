"""Rows of a batch with adapters of their own, against one batch for each adapter."""

import threading
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from support import IS_TORCH_2_6, fill_vectors
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, MixtralConfig, MixtralForCausalLM

from peft_tinylora import TinyLoraConfig


TILED = {"r": 2, "u": 2, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}
NAMES = ["b", "__base__", "a"]


def with_adapters(model: nn.Module, **fields: object) -> nn.Module:
    """`model` with adapters "a" and "b" over one basis; `fields` are those of "b", if it has another."""
    model = get_peft_model(model, TinyLoraConfig(**TILED), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(**{**TILED, **fields}))
    for seed, name in enumerate("ab"):
        fill_vectors(model, 0.5, seed=seed, adapter_name=name)
    return model.eval()


def one_by_one(model: nn.Module, inputs: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Logits of every row, computed in a batch of its own by the adapter that is switched to."""
    rows = []
    for row, name in zip(inputs, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(row[None]).logits)
    return torch.cat(rows)


OTHER_BASES = {
    "same basis": {},
    "other rank": {"r": 3},
    "other projection": {"projection_seed": 1},
    "other modules": {"target_modules": ["q_proj", "up_proj"]},
    "other tying": {"tie": "structured", "n_tie": 2},
    "split": {"sigma": "split"},
}


@pytest.mark.parametrize("other", OTHER_BASES)
@pytest.mark.parametrize("grad", [True, False])
def test_every_row_has_its_own_adapter(tiny_llama, tokens, other: str, grad: bool) -> None:
    model = with_adapters(tiny_llama(), **OTHER_BASES[other])
    with torch.set_grad_enabled(grad):
        expected = one_by_one(model, tokens, NAMES)
        torch.testing.assert_close(model(tokens, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, one_by_one(model, tokens, ["a", "__base__", "b"]), atol=1e-2)


def test_gradients_reach_the_inputs_of_a_mixed_batch(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    embedded = model.get_input_embeddings()(tokens).detach()
    mixed, rows = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    model(inputs_embeds=mixed, adapter_names=["b", "a", "a"]).logits.square().sum().backward()
    for row, name in enumerate("baa"):
        model.set_adapter(name)
        model(inputs_embeds=rows[row : row + 1]).logits.square().sum().backward()
    torch.testing.assert_close(mixed.grad, rows.grad, rtol=1e-3, atol=1e-4)


def test_rows_without_an_adapter_are_those_of_the_base_to_the_bit(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    mixed = model(tokens, adapter_names=NAMES).logits
    with model.disable_adapter():
        assert torch.equal(mixed[1], model(tokens).logits[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_and_under_autocast(tiny_llama, tokens, dtype: torch.dtype) -> None:
    model = with_adapters(tiny_llama())
    expected = one_by_one(model, tokens, NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(tokens, adapter_names=NAMES).logits.float(), expected, rtol=0.1, atol=0.1)
    model = with_adapters(tiny_llama().to(dtype))
    got = model(tokens, adapter_names=NAMES).logits
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), one_by_one(model, tokens, NAMES).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": False, "num_beams": 4, "num_return_sequences": 2}]
)
def test_generate(tiny_llama, tokens, options: dict) -> None:
    model = with_adapters(tiny_llama())
    options = {"max_new_tokens": 6, "eos_token_id": None, **options}
    mixed = model.generate(input_ids=tokens, adapter_names=NAMES, **options)
    alone = []
    for row, name in zip(tokens, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(input_ids=row[None], **options))
        else:
            model.set_adapter(name)
            alone.append(model.generate(input_ids=row[None], **options))
    assert torch.equal(mixed, torch.cat(alone))


def test_several_sequences_of_each_row(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    done = model.generate(
        input_ids=tokens, adapter_names=NAMES, do_sample=True, num_return_sequences=4, max_new_tokens=1,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = one_by_one(model, tokens, NAMES)[:, -1].repeat_interleave(4, dim=0)
    torch.testing.assert_close(done.logits[0], expected, rtol=1e-4, atol=1e-5)


def test_beams_of_an_encoder_and_a_decoder() -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 48,
        "max_position_embeddings": 40,
    }
    bart = BartForConditionalGeneration(BartConfig(**shape, **heads))
    model = with_adapters(bart)
    tokens = torch.randint(4, 48, (3, 10))
    options = {"max_new_tokens": 5, "num_beams": 3, "min_new_tokens": 5}
    mixed = model.generate(input_ids=tokens, adapter_names=NAMES, **options)
    for row in (0, 2):
        model.set_adapter(NAMES[row])
        assert torch.equal(mixed[row], model.generate(input_ids=tokens[row : row + 1], **options)[0])


def test_embedding_and_classifier_head() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids).mean(1))

    config = {"u": 2, "tie": "full", "target_modules": ["embed", "head"]}
    model = get_peft_model(Classifier(), TinyLoraConfig(**config), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(**config))
    for seed, name in enumerate("ab"):
        fill_vectors(model, 0.5, seed=seed, adapter_name=name)
    model.eval()
    ids = torch.randint(11, (4, 6))
    mixed = model(ids, adapter_names=["a", "b", "b", "a"])
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], model(ids[rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 4, 5), (4, 2, 3)])
def test_embedding_of_ids_of_any_shape(shape: tuple[int, ...]) -> None:
    config = {"u": 2, "tie": "full", "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Embedding(11, 8)), TinyLoraConfig(**config), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(**config))
    for seed, name in enumerate("ab"):
        fill_vectors(model, 0.5, seed=seed, adapter_name=name)
    model.eval()
    ids = torch.randint(11, shape)
    mixed = model(ids, adapter_names=["a", "b", "b", "a"])
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], model(ids[rows]), rtol=1e-5, atol=1e-6)


def test_modules_saved_whole_take_their_rows_too(tiny_llama, tokens) -> None:
    model = with_saved_head(tiny_llama())
    expected = one_by_one(model, tokens, ["a", "b", "a"])
    torch.testing.assert_close(model(tokens, adapter_names=["a", "b", "a"]).logits, expected, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 3, "num_beams": 2, "eos_token_id": None}
    mixed = model.generate(input_ids=tokens, adapter_names=["a", "b", "a"], **options)
    model.set_adapter("b")
    assert torch.equal(mixed[1], model.generate(input_ids=tokens[1:2], **options)[0])


def with_saved_head(model: nn.Module) -> nn.Module:
    """`model` with adapters that have a head of their own."""
    config = {**TILED, "target_modules": ["q_proj"], "n_tie": 2, "modules_to_save": ["lm_head"]}
    model = get_peft_model(model, TinyLoraConfig(**config), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(**config))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(-1)
    return model.eval()


def compiled(model: nn.Module) -> nn.Module:
    """`model`, its MLPs compiled."""
    model = with_adapters(model)
    for layer in model.base_model.model.model.layers:
        layer.mlp.compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [with_adapters, with_saved_head, compiled])
def test_threads_have_batches_of_their_own(tiny_llama, tokens, make: Callable[[nn.Module], nn.Module]) -> None:
    model = make(tiny_llama())
    orders = [NAMES, ["a", "a", "b"], ["__base__", "b", "b"]]
    with torch.no_grad():
        expected = [model(tokens, adapter_names=names).logits for names in orders]
        plain = model(tokens).logits
    wrong, start = [], threading.Barrier(len(orders) + 1)

    def serve(names: list[str] | None, wanted: torch.Tensor) -> None:
        start.wait()
        options = {} if names is None else {"adapter_names": names}
        with torch.no_grad():
            for _ in range(25):
                try:
                    logits = model(tokens, **options).logits
                except Exception as error:
                    wrong.append(error)
                    raise
                if not torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5):
                    wrong.append(names)

    jobs = [*zip(orders, expected, strict=True), (None, plain)]
    threads = [threading.Thread(target=serve, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch._dynamo.reset()
    assert not wrong


def test_a_model_that_is_called_while_it_generates(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(input_ids=tokens, adapter_names=NAMES, **options)

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model(ids, adapter_names=["a", "a", "b"])
        return scores

    got = model.generate(input_ids=tokens, adapter_names=NAMES, logits_processor=[processor], **options)
    assert torch.equal(got, wanted)


def test_beams_of_the_models_own_settings(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="adapter_names has 3 names, and module '.*' sees 6 rows"):
        model(tokens.repeat(2, 1), adapter_names=NAMES)
    for options in ({"max_new_tokens": 4}, {"generation_config": GenerationConfig(max_new_tokens=4)}):
        mixed = model.generate(input_ids=tokens, adapter_names=NAMES, eos_token_id=None, **options)
        model.set_adapter("b")
        assert torch.equal(mixed[0], model.generate(input_ids=tokens[:1], eos_token_id=None, **options)[0])


def test_no_row_is_rounded_to_the_dtype_of_anothers_v(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    for v in model.tinylora_v["a"].values():
        v.data = v.data.bfloat16()
    one, other = (model(tokens[:2], adapter_names=names).logits for names in (["a", "b"], ["b", "b"]))
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_nothing_stays_after_an_error(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    plain = model(tokens).logits
    with pytest.raises(ValueError, match="adapter_names has 2 names, and module '.*' sees 3 rows"):
        model(tokens, adapter_names=["a", "b"])
    assert torch.equal(model(tokens).logits, plain)
    assert not model.tinylora_v.mixed_batches


@pytest.mark.skipif(IS_TORCH_2_6, reason="torch 2.6 cannot trace transformers' models, adapter or not")
def test_compiled_model(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama())
    expected = model(tokens, adapter_names=NAMES).logits
    model.get_base_model().compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)
        for name in "ab":
            model.set_adapter(name)
            rows = [row for row, of in enumerate(NAMES) if of == name]
            torch.testing.assert_close(model(tokens).logits[rows], expected[rows], rtol=1e-4, atol=1e-5)


MISTAKES = {
    "unknown": (["a", "c", "__base__"], ValueError, r"unknown adapters: 'c'\. The model has 'a', 'b'"),
    "too many": (["a"] * 4, ValueError, "has 4 names, and module '.*' sees 3 rows"),
    "empty": ([], ValueError, "has 0 names"),
    "one name": ("a", TypeError, "a list of adapter names is needed"),
    "no names": ([0, 1, 0], TypeError, "a list of adapter names is needed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tiny_llama, tokens, mistake: str) -> None:
    model = with_adapters(tiny_llama())
    names, error, message = MISTAKES[mistake]
    for call in (model, model.generate):
        with pytest.raises(error, match=message):
            call(input_ids=tokens, adapter_names=names)


def test_what_cannot_be_mixed_is_refused(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama()).train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        model(tokens, adapter_names=NAMES)
    model.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"adapters are merged into 'model\.layers\.0\.self_attn\.q_proj': unmerge"):
        model(tokens, adapter_names=NAMES)
    model.unmerge_adapter()
    model(tokens, adapter_names=NAMES)


def test_layers_that_no_adapter_has_any_more_do_not_matter(tiny_llama, tokens) -> None:
    model = with_adapters(tiny_llama(), target_modules=["lm_head"], n_tie=1)
    model.delete_adapter("b")
    expected = one_by_one(model, tokens, ["a", "__base__", "a"])
    mixed = model(tokens, adapter_names=["a", "__base__", "a"]).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_experts_are_refused(tokens) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    config = TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    model = get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match=r"'.*experts\.gate_up_proj' belongs to experts, which see tokens"):
        model(tokens, adapter_names=["default"] * 3)
