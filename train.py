"""Train a language model. `python train.py --help` explains the flags; the program is deltaformer_jax/train.py."""

from deltaformer_jax.train import main

if __name__ == "__main__":
    main()
