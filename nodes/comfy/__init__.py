"""The seam between the core and ComfyUI: the only code that uses patchers, devices, casts and folders."""
