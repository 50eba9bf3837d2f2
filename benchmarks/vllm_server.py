"""A real vLLM server of the embedded model, on loopback, in a process group of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

import trl_recipes


ROOT = Path(trl_recipes.__file__).parents[1]
EMBEDDED = ROOT / "trl_recipes/embedded/model"
START_SECONDS = 240


class Server:
    """A running server.

    Args:
        model (`Path`): folder of the base model.
        log (`Path`): where its output goes.
        *options (`str`): more of vLLM's.
        dtype (`str`, *optional*): of its weights.
        port (`int`, *optional*): where it answers; a free one without.
        **environment (`str`): more variables; PEFT_TINYLORA_VLLM is `inline` without.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *options: str,
        dtype: str = "float32",
        port: int | None = None,
        **environment: str,
    ) -> None:
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port = port
        self.url, self.name, self.log = f"http://127.0.0.1:{self.port}", str(model), log
        own = {
            "PEFT_TINYLORA_VLLM": "inline",
            "PEFT_TINYLORA_VLLM_RATE": "1000",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            # `vllm serve`, which the CPU package does not install under the name that it looks for
            *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", self.name),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype, "--max-model-len", "256"),
            *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", "8", "--enforce-eager"),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *options,
        ]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | own | environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> "Server":
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return self
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def post(self, route: str, **body: object) -> tuple[int, dict | str]:
        """Status and answer of a request."""
        request = urllib.request.Request(
            f"{self.url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def complete(self, model: str, prompt: str = "What is 3 + 4?", **options: object) -> tuple[int, dict | str]:
        """Status and answer of a short greedy completion."""
        return self.post(
            "/v1/completions", **{"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0} | options
        )

    def get(self, route: str) -> str:
        """What a route says."""
        with urllib.request.urlopen(f"{self.url}{route}", timeout=60) as answer:
            return answer.read().decode()

    def memory_mb(self) -> float:
        """Resident memory of the server and the processes that it started, without what they share on disk."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(process.memory_full_info().uss for process in processes) / 1e6

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        processes = []
        if self.process.poll() is None:
            processes = psutil.Process(self.process.pid).children(recursive=True)
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in processes:
            if process.is_running():
                process.kill()
        self.process.wait(timeout=30)
