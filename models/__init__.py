"""Pure PyTorch networks, one package per method: no Lightning, no file access, no printing."""
