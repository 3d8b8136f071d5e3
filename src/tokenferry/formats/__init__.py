"""Low-precision formats of rows in transit between ranks: FP8 and logfmt10."""
