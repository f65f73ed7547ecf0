"""Programs of several processes, and what starts them."""
