"""Labelled text: BIO files, batches, scores, the demo corpus."""
