"""Inference by the project's C++ kernels: with AVX2 alone all of it, with AVX512 bf16 and int8."""
