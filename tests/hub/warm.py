"""A warm interpreter: it has imported what takes seconds, and forks for each command; Linux and macOS.

    python warm.py serve SOCKET                          imports, then says "ready" and waits
    python warm.py run SOCKET python script.py ...       as `python script.py ...`, in a fork of it: milliseconds

The fork has the arguments, folder, environment, stdin and stdout of who asked, also where huggingface_hub and OpenMP read
variables when they are imported. What is tested (peft_tinylora, trl_recipes) is not imported before.
"""

import array
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
import warnings


HEAVY = (
    *("torch", "numpy", "pandas", "matplotlib.pyplot", "datasets", "accelerate.commands.launch", "huggingface_hub"),
    *("transformers.generation", "transformers.pipelines", "transformers.models.llama.modeling_llama", "transformers.trainer"),
    *("peft", "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer", "bitsandbytes", "math_verify", "scipy.stats", "openai"),
)  # fmt: skip


def serve(path: str) -> None:
    """Import, then answer one connection after the other, each in a child of its own."""
    warnings.simplefilter("ignore")
    for name in HEAVY:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                os._exit(answer(connection))
            connection.close()
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended meanwhile; this one has not
                pass


def answer(connection: socket.socket) -> int:
    """Become the process that was asked for, and say how it ended."""
    _, [(_, _, data)], *_ = connection.recvmsg(1, socket.CMSG_SPACE(3 * 4))
    for number, descriptor in enumerate(array.array("i", data)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    with connection.makefile("r") as lines:
        job = json.loads(lines.readline())
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    importlib.reload(sys.modules["huggingface_hub.constants"])
    if "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    status = 0
    try:
        become(job["command"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{status}\n".encode())
    return status


def become(command: list[str]) -> None:
    """Run what the command line says in this process."""
    program, *arguments = command
    if program == "accelerate":
        from accelerate.commands import launch

        if arguments[:1] != ["launch"]:
            raise SystemExit(f"warm.py runs `accelerate launch` only, and got {command}")
        launched, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments[1:]))
        [_, *arguments], environment = launch.prepare_simple_launcher_cmd_env(launched)
        os.environ.update(environment)
    elif program == "peft-tinylora":
        arguments = ["-m", "peft_tinylora.cli", *arguments]
    while arguments[:1] == ["-u"] or arguments[:1] == ["-W"]:
        arguments = arguments[1 if arguments[0] == "-u" else 2 :]
    if arguments[:1] == ["-m"]:
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[:1] == ["-c"]:
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<command>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def run(path: str, command: list[str]) -> int:
    """Ask the server at `path` to run a command with this process's folder, environment, stdin and stdout."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
        job = {"command": command, "folder": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(job).encode() + b"\n")
        with connection.makefile("r") as lines:
            status = lines.readline()
    return int(status) if status else 1  # none: it was killed


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(run(sys.argv[2], sys.argv[3:]))
