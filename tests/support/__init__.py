"""Shared by several test files: cases, worker processes, compilers."""
