"""Makes a VRAM plan real: reads weights, places them, attaches adapters."""
