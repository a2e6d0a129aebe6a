"""Preparation of public video-text and image-text sets."""
