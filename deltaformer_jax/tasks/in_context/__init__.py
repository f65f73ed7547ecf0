"""Tasks whose answer stands in the row itself, after an earlier occurrence of a word."""
