"""Text from a model: tokens drawn through its cache, and the texts they make."""
