"""Repositories that mean harm: what each of them holds, and what is said of it."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from peft_tinylora import compact


Files = dict[str, bytes]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

PEFT = "PeftModel.from_pretrained"
SECOND = "PeftModel.load_adapter"
AUTO_PEFT = "AutoPeftModelForCausalLM"
AUTO = "AutoModelForCausalLM"
TRANSFORMERS = "load_adapter of transformers"
BANK = "AdapterBank.load"
INSPECT, PULL, EXPORT = "inspect", "pull", "export"
ONTO_A_BASE = (PEFT, SECOND, AUTO_PEFT, AUTO, TRANSFORMERS, EXPORT)
WITHOUT_A_BASE = (BANK, INSPECT, PULL)
ALL = (*ONTO_A_BASE, *WITHOUT_A_BASE)
CATASTROPHE = "(((.|.)*)*)*X"  # years, for a name of 30 characters


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


class Case(NamedTuple):
    """One repository.

    Args:
        make: changes the files of a sound adapter; gets the folder of the marker and of what must not be opened, too.
        message: a regular expression for what is said; `None` where the adapter is sound, and only must not do more.
        ways: by which it is loaded.
        theirs: those of them where PEFT or transformers stumbles first, by an error of its own.
    """

    make: Callable[[Files, Path], Any]
    message: str | None
    ways: tuple[str, ...] = ALL
    theirs: tuple[str, ...] = ()


def fields(**values: object) -> Callable[[Files, Path], None]:
    """A config with other values."""
    return lambda files, folder: files.update({CONFIG: json.dumps({**json.loads(files[CONFIG]), **values}).encode()})


def fingerprint(**values: object) -> Callable[[Files, Path], None]:
    """A config with other values in its fingerprint."""
    return lambda files, folder: fields(fingerprint={**json.loads(files[CONFIG])["fingerprint"], **values})(
        files, folder
    )


def config(text: bytes) -> Callable[[Files, Path], None]:
    """A config of these bytes."""
    return lambda files, folder: files.update({CONFIG: text})


def large(size: int) -> Callable[[Files, Path], None]:
    """A config that is sound but for a field that takes much room."""
    return lambda files, folder: files.update(
        {CONFIG: files[CONFIG].rstrip()[:-1] + b', "a": "' + b"a" * size + b'"}'}
    )


def pickled(is_hostile: bool, name: str = PICKLE) -> Callable[[Files, Path], None]:
    """The weights in a pickle, with a payload or without."""

    def make(files: Files, folder: Path) -> None:
        benign = io.BytesIO()
        torch.save(load(files.pop(WEIGHTS)), benign)
        files[name] = pickle.dumps(Payload(folder / "marker")) if is_hostile else benign.getvalue()

    return make


def header(text: bytes, announced: int | None = None) -> Callable[[Files, Path], None]:
    """Weights with such a header."""
    return lambda files, folder: files.update({WEIGHTS: struct.pack("<Q", announced or len(text)) + text + b"\0" * 64})


def tensors(**more: torch.Tensor) -> Callable[[Files, Path], None]:
    """Tensors beside those of the file, by their names in the base model."""

    def make(files: Files, folder: Path) -> None:
        files[WEIGHTS] = save(
            load(files[WEIGHTS]) | {f"base_model.model.{name}": tensor for name, tensor in more.items()}
        )

    return make


def many_numbers(u: int) -> Callable[[Files, Path], None]:
    """A huge u, with a v to match."""

    def make(files: Files, folder: Path) -> None:
        v = torch.zeros(1, u)
        files[WEIGHTS] = save({"base_model.tinylora_v": v})
        fields(u=u, tie="full", n_tie=None)(files, folder)
        fingerprint(v=compact.fingerprint.digest_of_tensor(v))(files, folder)

    return make


def code(files: Files, folder: Path) -> None:
    """References to a module that leaves a mark when it is imported, in the config and beside it."""
    fields(task_type=None, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"})(files, folder)
    files["evil_module.py"] = files["modeling_evil.py"] = b"import pathlib; pathlib.Path('marker').touch()"
    files["training_args.bin"] = pickle.dumps(Payload(folder / "marker"))


def all_at_once(*makers: Callable[[Files, Path], None]) -> Callable[[Files, Path], None]:
    return lambda files, folder: [make(files, folder) for make in makers]


NO_PICKLES = (
    r"has no adapter_model\.safetensors\. Weights that are pickled \(adapter_model\.bin\) are not read.*as safetensors"
)
TOO_LONG = r"\(\(\(\.\|\.\)\*\)\*\)\*X' in adapter_config\.json takes more than .* s to be matched .*Name the modules in a list"

CASES = {
    # Code
    "a pickle with a payload": Case(pickled(is_hostile=True), NO_PICKLES),
    "a benign pickle": Case(pickled(is_hostile=False), NO_PICKLES),
    "a pickle by the name of safetensors": Case(pickled(True, WEIGHTS), "is cut short.*ownload it again"),
    "a module to import": Case(code, None, tuple(set(ALL) - {AUTO_PEFT})),
    "a module to import, without a task": Case(code, "import allowlist", (AUTO_PEFT,), theirs=(AUTO_PEFT,)),
    # Paths
    "basis_repo upwards": Case(fields(basis_repo="../../secret"), r"basis_repo='../../secret': must be the id of a repo"),
    "basis_repo absolute": Case(fields(basis_repo="/secret/x"), r"basis_repo='/secret/x': must be the id of a repository"),
    "a base by its path": Case(
        lambda files, folder: fields(base_model_name_or_path=str(folder / "secret"), revision="../../secret")(files, folder),
        None,
        # The first two load the base that an adapter names, whatever it is, and PEFT looks at its config on saving.
        tuple(set(ALL) - {AUTO_PEFT, AUTO, EXPORT}),
    ),
    "a base upwards": Case(
        fields(base_model_name_or_path="../secret", target_modules=["../secret"]),
        r"Target modules .*'\.\./secret'.* not found",
        (PEFT, SECOND, TRANSFORMERS, EXPORT),
        theirs=(PEFT, SECOND, TRANSFORMERS),
    ),
    "a tensor with a path": Case(
        tensors(**{"../../secret": torch.zeros(2)}), r"that the adapter does not have \(.*/secret\)", ONTO_A_BASE
    ),
    "files with paths": Case(
        lambda files, folder: files.update({".eval_results/../../../up.yaml": b"x", "../up": b"x", "sub/README.md": b"x"}),
        None,
        (PULL,),
    ),
    # Sizes
    "r giant": Case(fields(r=10**9), "r=1000000000: must be 1048576 at most"),
    "r of thousands of digits": Case(fields(r=10**4000), r"r=10{79}\.\.\.: must be"),
    "r larger than the base": Case(fields(r=10**6), r"r=1000000 is larger than the smallest side of module", ONTO_A_BASE),
    "u giant": Case(fields(u=10**9), "u=1000000000: must be 1048576 at most"),
    "u giant with a v to match": Case(many_numbers(10**7), "u=10000000: must be 1048576 at most"),
    "u large without a v": Case(fields(u=10**6), r"shape \(7, 1\), and u=1000000 asks for \(groups, 1000000\)"),
    "projections of gigabytes": Case(
        all_at_once(many_numbers(10**6), fields(r=10)), "r=10, u=1000000: the projections of all modules would take", ONTO_A_BASE
    ),
    "a config of 40 MB": Case(large(40_000_000), r"adapter_config\.json takes 4\d{7} bytes, and a config at most 30000000"),
    "a fingerprint of megabytes": Case(
        fingerprint(modules="A" * 20_000_000), r"fingerprint in adapter_config\.json has 7500000 numbers", (*ONTO_A_BASE, BANK)
    ),
    "a long name in the fingerprint": Case(
        fingerprint(weights="A" * 20_000_000), r"has 20000000 characters in 'weights'"
    ),
    "a header of terabytes": Case(header(b"{}", 2**42), "is cut short.*ownload it again"),
    "a tensor of terabytes": Case(
        header(b'{"base_model.tinylora_v":{"dtype":"F32","shape":[1000000000000,1],"data_offsets":[0,4000000000000]}}'),
        "is cut short.*ownload it again",
    ),
    "a type with a long name": Case(
        header(b'{"base_model.tinylora_v":{"dtype":"' + b"A" * 10**6 + b'","shape":[7,1],"data_offsets":[0,28]}}'),
        "is cut short.*ownload it again",
    ),
    "a tensor with a long name": Case(
        tensors(**{"A" * 10**6: torch.zeros(2)}), r"adapter does not have \((base_model\.model\.)?A{80}", ONTO_A_BASE
    ),
    "a v of nothing": Case(
        header(b'{"base_model.tinylora_v":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}}' + b" " * 4),
        "cut short|holds no trained numbers",
    ),
    "a v of integers": Case(
        lambda files, folder: files.update({WEIGHTS: save({"base_model.tinylora_v": torch.ones(7, 1).long()})}),
        "'base_model.tinylora_v' of type I64 and shape .* holds no trained numbers",
    ),
    "many names": Case(
        fields(target_modules=[f"a{index}" for index in range(50_000)]),
        r"target_modules in adapter_config.json has 50000 entries, and this model has \d+ modules",
        ONTO_A_BASE,
    ),
    "very many names": Case(fields(exclude_modules=["a"] * 10**6), "exclude_modules in .* has 1000000 entries"),
    "copies of copies": Case(fields(modules_to_save=[""]), r"modules_to_save=\[''\] .*'' is no name"),
    "a copy that is not in the file": Case(
        fields(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] .*has no tensor of 'lm_head'", ONTO_A_BASE
    ),
    # Time
    "nested JSON": Case(config(b"[" * 10**6), "is no JSON", theirs=(AUTO,)),
    "nested JSON in a field": Case(
        fields(auto_mapping={"a": json.loads("[" * 400 + "]" * 400)}), r"auto_mapping=\{'a': \[\[.*\.\.\. in adapter_config"
    ),
    "target_modules for years": Case(fields(target_modules=CATASTROPHE), f"target_modules='{TOO_LONG}", ONTO_A_BASE),
    "exclude_modules for years": Case(fields(exclude_modules=CATASTROPHE), f"exclude_modules='{TOO_LONG}", (PEFT, TRANSFORMERS)),
    "tie for years": Case(fields(tie={"a": CATASTROPHE}, n_tie=None), f"tie='{TOO_LONG}", (PEFT, TRANSFORMERS)),
    "layers_pattern for years": Case(
        fields(layers_pattern=CATASTROPHE, layers_to_transform=[0], target_modules=["q_proj"]),
        f"layers_pattern='{TOO_LONG}",
        (PEFT, SECOND),
    ),
    "modules_to_save for years": Case(fields(modules_to_save=[CATASTROPHE]), f"modules_to_save='{TOO_LONG}", (PEFT,)),
    "a long pattern": Case(fields(target_modules="a|" * 600_000), "target_modules=.* has 1200000 characters", ONTO_A_BASE),
    "no pattern": Case(fields(target_modules="(" * 5000), r"target_modules='\(+'?\.\.\. in .* is no regular exp", ONTO_A_BASE),
    # Types and values
    "a field twice": Case(
        lambda files, folder: files.update({CONFIG: files[CONFIG].replace(b'"r": 2', b'"r": 2, "r": 1')}),
        r"is no JSON \('r' stands there twice\)",
    ),
    "a list": Case(config(b"[1]"), "holds a list and not the fields of a config", theirs=(AUTO,)),
    "no JSON": Case(config(b"\x80\x04evil"), "is no JSON", theirs=(AUTO,)),
    "another method": Case(
        fields(peft_type="EVIL"), "peft_type is 'EVIL'|EVIL", theirs=(PEFT, SECOND, AUTO_PEFT, AUTO, TRANSFORMERS, BANK)
    ),
    "r of another type": Case(fields(r={"a": 1}), r"r=\{'a': 1\} in adapter_config.json: must be int"),
    "modules of another type": Case(fields(target_modules=[["q_proj"]]), r"target_modules=\[\['q_proj'\]\] in .*: must be"),
    "weights of another type": Case(fingerprint(weights=["float"]), "fingerprint=.* must be dict"),
    "bias": Case(fields(bias="evil"), "bias='evil': allowed are 'none', 'all', 'tinylora_only'"),
    "dropout": Case(fields(tinylora_dropout=float("nan")), "tinylora_dropout=nan: must be a number from 0 to 1"),
    "seed": Case(fields(projection_seed=2**70), "projection_seed=1180591620717411303424: must be an integer of 64 bits"),
    "a format of the future": Case(fields(format_version=10**9), "format_version=1000000000 .*pip install -U"),
    "a token that is not there": Case(
        fields(trainable_token_indices=[10**9]), r"PEFT cannot load .*\(IndexError: .*1000000000.*Nothing was loaded", (PEFT, SECOND)
    ),
    "tokens that are not in the file": Case(
        fields(trainable_token_indices=[-1]), r"PEFT cannot load .*\(KeyError: .*Nothing was loaded", (PEFT, SECOND)
    ),
    "weights of the base in other shapes": Case(
        tensors(**{"lm_head.weight": torch.zeros(3, 3), "model.norm.weight": torch.zeros(32)}),
        r"lm_head\.weight has shape \(3, 3\) in it and \(48, 32\) in the model",
        ONTO_A_BASE,
    ),
    "numbers of another save": Case(
        lambda files, folder: files.update({WEIGHTS: save({"base_model.tinylora_v": torch.ones(7, 1)})}),
        "The numbers in the adapter file are not those that adapter_config.json was saved with",
    ),
    "characters that act in a terminal": Case(
        fields(base_model_name_or_path="\x1b]0;evil\x07", peft_tinylora_version="\x1b[2J"), None, (INSPECT, PULL)
    ),
}  # fmt: skip
