"""What several networks are made of, written once."""
