"""An adapter's name and path -> what vLLM is asked to load, the same in the API server and in a training process."""

import hashlib

from vllm.lora.request import LoRARequest

from ..inline import name_of


def lora_request(name: str, path: str) -> LoRARequest:
    """A request with an id that no counter of vLLM's reaches, and that is the same in each of several API servers.

    Args:
        name (`str`): what vLLM calls the adapter; adapters that differ must have names that differ.
        path (`str`): folder of the adapter, or its text.
    """
    digest = hashlib.sha256(f"{name} {path}".encode()).digest()
    return LoRARequest(name, 2**60 + int.from_bytes(digest[:7], "big"), path)


def inline_request(text: str) -> LoRARequest:
    """The request for an inline adapter."""
    return lora_request(name_of(text), text)
