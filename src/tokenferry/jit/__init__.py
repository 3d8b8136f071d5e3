"""Compile CUDA C++ text to kernels that Python can launch: source, cubin, cache, launch. Independent of experts."""
