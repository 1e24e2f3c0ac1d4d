"""The worker rank: entry, set-up and the training loop."""
