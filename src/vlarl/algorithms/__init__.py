"""Reinforcement-learning formulas as pure functions of tensors."""
