"""State tracking: Merrill et al., "The illusion of state in state-space models", 2024; Grazzi et al., "Unlocking
state-tracking in linear RNNs through negative eigenvalues", 2024."""
