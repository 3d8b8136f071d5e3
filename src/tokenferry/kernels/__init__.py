"""The kernels: one folder each, with spec.py (host) and kernel.cuh (device); device/ holds what kernel.cuh files share.

Declarations that both languages share are made in control_block.py, codes.py and decode_words.py, and emitted as C++
headers (header.py).
"""
