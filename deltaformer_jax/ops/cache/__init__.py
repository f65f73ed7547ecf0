"""Caches: what a cache holds, how an op continues from one, and how one is compressed to fewer entries."""
