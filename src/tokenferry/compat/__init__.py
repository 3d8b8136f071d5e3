"""APIs of other libraries, on top of tokenferry. Modules that test or measure them import them, and no others."""
