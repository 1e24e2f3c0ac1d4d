"""Evaluation: protocols, runner and statistics."""
