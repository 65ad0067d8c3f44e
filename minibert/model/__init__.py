"""The model itself: read this folder to understand BERT.

Reading order: layout.py, encoder.py, attention.py; then config.py and labels.py.
"""
