"""The gated ops with no decay, or one of each head."""
