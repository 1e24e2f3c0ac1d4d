"""The vlarl command line."""
