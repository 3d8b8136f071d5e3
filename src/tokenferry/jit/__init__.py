"""From CUDA C++ text to a function that Python can launch: source, cubin, cache, launch. Knows nothing of experts."""
