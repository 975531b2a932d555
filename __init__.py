"""BitDance for ComfyUI. The nodes are imported only when ComfyUI asks for them, so that tests can import this file."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import BitDanceExtension

    return BitDanceExtension()
