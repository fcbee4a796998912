"""From a checked configuration and file headers to one frozen VRAM plan. No torch."""
