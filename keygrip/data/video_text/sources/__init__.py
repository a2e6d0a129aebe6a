"""Preparation of public video-text and image-text data sets."""
