"""Programs compiled for a device that is not there, and counted."""
