"""Between nodes and ComfyUI's managers: the only code that uses its patchers, devices, casts and folders."""
