"""The code blocks of the documentation, and a shell in which they run as they stand, quickly and away from the network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.machine import ROOT, Machine, environment
from markdown_it import MarkdownIt
from support import warm_python


# What a clone has and blocks read; what they may write to is copied, the rest linked.
LINKED = ("trl_recipes", "peft_tinylora", "benchmarks", "Makefile", "pyproject.toml", "constraints.txt")
COPIED = ("model_cards", "docs")
DATA = ("", "text", "json", "yaml")  # languages of blocks that are no code
COMMANDS = {"accelerate", "export", "make", "peft-tinylora", "pip", "python", "source", "vllm"}
NOT_RUN = "no-run:"
# Recipes train and score briefly behind whatever a block says; docs/README.md tells the reader so.
BRIEFLY = {
    "grpo.py": "--max_steps 1 --max_eval_problems 8",
    "sft.py": "--max_steps 1 --max_eval_problems 8",
    "score.py": "--max_problems 8",
}


@dataclass(frozen=True)
class Block:
    """A code block: what its fence says after the language, its text, and the line where it begins."""

    language: str
    remark: str
    text: str
    line: int

    @property
    def is_code(self) -> bool:
        return self.language not in DATA

    @property
    def reason_not_to_run(self) -> str:
        return self.remark.partition(NOT_RUN)[2].strip()

    @property
    def is_run(self) -> bool:
        return self.is_code and not self.reason_not_to_run

    @property
    def is_dry(self) -> bool:
        """Whether nothing in it is really run: `make` is asked what it would do, and pip has nothing to install."""
        commands = [line.split()[0] for line in self.text.splitlines() if line.strip() and not line.startswith("#")]
        return self.language == "bash" and set(commands) <= {"make", "pip", "source"}


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page, also those without a language: those are commands where a line begins like one."""
    blocks = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type not in ("fence", "code_block"):
            continue
        language, _, remark = token.info.strip().partition(" ")
        if not language and any(program_of(line) in COMMANDS for line in token.content.splitlines()):
            language = "bash"
        blocks.append(Block(language, remark, token.content, token.map[0] + 1))
    return blocks


def program_of(line: str) -> str:
    """The name of the program that a line would start, behind variables that it sets and a prompt; or its first word."""
    return Path(re.sub(r"^\s*(\$\s+)?(\w+=\S*\s+)*", "", line).partition(" ")[0]).name


class Shell:
    """A folder that looks like a clone with its environment active; Python starts in it in milliseconds."""

    def __init__(self, hub: Any, folder: Path, programs: Path) -> None:
        self.hub, self.folder = hub, folder
        self._path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()

    def bash(self, script: str) -> str:
        """Run a script as bash would, up to the first command that fails, and return what it printed."""
        return self._run("bash", "-euo", "pipefail", "-c", script)

    def python(self, code: str) -> str:
        """Run Python in a process of its own, which has nothing of this project imported, and return what it printed."""
        return self._run("python", "-c", code)

    def _run(self, *command: str) -> str:
        own = environment(self.hub, self.folder.parent / "home", PATH=self._path)
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=own,
            executable=shutil.which(command[0], path=self._path),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    @contextmanager
    def session(self) -> Iterator[Machine]:
        """A Python process that blocks run in one after the other, as in a notebook."""
        machine = Machine(self.hub, self.folder.parent / "home")
        machine.script(f"import os\nos.chdir({str(self.folder)!r})")
        yield machine
        machine.close()


def write_programs(folder: Path) -> Path:
    """Programs for the shell's PATH: Python and what is written in it by the warm interpreter, `make` dry, `pip` idle."""
    folder.mkdir()
    warm = f'exec {" ".join(warm_python()[:-1])} "$(basename "$0")" "$@"\n'
    cases = "".join(f'*{script}\\ *) set -- "$@" {options} ;;\n' for script, options in BRIEFLY.items())
    scripts = dict.fromkeys(("python", "accelerate", "peft-tinylora"), f'case "$* " in\n{cases}esac\n{warm}')
    scripts["make"] = f'exec {shutil.which("make")} --dry-run PYTHON={sys.executable} "$@"\n'
    scripts["pip"] = "exit 0\n"
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    return folder
