"""Language models of the mixers side by side: a comparison of our own, which no paper has."""
