"""Networks and what they are made of; one folder a model."""
