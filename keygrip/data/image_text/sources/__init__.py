"""Preparation of image-text sets."""
