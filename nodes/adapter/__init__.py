"""The seam between the core and ComfyUI: the only code that knows patchers, devices, casts and folders."""
