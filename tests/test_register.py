"""Taking TINYLORA over, once, and giving it back."""

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_tinylora


@pytest.fixture(autouse=True)
def _registered():
    yield
    peft_tinylora.register()


def test_importing_takes_peft_over_in_its_own_dictionaries() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["TINYLORA"] is peft_tinylora.TinyLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["TINYLORA"] is peft_tinylora.TinyLoraModel
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING is PEFT_TYPE_TO_TUNER_MAPPING
    assert peft.TinyLoraConfig.__module__ == "peft.tuners.tinylora.config"


def test_registering_twice_and_giving_back() -> None:
    peft_tinylora.register()
    peft_tinylora.unregister()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["TINYLORA"] is peft.TinyLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["TINYLORA"] is peft.TinyLoraModel
    assert peft.inject_adapter_in_model.__module__ == "peft.mapping"
    assert peft.PeftModel.load_adapter.__code__.co_filename.endswith("peft_model.py")
    peft_tinylora.unregister()
    peft_tinylora.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["TINYLORA"] is peft_tinylora.TinyLoraConfig


def test_every_public_name_exists() -> None:
    assert all(getattr(peft_tinylora, name) is not None for name in peft_tinylora.__all__)
