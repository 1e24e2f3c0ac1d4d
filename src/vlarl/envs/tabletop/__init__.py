"""Owns `tabletop`, the shipped simulator: a gripper, coloured objects and plates on a table. Importing it loads no torch."""
