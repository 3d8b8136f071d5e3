"""Low-precision formats of rows in transit between ranks: FP8 (`fp8`) and logfmt10 (`logfmt`)."""

from tokenferry.formats import fp8, logfmt

__all__ = ["fp8", "logfmt"]
