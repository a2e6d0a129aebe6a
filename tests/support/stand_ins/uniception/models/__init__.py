"""See `mapanything`."""
