"""A training step compiled for devices that are not at hand, and what it says: memory, communication, a time."""
