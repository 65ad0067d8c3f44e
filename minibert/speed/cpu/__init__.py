"""Inference by the project's own C++ kernels, on a CPU with AVX2 and no wider vectors."""
