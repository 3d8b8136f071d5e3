"""Where the work is done: one module a backend, all behind the protocol of `base`."""
