"""Generating text with a model: sampling tokens with its cache, and turning them into text as they come."""
