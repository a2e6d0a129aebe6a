"""Turn files into typed batches: robot demonstrations, and shards of videos and images with text."""
