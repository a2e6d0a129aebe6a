"""Videos and images with conversations."""
