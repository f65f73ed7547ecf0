"""The program that evaluates a run's model; its usage is in __main__.py."""
