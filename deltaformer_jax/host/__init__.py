"""The machine that a program runs on: paths, locks, what is said while one waits, how it was called and installed.

Imports nothing of this project and nothing heavy, so that a program's first word comes at once.
"""
