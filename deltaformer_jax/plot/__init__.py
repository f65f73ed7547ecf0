"""The program that draws the curves of runs: __main__.py says how."""
