"""Training by Lightning: the module, optimizers, callbacks, checkpoints and exact resume."""
