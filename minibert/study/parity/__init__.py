"""Compare every tensor with transformers: compare, judge, page."""
