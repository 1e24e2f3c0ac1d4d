"""Placement plans: everything derived from a recipe and a cluster. Torch-free, pure."""
