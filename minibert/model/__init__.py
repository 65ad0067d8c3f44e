"""BERT. Reading order: layout.py, encoder.py, attention.py, heads.py, labels.py, config.py."""
