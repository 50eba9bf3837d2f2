"""`peft-tinylora`: what an adapter is, to the Hub and back, other forms of it, and the basis cache.

peft-tinylora inspect ADAPTER                              base, modules, numbers, bytes; a folder or a Hub id
peft-tinylora push FOLDER REPOSITORY                       to the Hub, one commit of the adapter, its card and its curve
peft-tinylora pull REPOSITORY FOLDER                       from the Hub, checked
peft-tinylora export ADAPTER FOLDER --to lora              or merged, portable, compact
peft-tinylora inline ADAPTER                               as text, for the `model` field of a request to vLLM
peft-tinylora basis list                                   what is cached, and how large
peft-tinylora basis build MODEL [--load-in-4bit]           compute and keep the basis of a base model
peft-tinylora basis verify [MODEL]                         every byte; with a model, every factor against its weights
peft-tinylora basis clear [MODEL]                          remove the files of a base model, or all
peft-tinylora basis push MODEL REPOSITORY                  to the Hub
peft-tinylora basis pull MODEL REPOSITORY                  from the Hub, verified
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from . import hub
from .adapter_files import find_adapter, read_config
from .card import is_hub_id
from .cli_basis import add_basis_commands, add_loading_options, load_base
from .describe import Description, describe, lines
from .errors import BasisError, TinyLoraError, first_line
from .export import DTYPES, FORMS, export_adapter
from .inline import inline_adapter_of_folder
from .served import skeleton
from .trouble import is_out_of_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 where something is damaged or wrong, said in one line."""
    logging.getLogger("peft_tinylora").handlers = [logging.StreamHandler()]  # other libraries have their own
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (TinyLoraError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({first_line(error)}): end other programs, or take a machine with more.",
            file=sys.stderr,
        )
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        "peft-tinylora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="what an adapter is")
    inspect.set_defaults(run=inspect_adapter)
    push = commands.add_parser("push", help="upload an adapter")
    push.add_argument("folder", metavar="FOLDER", help="of the adapter")
    push.add_argument("repository", metavar="REPOSITORY", help="Hub id, user/name; made if there is none")
    push.add_argument("--revision", help="branch to commit to, made if there is none (default: main)")
    push.add_argument("--private", action="store_true", help="if the repository is made here")
    push.add_argument("--base", help="Hub id of the base model, where the adapter names a folder")
    push.set_defaults(run=push_adapter)
    pull = commands.add_parser("pull", help="download an adapter into a folder")
    pull.add_argument("repository", metavar="REPOSITORY", help="Hub id, user/name")
    pull.add_argument("folder", metavar="FOLDER", help="where to write it")
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    pull.set_defaults(run=pull_adapter)
    export = commands.add_parser("export", help="write an adapter in another form")
    inline = commands.add_parser("inline", help="an adapter as text, for requests to vLLM")
    inline.add_argument("--base", help="id or folder of the base model (default: what the adapter names)")
    inline.add_argument("--trust-remote-code", action="store_true", help="run the code that the base model ships with")
    inline.set_defaults(run=print_inline)
    for command in (inspect, export, inline):
        command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
        command.add_argument("--revision", help="branch, tag or commit, of one on the Hub (default: main)")
        command.add_argument("--subfolder", help="where in it the adapter is")
    export.add_argument("folder", metavar="FOLDER", help="where to write it")
    export.add_argument("--to", choices=FORMS, required=True)
    export.add_argument(
        "--dtype", choices=DTYPES, help="of a LoRA (default: float32) or of a merged model (the base's)"
    )
    export.add_argument("--base", help="id or folder of the base model (default: what the adapter names)")
    add_loading_options(export)
    export.set_defaults(run=export_folder)

    basis = commands.add_parser("basis", help="the basis cache").add_subparsers(required=True, metavar="COMMAND")
    add_basis_commands(basis)
    return parser


def inspect_adapter(options: argparse.Namespace) -> int:
    """Prints what an adapter is."""
    folder = find_adapter(options.adapter, options.revision, options.subfolder)
    print("\n".join(lines(options.adapter, describe(folder))))
    return 0


def push_adapter(options: argparse.Namespace) -> int:
    """Uploads an adapter and prints what was uploaded."""
    pushed = hub.push(
        options.folder,
        options.repository,
        revision=options.revision,
        private=options.private or None,
        base=options.base,
    )
    print(f"pushed {', '.join(pushed.files)}: {pushed.url}")
    return 0


def pull_adapter(options: argparse.Namespace) -> int:
    """Downloads an adapter and prints what it is."""
    found, names = hub.pull(options.repository, options.folder, revision=options.revision)
    print(f"downloaded {', '.join(names)} into {options.folder}")
    print("\n".join(lines(options.repository, found)))
    return 0


def export_folder(options: argparse.Namespace) -> int:
    """Writes an adapter in another form and prints what it takes and, of a merged model, what rounding cost."""
    found = describe(find_adapter(options.adapter, options.revision, options.subfolder))
    config = found.config
    name = base_of(options, config.base_model_name_or_path)
    load_as_trained(options, found)
    report = export_adapter(
        options.adapter,
        options.folder,
        options.to,
        load_base(name, options, revision=None if options.base else config.revision, task_type=config.task_type),
        options.dtype,
        revision=options.revision,
        subfolder=options.subfolder,
    )
    if report is not None:
        print(report)
    for path in sorted(Path(options.folder).iterdir()):
        print(f"{path.stat().st_size:>10} bytes  {path}")
    return 0


def print_inline(options: argparse.Namespace) -> int:
    """Prints an adapter as text."""
    folder = find_adapter(options.adapter, options.revision, options.subfolder)
    config = read_config(folder)
    name = base_of(options, config.base_model_name_or_path)
    base = skeleton(name, None if options.base else config.revision, options.trust_remote_code)
    print(inline_adapter_of_folder(folder, base).text())
    return 0


def base_of(options: argparse.Namespace, named: str | None) -> str:
    """The base model of an adapter: what `--base` says, or else what its config names."""
    name = options.base or named
    if name is None:
        raise BasisError(f"{options.adapter} names no base model: say which with --base.")
    if not (options.base or Path(options.adapter).is_dir() or is_hub_id(name)):
        # What somebody else's file names is not opened here.
        raise BasisError(f"{options.adapter} names {name[:100]!r} as its base model, a path: say which with --base.")
    return name


def load_as_trained(options: argparse.Namespace, found: Description) -> None:
    """Sets the options of loading to the form of the base that an adapter was trained on, where they say nothing."""
    library, _, rest = found.weights.partition(" ")
    if library != "bnb" or options.load_in_4bit or options.load_in_8bit:
        return
    bits, _, quant_type = rest.partition(" ")
    options.load_in_4bit, options.load_in_8bit = bits == "4bit", bits == "8bit"
    options.quant_type = quant_type or options.quant_type


if __name__ == "__main__":
    sys.exit(main())
