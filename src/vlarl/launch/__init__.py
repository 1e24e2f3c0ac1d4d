"""Launching: the run folder, the torchrun command and its supervision. Torch-free."""
