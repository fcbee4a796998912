"""Sweeps: one command, many runs, one comparison. Nothing here imports torch."""
