"""The machine that a program runs on: paths, locks, signals, messages during long waits, how the program was called.

Imports nothing else of this project and no large package, so that a program can print its first line at once.
"""
