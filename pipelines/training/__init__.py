"""Training: what runs on Ray Train workers, and what starts and checks it."""
