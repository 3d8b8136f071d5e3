"""The kernels of `tokenferry limits`: the bare rates of links and memory."""
