"""The only code that names torch.distributed."""
