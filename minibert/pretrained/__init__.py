"""Checkpoints, tokenizers and downloads: everything between the model and a disk."""
