"""Hand results to ComfyUI: tensors on its device, texts on nodes, numbered files in the output folder."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import folder_paths
from comfy.cli_args import args
from torch import Tensor


def to_output(tensor: Tensor) -> Tensor:
    """Move a tensor to the device on which ComfyUI keeps the outputs of nodes."""
    return tensor.to(mm.intermediate_device())


def to_latent_type(samples: Tensor) -> Tensor:
    """Move the samples of a LATENT as `to_output` does, and cast them to ComfyUI's type for latents."""
    return samples.to(mm.intermediate_device(), mm.intermediate_dtype())


def show_text(text: str, node_id: str) -> None:
    """Show a text on the running node; the page shows the text of a node's `ui` only on ComfyUI's own nodes."""
    import server  # late: it imports all of ComfyUI, and these modules are tested without that

    server.PromptServer.instance.send_progress_text(text, node_id)


def show_note(text: str) -> None:
    """Show a text on the node that runs now, if one does."""
    from comfy_execution.utils import get_executing_context

    if (context := get_executing_context()) is not None:
        show_text(text, context.node_id)


def keep_note(text: str) -> None:
    """Show a text on the node that runs now, and leave it there when it ends; "" removes it. See web/bitdance.js."""
    from comfy_execution.utils import get_executing_context

    if (context := get_executing_context()) is None:
        return
    import server  # late, as above

    page = server.PromptServer.instance
    page.send_sync("bitdance.note", {"node": context.node_id, "text": text}, page.client_id)


def number_file(prefix: str, suffix: str, width: int = 0, height: int = 0) -> tuple[Path, dict[str, str]]:
    """Choose a numbered file in the output folder, as for images; returns its path, and its entry for the page.

    `width` and `height` replace %width% and %height% in the prefix.
    """
    root = folder_paths.get_output_directory()
    folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    name = f"{filename}_{counter:05}_{suffix}"
    return Path(folder) / name, {"filename": name, "subfolder": subfolder, "type": "output"}


def keeps_metadata() -> bool:
    """Return whether files may contain prompts and workflows; ComfyUI's --disable-metadata forbids it."""
    return not args.disable_metadata
