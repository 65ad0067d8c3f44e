"""What is fast and need not be read first: prepacked layers, fused kernels, CUDA graphs."""
