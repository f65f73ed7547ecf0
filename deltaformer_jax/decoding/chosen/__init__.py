"""Caches of chosen tokens while texts are generated: a streaming cache of fixed size, or one eviction after the prompt.

Both choose which keys and values a trained model keeps. In layers that see all tokens they change what follows. In
layers that see a window, and first tokens and separators behind it, only what is not seen any more is dropped, which
changes nothing. Layers with a state of fixed size or a window alone stay as they are.
"""
