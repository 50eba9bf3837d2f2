"""Stands in for diffusers, which PEFT's test modules import by name and no TinyLoRA test uses."""


class StableDiffusionPipeline:
    """Only ever the right-hand side of an `isinstance` that is false."""
