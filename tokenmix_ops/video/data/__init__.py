"""Video data: reads files as tensors, and renders small clips of moving shapes."""
