"""DeltaFormer: Xu et al., "DeltaFormer: unlock the state space of Transformer", NeurIPS 2025."""
