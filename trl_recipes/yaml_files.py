"""A YAML file, which may be anybody's -> the values in it, or one line that says what is wrong with it.

Tags make nothing but plain values. A name for a part (`&name`, `*name`) may stand for it in many places, and those for
others in many places again: a few lines that would be gigabytes once somebody writes them out, so what a file amounts to
is counted before anything is made of it.
"""

from pathlib import Path

import yaml

from trl_recipes.errors import RecipeError, in_one_line, shown


MOST_VALUES = 100_000  # the longest file of this repository amounts to 800
MOST_DEPTH = 50  # parts within parts; the deepest file of this repository has 8


class Loader(yaml.SafeLoader):
    """PyYAML's, which takes seconds for thousands of parts within each other, and gives up at Python's depth of calls."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Reads a part with all that is within it."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.YAMLError(f"more than {MOST_DEPTH} parts within each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path, what: str = "file") -> object:
    """
    Reads the one document of a YAML file.

    Args:
        path (`Path`):
            The file.
        what (`str`, *optional*, defaults to `"file"`):
            What it is, for the error where it is missing.

    Raises:
        RecipeError: if it cannot be read, is no YAML, has more than `MOST_DEPTH` parts within each other, or amounts to
            more than `MOST_VALUES` values.
    """
    name = shown(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"no {what} {name} (looked from {Path.cwd()}): check the path.") from error
    except OSError as error:
        raise RecipeError(f"{what} {name} cannot be read ({error.strerror}): check the path.") from error
    except ValueError as error:  # a path or a text of bytes that are no characters
        raise RecipeError(f"{name} is not valid YAML: {in_one_line(error)}") from error
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size = size_of(node, {})
        if size <= MOST_VALUES:
            return loader.construct_document(node)
    # What PyYAML's constructors stumble over where a number, a date or a tag is none.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid YAML: {in_one_line(error)}") from error
    raise RecipeError(
        f"{path} amounts to more than {MOST_VALUES} values, by parts that repeat each other or themselves: write it shorter."
    )


def size_of(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a part amounts to, with all that names in it stand for; infinity where it is in itself.

    Args:
        node (`yaml.Node`):
            The part.
        known (`dict[int, float]`):
            Of the parts that were counted, by identity; filled in.
    """
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted: what it is met in is itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(size_of(part, known) for part in pairs)
    return known[id(node)]
