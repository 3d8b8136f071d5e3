"""APIs of other libraries, on top of tokenferry. No other module of the package imports them."""
