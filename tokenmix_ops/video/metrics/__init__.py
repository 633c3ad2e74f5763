"""How good captions and retrieval are, in the numbers that the field prints."""
