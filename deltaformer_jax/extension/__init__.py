"""A trained model's longer context: the config that trains it, and what that changed. Its program is `extend.py`."""

METHODS = ("longred", "mixed", "plain")
