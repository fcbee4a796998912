"""Octavo: large diffusion models trained from declarative YAML; frozen weights rest in FP8."""

__version__ = "0.1.0"
