"""Ways into programs that do not know tokenferry: plug-ins of vLLM and SGLang, and of transformers.

None of them does anything unless it is chosen by name; docs/clients.md has the lines for each client.
"""
