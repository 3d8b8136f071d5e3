"""How numbers are stored on their way between ranks: FP8 and logfmt10."""
