"""Corpora in an object store (gs://): `store` copies what is small, `ranges` reads the records that are needed."""
