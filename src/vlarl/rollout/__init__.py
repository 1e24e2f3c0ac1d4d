"""Rollout: from episodes to trajectories."""
