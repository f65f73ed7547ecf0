"""Mixers of newer delta rules: several writes a token, erasing apart from writing."""
