"""Look inside a model: intermediates, pages, published scores, parity with transformers."""
