"""Recipes: what the user states. Torch-free."""
