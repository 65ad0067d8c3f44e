"""Fine-tuning: recipe, corpus, optimiser, checkpoints. The loop is train.py (here: loop.py)."""
