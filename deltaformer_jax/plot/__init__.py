"""The program that plots the curves of runs; its usage is in __main__.py."""
