"""What a run shows and keeps of itself: metrics, trackers, statistics, traces."""
