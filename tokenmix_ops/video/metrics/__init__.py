"""Standard metrics for captioning and retrieval."""
