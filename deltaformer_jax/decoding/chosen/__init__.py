"""Caches of chosen tokens while texts are generated: a streaming cache of fixed size, or one eviction after the prompt.

Both choose which keys and values a trained model keeps; the model is not trained for it. They concern the attention
layers whose cache grows with the text. Layers with a state of fixed size or a window stay as they are.
"""
