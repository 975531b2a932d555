"""BitDance for ComfyUI. `comfy_entrypoint` imports the nodes, so that tests can import this file without ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import BitDanceExtension

    return BitDanceExtension()
