"""Record data in simulated environments."""
