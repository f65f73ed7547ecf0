"""Train a language model: `python train.py --help` says how. The program is deltaformer_jax/train.py."""

from deltaformer_jax.train import main

if __name__ == "__main__":
    main()
