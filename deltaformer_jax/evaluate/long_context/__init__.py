"""Long contexts: texts of a given number of tokens with something in them to be found, and how often it is found."""
