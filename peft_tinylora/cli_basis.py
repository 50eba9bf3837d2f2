"""`peft-tinylora basis ...`: the basis cache, its files on the Hub, and how a base model is loaded for either."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

from . import basis_cache, basis_hub
from .assignment import requests_of
from .basis import Basis
from .build import build_bases, file_name, verified
from .config import TinyLoraConfig
from .errors import BasisError


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: AutoModel,
}


def add_basis_commands(basis: argparse._SubParsersAction) -> None:
    """The commands after `peft-tinylora basis`."""
    basis.add_parser("list", help="what is cached").set_defaults(run=list_bases)
    build = basis.add_parser("build", help="compute and keep the basis of a base model")
    build.set_defaults(run=build_basis)
    verify = basis.add_parser("verify", help="check every byte; with a model, every factor against its weights")
    verify.set_defaults(run=verify_bases)
    clear = basis.add_parser("clear", help="remove the files of a base model, or all")
    clear.add_argument("model", nargs="?", metavar="MODEL", help="id or folder of the base model")
    clear.set_defaults(run=clear_bases)
    push = basis.add_parser("push", help="upload the basis of a base model")
    push.set_defaults(run=push_basis)
    pull = basis.add_parser("pull", help="download the basis of a base model and verify it")
    pull.set_defaults(run=pull_basis)
    for command in (build, verify, push, pull):
        add_model_options(command, "?" if command is verify else None)
    for command in (push, pull):
        command.add_argument("repository", metavar="REPOSITORY", help="Hub id, user/name")
    push.add_argument("--private", action="store_true", help="if the repository is made here")


def add_model_options(parser: argparse.ArgumentParser, nargs: str | None) -> None:
    """The options that say which basis is meant."""
    parser.add_argument("model", nargs=nargs, metavar="MODEL", help="id or folder of the base model")
    parser.add_argument("--r", type=int, default=2, help="rank (default: 2)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="default: all-linear")
    add_loading_options(parser)
    parser.add_argument("--dtype", default="auto", help="of what is not quantized (default: that of the checkpoint)")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """The options that say in which form a base model is loaded."""
    parser.add_argument("--load-in-4bit", action="store_true", help="quantize it with bitsandbytes")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4", help="of 4 bits (default: nf4)")
    parser.add_argument("--load-in-8bit", action="store_true", help="quantize it with bitsandbytes")


def load_base(
    name: str,
    options: argparse.Namespace,
    dtype: str = "auto",
    revision: str | None = None,
    task_type: TaskType | None = TaskType.CAUSAL_LM,
) -> nn.Module:
    """The base model, on the GPU if there is one and it is quantized, else on the CPU."""
    loading: dict[str, Any] = {}
    if options.load_in_4bit or options.load_in_8bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=options.load_in_4bit,
            load_in_8bit=options.load_in_8bit,
            bnb_4bit_quant_type=options.quant_type,
        )
        loading["device_map"] = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
    auto_class = AUTO_CLASSES.get(task_type, AutoModelForCausalLM)
    return auto_class.from_pretrained(name, dtype=dtype, revision=revision, **loading)


class BaseBasis:
    """The base model that the options name, and its basis file.

    Args:
        options (`argparse.Namespace`): of [`add_model_options`].

    Raises:
        BasisError: if the cache is switched off.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        targets = options.target_modules[0] if len(options.target_modules) == 1 else options.target_modules
        config = TinyLoraConfig(r=options.r, tie="none", target_modules=targets)
        self.requests, self.source = requests_of(load_base(options.model, options, options.dtype), config)
        self.name = file_name(self.requests, self.source)
        path = basis_cache.place(self.source.base, self.name)
        if path is None:
            raise BasisError("the basis cache is switched off: unset PEFT_TINYLORA_CACHE, or name a folder.")
        self.path: Path = path

    def build(self) -> None:
        """Compute what is not kept yet, and keep it; raises [`BasisError`] where it cannot be kept."""
        build_bases(self.requests, self.source, sigma="left", canonical=True)
        self.check_kept()

    def check_kept(self) -> None:
        """Raises [`BasisError`] where the cache could not be written, which elsewhere is a warning."""
        if self.wrong_modules(basis_cache.read(self.path)):
            raise BasisError(
                f"the basis was not kept in {self.path.parent}: make that folder one that can be written to, with room for it, "
                "or name another by PEFT_TINYLORA_CACHE."
            )

    def wrong_modules(self, kept: dict[str, Basis]) -> list[str]:
        """The modules of which `kept` has no basis of their weight."""
        return [q.key for q in self.requests if verified(kept.get(q.key), q.read(), q) is None]


def list_bases(options: argparse.Namespace) -> int:
    """Prints a line for each file, the last used first, and their sum against the limit."""
    entries = basis_cache.entries()
    print(f"{'size':>9}  {'last used':<16}  {'modules':>7}  {'r':>3}  {'weights':<14}  base model")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        about = {key: entry.metadata.get(key, "?") for key in ("modules", "r", "weights")}
        base = entry.metadata.get("base", f"damaged: {entry.path}")
        print(
            f"{entry.size_bytes / 1e6:>6.1f} MB  {used:<16}  {about['modules']:>7}  {about['r']:>3}  "
            f"{about['weights']:<14}  {base}"
        )
    total = sum(entry.size_bytes for entry in entries)
    folder = basis_cache.cache_folder() or "nowhere: PEFT_TINYLORA_CACHE=off"
    print(
        f"{len(entries)} files, {total / 1e6:.1f} MB of at most {basis_cache.size_limit_bytes() / 1e6:.0f} MB, in {folder}"
    )
    return 0


def build_basis(options: argparse.Namespace) -> int:
    """Computes the basis of a base model, or finds it kept, and prints where."""
    basis = BaseBasis(options)
    started = time.perf_counter()
    basis.build()
    seconds, megabytes = time.perf_counter() - started, basis.path.stat().st_size / 1e6
    print(f"{len(basis.requests)} modules in {seconds:.1f} s: {basis.path} ({megabytes:.1f} MB)")
    return 0


def verify_bases(options: argparse.Namespace) -> int:
    """Checks every file, or the factors of one base model; prints what fails."""
    if options.model is None:
        entries = basis_cache.entries()
        damaged = [entry.path for entry in entries if not entry.metadata]
        for path in damaged:
            print(f"damaged: {path}")
        print(f"{len(entries)} files, {len(damaged)} damaged")
        return int(bool(damaged))
    basis = BaseBasis(options)
    kept = basis_cache.read(basis.path)
    if not kept:
        raise BasisError(
            f"no sound basis of {options.model} is kept in {basis.path}: run `peft-tinylora basis build`."
        )
    wrong = basis.wrong_modules(kept)
    for key in wrong:
        print(f"not of these weights: {key}")
    print(f"{len(basis.requests)} modules, {len(wrong)} with another basis, in {basis.path}")
    return int(bool(wrong))


def clear_bases(options: argparse.Namespace) -> int:
    """Removes files and names them."""
    removed = basis_cache.clear(options.model)
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} files removed")
    return 0


def push_basis(options: argparse.Namespace) -> int:
    """Uploads the basis of a base model, which is built first if it is not kept."""
    basis = BaseBasis(options)
    basis.build()
    url = basis_hub.push(basis.path, options.repository, private=options.private or None)
    print(f"pushed {basis.path.name} ({basis.path.stat().st_size / 1e6:.1f} MB): {url}")
    print(f"name it in an adapter's config: basis_repo={options.repository!r}")
    return 0


def pull_basis(options: argparse.Namespace) -> int:
    """Downloads the basis of a base model into the cache, once every factor was checked against the weights."""
    basis = BaseBasis(options)
    fetched = basis_hub.fetch(options.repository, basis.name)
    kept = {} if fetched is None else basis_cache.read(fetched)
    wrong = basis.wrong_modules(kept)
    if wrong:
        raise BasisError(
            f"{options.repository} has no basis of {len(wrong)} of {len(basis.requests)} modules, such as {wrong[0]!r}; "
            "nothing was kept. Load the base model as it was pushed, or run `peft-tinylora basis build`."
        )
    basis_cache.write(basis.path, kept, basis.source.base, basis.source.form)
    basis.check_kept()
    print(f"{len(basis.requests)} modules verified: {basis.path}")
    return 0
