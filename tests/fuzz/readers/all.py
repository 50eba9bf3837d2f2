"""Every reader, by name."""

from fuzz.harness import Reader
from fuzz.readers import adapter, answers, basis, cards, inline, recipes, runs


READERS: dict[str, Reader] = {
    reader.name: reader
    for module in (adapter, inline, basis, recipes, runs, answers, cards)
    for reader in module.READERS
}
