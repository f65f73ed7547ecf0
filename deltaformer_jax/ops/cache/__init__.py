"""Caches: what they hold, how an op goes on from one, and one compressed to fewer keys."""
