"""Reads of an associative memory with weights that need more of a row than its sum."""
