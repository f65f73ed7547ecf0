"""Training on a mesh of devices: sums over all devices' rows, and what an axis of the mesh cannot split."""
