"""Octavo: train large diffusion models from declarative YAML, with FP8 storage for every weight that no gradient updates."""

__version__ = "0.1.0"
