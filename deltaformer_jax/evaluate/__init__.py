"""The program that scores a run's model: __main__.py says how."""
