"""What is fast and need not be read first: prepacked layers, CPU and CUDA kernels, CUDA graphs."""
