"""Networks and their parts; one folder per model."""
