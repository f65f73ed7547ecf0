"""What a training step may minimise beside the mean nats of the whole model."""
