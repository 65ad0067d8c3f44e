"""To study a model: its intermediates, pages that show them, published numbers, parity."""
