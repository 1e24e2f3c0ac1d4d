"""Simulators behind one EnvPool."""
