"""The kernels: a folder each, with spec.py (host) and kernel.cuh (device); device/ is common code of the latter.

Declarations that both languages share are made in control_block.py, codes.py and decode_words.py, and emitted as C++
headers (header.py).
"""
