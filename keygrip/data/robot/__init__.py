"""Robot demonstrations."""
