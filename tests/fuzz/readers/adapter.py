"""An adapter's two files (adapter_files.py, config.py, describe.py), on a base (register.py, checkpoint.py) and in a bank."""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from fuzz.harness import Reader, workplace
from peft import PeftModel, get_peft_model
from support import fill_vectors, make_tiny_llama

from peft_tinylora import AdapterBank, TinyLoraConfig, untrusted
from peft_tinylora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, packed_vectors, read_adapter
from peft_tinylora.describe import describe, lines
from peft_tinylora.errors import AdapterFileError, BasisError, ConfigError, TinyLoraError, UnsupportedModuleError


CONFIG = {"r": 2, "u": 3, "tie": "tiled", "n_tie": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
V = "base_model.tinylora_v"
LINEAR_LAYERS = 7  # of make_base
Files = dict[str, bytes]
# By the names of safetensors' format.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def make_base() -> torch.nn.Module:
    return make_tiny_llama(num_hidden_layers=1)


@functools.cache
def sound_model() -> PeftModel:
    model = get_peft_model(make_base(), TinyLoraConfig(**CONFIG)).eval()
    fill_vectors(model, 0.5)
    return model


@functools.cache
def sound_files(form: str) -> Files:
    """The files of a sound adapter: compact, in bfloat16, or portable."""
    model, folder = sound_model(), workplace() / form
    config = model.peft_config["default"]
    kept = config.save_basis, config.save_dtype
    config.save_basis, config.save_dtype = form == "portable", "bfloat16" if form == "bfloat16" else None
    model.save_pretrained(folder)
    config.save_basis, config.save_dtype = kept
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


FORMS = ("compact", "bfloat16", "portable")


def no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), f"a name stands there twice: {pairs}"
    return dict(pairs)


def parse_weights(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> type, shape and bytes of each tensor of a safetensors file, by its format's description alone."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length], object_pairs_hook=no_repeats)
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        found[name] = about["dtype"], about["shape"], data[8 + length + start : 8 + length + end]
    return found


def holds(tensor: torch.Tensor, said: tuple[str, list[int], bytes]) -> bool:
    """Whether a tensor is what a file says, bit for bit."""
    dtype, shape, data = said
    if list(tensor.shape) != shape:
        return False
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data if data else not tensor.numel()


def written(files: Files) -> Path:
    folder = workplace() / "changed"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def of_one_file(read: Callable[[Files], None], name: str) -> Callable[[bytes], None]:
    """Reads an adapter one of whose files is changed, the other one that of the compact form."""
    return lambda data: read(sound_files("compact") | {name: data})


def read_as_files(files: Files) -> None:
    """By `read_adapter` and `peft-tinylora inspect`; the numbers are those of an independent parser."""
    folder = written(files)
    config, tensors = read_adapter(folder)
    said = parse_weights(files[WEIGHTS_FILE])
    assert tensors.keys() == said.keys()
    assert all(holds(tensor, said[name]) for name, tensor in tensors.items())
    means_what_it_says(config, files[CONFIG_FILE])
    packed = packed_vectors(tensors)
    if packed is not None:  # its digest stands in the config
        assert packed.isfinite().all() and packed.shape[1] == config.u
    assert all(line.isprintable() for line in lines("changed", describe(folder)))


def means_what_it_says(config: TinyLoraConfig, data: bytes) -> None:
    """Fails unless each field of a config is what its JSON says."""
    said = json.loads(data, object_pairs_hook=no_repeats)
    for name in ("r", "u", "n_tie", "tie", "sigma", "projection_seed", "fingerprint", "format_version", "basis_repo"):
        value = getattr(config, name)
        if name in said and said[name] is not None:
            assert value == said[name] and isinstance(value, bool) == isinstance(said[name], bool), (name, value)
    targets = said.get("target_modules")
    assert config.target_modules == (set(targets) if isinstance(targets, list) else targets)


def load_onto_base(files: Files) -> None:
    """By PEFT; after a failure the base is as before, after a success v and the config are what the files say."""
    base = make_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    try:
        model = PeftModel.from_pretrained(base, written(files))
    except Exception:
        after = base.state_dict()
        assert after.keys() == before.keys() and not hasattr(base, "peft_config")
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        raise
    said = parse_weights(files[WEIGHTS_FILE])
    groups = [model.tinylora_v["default"][group] for group in sorted(model.tinylora_v["default"], key=int)]
    if V in said:
        dtype, shape, data = said[V]
        v = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)
        assert torch.equal(torch.stack(groups).detach(), v.float())
    else:  # a copy for each module, as PEFT has them
        n_tie = json.loads(files[CONFIG_FILE])["n_tie"]
        for module in range(LINEAR_LAYERS):
            assert holds(groups[module // n_tie].detach(), said[f"{V}.{module}"]), module
    means_what_it_says(model.peft_config["default"], files[CONFIG_FILE])
    assert all(v.isfinite().all() for v in groups)


@functools.cache
def sound_bank() -> AdapterBank:
    folder = workplace() / "compact"
    sound_files("compact")
    return AdapterBank(PeftModel.from_pretrained(make_base(), folder))


def load_into_bank(files: Files) -> None:
    bank = sound_bank()
    bank.load(written(files), "changed")
    dtype, shape, data = parse_weights(files[WEIGHTS_FILE])[V]
    v = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)
    assert torch.equal(bank["changed"], v.float())


class PeftsOwn(ValueError):
    """What PEFT says itself of a config that its own fields make impossible."""


PEFTS = (
    "Target modules",
    "No modules were targeted",
    "No `target_modules`",
    "`layers_to_transform`",
    "Please specify",
)


def of_our_kind(files: Files) -> bool:
    """Whether PEFT leaves an adapter to this package, or has an error of its own for an unknown kind."""
    try:
        return json.loads(files[CONFIG_FILE])["peft_type"] == "TINYLORA"
    except (ValueError, LookupError, TypeError):
        return False


def with_pefts_own(read: Callable[[Files], None]) -> Callable[[Files], None]:
    def checked(files: Files) -> None:
        try:
            with mock.patch.object(untrusted, "MOST_PATTERN_SECONDS", 0.7):
                read(files)
        except TinyLoraError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            if str(error).startswith(PEFTS) or not of_our_kind(files):
                raise PeftsOwn(" ".join(str(error).split())[:500]) from error
            raise

    return checked


def seeds_of(name: str) -> Callable[[], list[bytes]]:
    return lambda: [sound_files(form)[name] for form in FORMS]


FIELDS = (
    *(f'"{name}": '.encode() for name in CONFIG),
    b'"fingerprint": {',
    b'"modules": "',
    b'"peft_type": "TINYLORA"',
    b'"sigma": "split"',
)
HEADER = (
    b'"dtype":"BF16"',
    b'"dtype":"F8_E4M3"',
    b'"dtype":"F4"',
    b'"dtype":"I64"',
    b'"shape":[0,3]',
    b'"data_offsets":[0,0]',
    V.encode(),
)
OF_FILES = (AdapterFileError, ConfigError)
ON_A_BASE = (AdapterFileError, ConfigError, BasisError, UnsupportedModuleError, PeftsOwn)

READERS = [
    Reader("adapter_weights", of_one_file(read_as_files, WEIGHTS_FILE), OF_FILES, seeds_of(WEIGHTS_FILE), HEADER),
    Reader("adapter_config", of_one_file(read_as_files, CONFIG_FILE), OF_FILES, seeds_of(CONFIG_FILE), FIELDS),
    *(
        Reader(
            f"{where}_{name}",
            of_one_file(with_pefts_own(load), file),
            ON_A_BASE,
            seeds_of(file),
            tokens,
            is_slow=True,
        )
        for where, load in (("peft", load_onto_base), ("bank", load_into_bank))
        for name, file, tokens in (("weights", WEIGHTS_FILE, HEADER), ("config", CONFIG_FILE, FIELDS))
    ),
]
