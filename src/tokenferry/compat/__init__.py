"""APIs of other libraries, spoken by tokenferry. Imported by no other room."""
