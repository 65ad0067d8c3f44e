"""Fine-tuning: recipe, optimiser, schedule, checkpoints. The loop is train.py."""
