"""WebDataset shards: index, mixing, resume, bad samples."""
