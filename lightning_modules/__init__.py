"""Lightning modules, one per training stage of a method, with their callbacks and metrics."""
