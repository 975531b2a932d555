"""Draw a picture on a fresh machine: `python3 scripts/demo.py ["prompt"] [--serve]`.

Sets up ComfyUI, starts it with this pack, and runs a workflow file in it with the prompt.
--serve leaves the server running until Ctrl-C and prints its address.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from comfyui import Server, comfy_cli, run_workflow
from environment import COMFYUI, ROOT, ensure_all, run

WORKFLOW = ROOT / "workflows" / "BitDance 1 Text to Image.json"
PROMPT = "a fox next to a mushroom on grass"
PICTURE = ROOT / "demo.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help=f'what to draw (default: "{PROMPT}")')
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running and print its address")
    arguments = parser.parse_args()
    prompt = " ".join(arguments.prompt) or PROMPT
    python, comfyui = ensure_all("demo")
    # ComfyUI needs --cpu to start on a machine without a GPU
    has_gpu = run(python, "-c", "import sys, torch; sys.exit(not torch.accelerator.is_available())") == 0
    print("starting ComfyUI", flush=True)
    try:
        with Server(python, comfyui, COMFYUI / "demo", *([] if has_gpu else ["--cpu"])) as server:
            print(f'drawing "{prompt}"', flush=True)
            status = draw_picture(python, server, prompt)
            if arguments.serve and status == 0:
                print(f"ComfyUI runs at {server.address} (Ctrl-C stops it)", flush=True)
                while server.process.poll() is None:
                    time.sleep(1)
            return status
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        sys.exit(str(error))


def draw_picture(python: Path, server: Server, prompt: str) -> int:
    """Run the workflow file with `prompt` as its positive prompt, using comfy-cli; return the exit status."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    positive = next(node for node in workflow["nodes"] if node.get("title") == "Prompt")
    positive["widgets_values"] = [prompt]
    before = set((server.base / "output").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / WORKFLOW.name
        file.write_text(json.dumps(workflow), encoding="utf-8")
        status = comfy_cli(python, "--no-json", *run_workflow(file, server)).returncode
    pictures = set((server.base / "output").glob("*.png")) - before
    if status or not pictures:
        print(f"the workflow failed; ComfyUI's log ends in:\n{server.tail()}", file=sys.stderr)
        return status or 1
    shutil.copy(pictures.pop(), PICTURE)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
