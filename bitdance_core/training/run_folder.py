"""The folder of a run: the state that it resumes from, its log and its sample pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..checkpoints.files import SAFETENSORS_NAMES, open_safetensors, write_whole
from ..checkpoints.writer import Planned, write_safetensors
from ..errors import BitDanceError
from .settings import Schedule

HEADER_KEY = "bitdance_run"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """What lies beside the result `out` while it is trained: `NAME_run`.

    `stamps` identify the model and the pictures; with the settings they decide the result.
    """

    out: Path
    settings: Schedule
    stamps: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.stem}_run")

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def latest(self) -> Path:
        """Where the LoRA is as of the last save."""
        return self.folder / "latest.safetensors"

    def begin(self, resumes: bool) -> tuple[int, dict[str, Tensor]]:
        """Return the steps done and their state; 0 and nothing for a new run.

        Raises BitDanceError for a result that exists, for a stopped run that is not to be resumed, and for one with
        other settings, another model or other pictures.
        """
        if self.out.exists():
            raise BitDanceError(f"--out {self.out} exists already; give another file, or move it away")
        if not self.state_file.exists():
            return 0, {}
        with open_safetensors(self.state_file) as file:
            try:
                stored = json.loads((file.metadata() or {})[HEADER_KEY])
                step, settings, stamps = int(stored["step"]), dict(stored["settings"]), dict(stored["stamps"])
            except (KeyError, TypeError, ValueError):
                raise BitDanceError(f"{self.state_file} is not the state of a run; delete {self.folder}") from None
            if not resumes:
                raise BitDanceError(
                    f"the training of {self.out} was stopped after step {step}; go on with --resume, or delete "
                    f"{self.folder} to begin anew"
                )
            others = self.settings.differences(settings)
            others += [f"another {name}" for name, stamp in self.stamps.items() if stamps.get(name) != stamp]
            if others:
                raise BitDanceError(
                    f"the training of {self.out} was begun otherwise ({', '.join(others)}); resume it with the "
                    "settings of then, or give another --out"
                )
            return step, {name: file.get_tensor(name) for name in file.keys()}

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Write the state after `step` steps, completely or not at all."""
        self.make()
        stored = {"step": step, "settings": dataclasses.asdict(self.settings), "stamps": dict(self.stamps)}
        tensors = [planned(name, tensor) for name, tensor in state.items()]
        write_safetensors(self.state_file, tensors, {HEADER_KEY: json.dumps(stored)}, lambda _: None)

    def make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitDanceError(f"the folder {self.folder} cannot be created ({error})") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        self.make()
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sample(self, image: Image.Image, step: int, number: int) -> Path:
        """Write a sample picture."""
        self.make()
        path = self.folder / f"step_{step:06}_{number}.png"
        write_whole(path, lambda file: image.save(file, "PNG"))
        return path

    def finish(self) -> None:
        """Remove what only an unfinished run needs; log and samples stay."""
        for path in (self.state_file, self.latest):
            path.unlink(missing_ok=True)


def planned(name: str, tensor: Tensor) -> Planned:
    """Plan a tensor in memory for `write_safetensors`."""
    return Planned(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), lambda: iter([tensor.cpu()]))
