"""Run a ComfyUI server with only this pack, in a separate base folder, and call its HTTP API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from environment import COMFYUI, ROOT

PACK = "bitdance"  # the pack's folder in custom_nodes, which is in the URLs of its help pages


class Server:
    """A ComfyUI that listens on 127.0.0.1 during a `with` block. `log` is the path of its log file."""

    def __init__(self, python: Path, comfyui: Path, base: Path, *options: str, port: int = 0, env=None) -> None:
        """Prepare the command; `base` is for the models, input, output and user folders; port 0 means a free port."""
        self.base, self.log = base, base / "comfyui.log"
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / PACK
        if not link.exists():
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(ROOT, target_is_directory=True)
            except OSError as error:  # Windows without developer mode
                sys.exit(f"cannot link {link} to {ROOT} ({error}); on Windows, switch the developer mode on")
        self._command = [
            str(python), "main.py", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-all-custom-nodes",
            "--whitelist-custom-nodes", PACK, *options,
        ]  # fmt: skip
        self._folder, self._env = comfyui, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._env, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.3)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start; {self.log} ends in:\n{self.tail()}")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str, **query: str) -> Any:
        """Send a GET request and return the JSON answer."""
        return json.loads(self.get_bytes(path, **query))

    def get_bytes(self, path: str, **query: str) -> bytes:
        url = self.address + path + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data: Any) -> Any:
        """Send a POST request and return the JSON answer (None if empty), also that of a refused prompt."""
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            content = error.read()
        return json.loads(content) if content.strip() else None

    def queue(self, prompt: dict, **extra: Any) -> str:
        """Queue a graph in API format and return its id. Raises RuntimeError with ComfyUI's answer if it refuses."""
        answer = self.post("/prompt", {"prompt": prompt, **extra})
        if "prompt_id" not in answer or answer.get("node_errors"):  # node_errors may concern one output of many
            raise RuntimeError(json.dumps(answer))
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """Wait until a prompt has ended and return its history. Raises RuntimeError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id].get("status", {}).get("status_str"):
                return history[prompt_id]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended; {self.log} ends in:\n{self.tail()}")
            time.sleep(0.05)
        raise RuntimeError(f"prompt {prompt_id} took longer than {timeout} s; the log ends in:\n{self.tail()}")

    def images(self, history: dict) -> list[bytes]:
        """Download the images that a prompt's nodes saved or showed, in the order of the node ids."""
        outputs = sorted(history["outputs"].items(), key=lambda item: int(item[0]))
        found = [file for _, output in outputs for file in output.get("images", [])]
        return [self.get_bytes("/view", **{key: f[key] for key in ("filename", "subfolder", "type")}) for f in found]


def comfy_cli(python: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run comfy-cli, ComfyUI's own command line, with its settings under `.comfyui` and without telemetry."""
    env = {**os.environ, "DO_NOT_TRACK": "1", "HOME": str(COMFYUI), "USERPROFILE": str(COMFYUI)}
    command = [python.with_name("comfy"), "--skip-prompt", *arguments]
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=env, **options)


def run_workflow(file: Path, server: Server) -> tuple[str | Path, ...]:
    """Return comfy-cli's arguments to run a workflow file, in API or UI format, and wait for its end."""
    return ("run", "--workflow", file, "--wait", "--host", "127.0.0.1", "--port", str(server.port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error_of(history: dict) -> str | None:
    """Return the message of the exception that ended a prompt, "interrupted" if a user did, None if it succeeded."""
    for event, data in history["status"]["messages"]:
        if event == "execution_error":
            return data["exception_message"].strip()
        if event == "execution_interrupted":
            return "interrupted"
    return None
