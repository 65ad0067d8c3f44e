"""The project's own CUDA kernels: sources, run-time build and launch."""
