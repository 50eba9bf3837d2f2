"""Everything that a LoRA user does with a model, done with TinyLoRA."""

import copy
import io

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from support import IS_TORCH_2_6, TRANSFORMERS_REFUSES_PEFT, fill_vectors

from peft_tinylora import ConfigError, TinyLoraConfig, TinyLoraLayer, build, projection


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_trains_seven_numbers_and_nothing_else(tiny_llama, tokens, capsys) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.print_trainable_parameters()
    assert "trainable params: 7 ||" in capsys.readouterr().out
    assert trained_names(model) == [f"base_model.tinylora_v.default.{i}" for i in range(7)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained_names(model))


def test_each_vector_is_registered_once(tiny_llama, tmp_path) -> None:
    from safetensors.torch import save_file

    model = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="none", target_modules="all-linear"))
    keys = [key for key in model.state_dict() if "tinylora_v" in key]
    assert len(keys) == 28
    assert all("tinylora_" in name for name, _ in model.named_buffers() if "rotary" not in name)
    save_file(model.state_dict(), tmp_path / "all.safetensors")  # refuses tensors that share memory


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # transformers renames it, TRL uses the old name
def test_gradient_checkpointing_gives_the_same_gradient(tiny_llama, tokens) -> None:
    gradients = []
    for use_reentrant in (None, True, False):
        model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
        fill_vectors(model, 0.1)
        model.train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([v.grad for v in model.tinylora_v["default"].values()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert gradients[0].abs().min() > 0


def test_several_adapters_switch_disable_and_delete(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    base = model.get_base_model()
    with model.disable_adapter():
        bare = base(tokens).logits
    model.add_adapter("second", TinyLoraConfig(u=2, tie="structured", n_tie=2, target_modules=["q_proj", "up_proj"]))
    assert trained_names(model) == [f"base_model.tinylora_v.default.{i}" for i in range(7)]
    fill_vectors(model, 0.5, seed=1)
    fill_vectors(model, 0.5, seed=2, adapter_name="second")
    first = model(tokens).logits
    model.set_adapter("second")
    assert trained_names(model) == [f"base_model.tinylora_v.second.{i}" for i in range(4)]
    second = model(tokens).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(tokens).logits
    outputs = [bare, first, second, both]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, bare)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert "default" not in model.tinylora_v
    assert not [key for key in model.state_dict() if ".default" in key]
    torch.testing.assert_close(model(tokens).logits, second)


def test_adding_an_adapter_leaves_a_frozen_one_frozen(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("second", TinyLoraConfig(**TILED))
    assert trained_names(model) == []


@pytest.mark.parametrize("targets", [r".*(q_proj|up_proj)", ["q_proj", "up_proj"]])
@pytest.mark.parametrize("tying", [{"weight_tying": 0.5}, {"tie": "tiled", "n_tie": 2}])
def test_second_adapter_is_what_it_would_be_alone(tiny_llama, tokens, targets, tying) -> None:
    # Stock PEFT counts a regex's matches twice and seeds P by the first adapter's indices.
    second = {"u": 2, "target_modules": targets, **tying}
    alone = get_peft_model(tiny_llama(), TinyLoraConfig(**second), adapter_name="second")
    beside = get_peft_model(tiny_llama(), TinyLoraConfig(**{**TILED, "target_modules": ["v_proj", "q_proj"]}))
    beside.add_adapter("second", TinyLoraConfig(**second))
    beside.set_adapter("second")
    assert list(beside.tinylora_v["second"]) == list(alone.tinylora_v["second"])
    for model in (alone, beside):
        fill_vectors(model, 0.5, adapter_name="second")
    torch.testing.assert_close(beside(tokens).logits, alone(tokens).logits, rtol=0, atol=0)


def test_which_modules_are_adapted(tiny_llama) -> None:
    def adapted(**fields: object) -> list[str]:
        return get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", **fields)).targeted_module_names

    assert len(adapted(target_modules="all-linear")) == 28  # and not lm_head
    assert adapted(target_modules=["q_proj"], layers_to_transform=[1, 3]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
    ]
    without_mlp = adapted(target_modules="all-linear", exclude_modules=r".*mlp.*")
    assert len(without_mlp) == 16 and not any("mlp" in name for name in without_mlp)
    assert len(adapted(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])) == 4
    assert len(get_peft_model(tiny_llama(), TinyLoraConfig(u=1, r=1)).targeted_module_names) == 8  # q, v by default


def test_adding_a_target_changes_no_other_projection(tiny_llama) -> None:
    few = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["v_proj"]))
    more = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["q_proj", "v_proj"]))
    for i in range(4):
        of_few = few.base_model.model.model.layers[i].self_attn.v_proj.tinylora_P["default"]
        of_more = more.base_model.model.model.layers[i].self_attn.v_proj.tinylora_P["default"]
        assert torch.equal(of_few, of_more)


def test_modules_to_save_and_biases_train(tiny_llama) -> None:
    model = get_peft_model(
        tiny_llama(attention_bias=True),
        TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"], modules_to_save=["lm_head"], bias="tinylora_only"),
    )
    names = trained_names(model)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in names
    assert len(names) == 1 + 4 + 1


def test_trainable_token_indices(tiny_llama, tokens) -> None:
    model = get_peft_model(
        tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    )
    assert sum(model.get_parameter(name).numel() for name in trained_names(model)) == 1 + 2 * 32
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_deepcopy_and_pickle_keep_v_shared(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**{**TILED, "n_tie": 28}))
    fill_vectors(model, 0.2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(tokens).logits, model(tokens).logits)
        fill_vectors(twin, 0.9, seed=9)
        assert not torch.allclose(twin(tokens).logits, model(tokens).logits, atol=1e-3)
        layers = twin.base_model.model.model.layers
        assert layers[0].self_attn.q_proj.tinylora_v is layers[3].mlp.up_proj.tinylora_v is twin.base_model.tinylora_v


def test_prepare_model_for_kbit_training_is_harmless(tiny_llama, tokens) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(tiny_llama()), TinyLoraConfig(**TILED))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(v.grad is not None for v in model.tinylora_v["default"].values())


def test_low_cpu_mem_usage_leaves_v_to_be_loaded(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED), low_cpu_mem_usage=True)
    assert {v.device.type for v in model.tinylora_v["default"].values()} == {"meta"}


@pytest.mark.parametrize("name", ["half", "vectors_of", "adapter_banks"])
def test_names_that_torch_cannot_keep_are_refused(tiny_llama, name: str) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    with pytest.raises(ConfigError, match=f"adapter_name='{name}': torch cannot keep parameters under the name"):
        model.add_adapter(name, TinyLoraConfig(**TILED))
    with pytest.raises(ConfigError, match="adapter_name='__base__' is PEFT's name for no adapter"):
        model.add_adapter("__base__", TinyLoraConfig(**TILED))
    assert list(model.peft_config) == ["default"]


def test_generate_follows_the_adapter(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 1.0)
    by_cache = model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = tokens
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(by_cache, ids)


@pytest.mark.skipif(IS_TORCH_2_6, reason="torch 2.6 cannot trace transformers' models, adapter or not")
def test_torch_compile_is_one_graph_while_v_changes(tiny_llama, tokens) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # what other tests compiled of the same code
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model().model, backend=counter, fullgraph=True)
    for seed in range(3):
        fill_vectors(model, 0.3, seed=seed)
        expected = model.get_base_model().model(tokens).last_hidden_state
        torch.testing.assert_close(compiled(tokens).last_hidden_state, expected)
    compiled(tokens).last_hidden_state.sum().backward()
    assert all(v.grad is not None for v in model.tinylora_v["default"].values())
    assert counter.frame_count == 1


@pytest.mark.skipif(IS_TORCH_2_6, reason="torch 2.6 cannot trace transformers' models, adapter or not")
def test_torch_export_takes_v_along(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model, 0.3)
    exported = torch.export.export(model.get_base_model().model, (tokens,), {"use_cache": False}).module()
    expected = model.get_base_model().model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(exported(tokens, use_cache=False).last_hidden_state, expected)


def test_second_adapter_of_the_same_config_has_the_first_ones_factors(tiny_llama, tokens, tmp_path) -> None:
    # TRL makes its reference policy this way and copies the parameters that have ".default." in their name.
    model = get_peft_model(tiny_llama(), TinyLoraConfig(u=2, weight_tying=0.5, target_modules=r".*(q_proj|up_proj)"))
    fill_vectors(model, 0.5)
    for layer in (m for m in model.modules() if isinstance(m, TinyLoraLayer)):
        layer.tinylora_P["default"].normal_()  # as if they came from a file
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = model(tokens).logits
    model.set_adapter("ref")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.skipif(TRANSFORMERS_REFUSES_PEFT, reason="transformers wants a newer PEFT for its own adapter methods")
def test_transformers_own_adapter_methods(tiny_llama, tokens, tmp_path) -> None:
    model = tiny_llama()
    bare = model(tokens).logits
    model.add_adapter(TinyLoraConfig(**TILED), adapter_name="default")
    model.add_adapter(TinyLoraConfig(**TILED, projection_seed=1), adapter_name="second")
    fill_vectors(model, 0.5, adapter_name="second")
    fill_vectors(model, 0.5)
    model.set_adapter("default")
    assert trained_names(model) == [f"tinylora_v.default.{i}" for i in range(7)]
    expected = model(tokens).logits
    assert not torch.allclose(expected, bare, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(model(tokens).logits, bare)
    model.enable_adapters()
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    model.delete_adapter("second")
    assert torch.equal(model(tokens).logits, expected)

    reloaded = tiny_llama()
    reloaded.load_adapter(tmp_path)
    torch.testing.assert_close(reloaded(tokens).logits, expected, rtol=0, atol=0)
    wrapped = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(wrapped(tokens).logits, expected, rtol=0, atol=0)


def test_direct_injection_into_a_plain_module_is_refused() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="shared state.*get_peft_model"):
        peft.inject_adapter_in_model(TinyLoraConfig(u=1, target_modules=["0"]), plain)
    assert isinstance(plain[0], torch.nn.Linear)


def test_fresh_second_adapter_draws_its_own_projection_only_if_the_seed_differs(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.add_adapter("other", TinyLoraConfig(**TILED, projection_seed=43))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = projection.draw_projection(1, 2, projection.seed_of_module(43, "model.layers.0.self_attn.q_proj"))
    assert torch.equal(layer.tinylora_P["other"], expected)
    assert not torch.equal(layer.tinylora_P["other"], layer.tinylora_P["default"])


def test_status_names_the_adapters_of_each_layer(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"]))
    model.add_adapter("other", TinyLoraConfig(u=1, tie="full", target_modules=["v_proj"]))
    available = {status.name: status.available_adapters for status in model.get_layer_status()}
    assert available["model.model.layers.0.self_attn.q_proj"] == ["default"]
    assert available["model.model.layers.0.self_attn.v_proj"] == ["other"]


def test_one_decomposition_for_each_module(tiny_llama, monkeypatch) -> None:
    calls = []
    original = build.compute_basis
    monkeypatch.setattr(build, "compute_basis", lambda *a: calls.append(a[-1]) or original(*a))
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    assert len(calls) == len(set(calls)) == 28


def test_adapter_made_before_the_base_weights_arrive(tiny_llama, tokens) -> None:
    expected = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    with torch.device("meta"):
        empty = type(tiny_llama())(tiny_llama().config)
    model = get_peft_model(empty, TinyLoraConfig(**TILED))
    weights = {key.replace(".weight", ".base_layer.weight") if "_proj" in key else key: tensor
               for key, tensor in tiny_llama().state_dict().items()}  # fmt: skip
    model.get_base_model().load_state_dict(weights, assign=True, strict=False)
    for group in model.tinylora_v["default"]:
        model.tinylora_v["default"][group] = torch.nn.Parameter(torch.zeros(1))
    model.get_base_model().model.rotary_emb = tiny_llama().model.rotary_emb
    for adapted in (model, expected):
        fill_vectors(adapted, 0.5)
    assert torch.equal(model.eval()(tokens).logits, expected(tokens).logits)


def test_nothing_is_left_of_a_deleted_adapter(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.add_adapter("gone", TinyLoraConfig(**TILED))
    layers = [module for module in model.modules() if isinstance(module, TinyLoraLayer)]

    def holders() -> list[str]:
        found = [(name, value) for layer in layers for name, value in [*vars(layer).items(), *layer.named_children()]]
        return [name for name, value in found if hasattr(value, "keys") and "gone" in value.keys()]

    assert holders()
    model.delete_adapter("gone")
    assert holders() == []
