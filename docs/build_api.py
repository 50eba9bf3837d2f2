"""Builds the pages of the API from the docstrings: `make docs`, or

python docs/build_api.py outputs/docs
"""

import re
import sys
from pathlib import Path
from typing import get_type_hints

import pdoc
from pdoc.doc import Class, Module

from peft_tinylora import TinyLoraConfig, __version__


PACKAGES = ("peft_tinylora", "trl_recipes")
# pdoc links names in backticks by itself; Hugging Face's brackets around them, and `~` for a short name, would stay.
REFERENCE = re.compile(r"\[`~?([^`\]]+)`\]")


def main(folder: Path) -> None:
    """Write a page for each module into `folder`, with an index and a search."""
    # PEFT's dataclass names its types as text, for the names that its own module imports.
    TinyLoraConfig.__init__.__annotations__ |= get_type_hints(TinyLoraConfig)
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"peft-tinylora {__version__}")
    modules = {name: Module.from_name(name) for name in pdoc.extract.walk_specs(PACKAGES)}
    for module in modules.values():
        mend_references(module)
    for name, module in modules.items():
        write(folder / f"{name.replace('.', '/')}.html", pdoc.render.html_module(module, modules))
    write(folder / "index.html", pdoc.render.html_index(modules))
    write(folder / "search.js", pdoc.render.search_index(modules))


def mend_references(namespace: Module | Class) -> None:
    """Write references in the docstrings of a module or class as pdoc reads them."""
    namespace.docstring = REFERENCE.sub(r"`\1`", namespace.docstring)
    for member in namespace.members.values():
        if isinstance(member, (Module, Class)):
            mend_references(member)
        else:
            member.docstring = REFERENCE.sub(r"`\1`", member.docstring)


def write(file: Path, text: str) -> None:
    """Write a file, and the folders that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
