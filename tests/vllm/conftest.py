"""A real vLLM server on loopback, serving SmolLM2. `make test-vllm` installs it; without it these tests are skipped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

START = 300.0
"""Seconds a start may take."""


class VLLM:
    """One server process, which can be killed and started again on its port."""

    def __init__(self, program: str, log: Path) -> None:
        self.program, self.log = program, log
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *more: str, wait: bool = True) -> None:
        from retrodict.models.hf.gguf import convert, smollm2_gguf

        command = [self.program, "serve", str(convert(smollm2_gguf())), "--served-model-name", "smollm2", "--host",
                   "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16", "--max-model-len", "512",
                   "--enforce-eager", "--enable-lora", "--max-lora-rank", "16", *more]  # fmt: skip
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "PYTHONPATH"))}
        env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}  # fmt: skip
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        began = time.monotonic()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() - began < START:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                opener.open(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"vLLM did not start; the end of its log:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.process = None


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    program = shutil.which(os.environ.get("RETRODICT_VLLM", "vllm"))
    if program is None:
        pytest.skip("vLLM is not installed; run: make test-vllm")
    server = VLLM(program, tmp_path_factory.mktemp("vllm") / "log.txt")
    server.start()
    yield server
    server.kill()
