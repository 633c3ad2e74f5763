"""Video data: files to tensors, and the small world of moving shapes."""
