"""The app of `paretofuse serve` in several processes, on one machine or many, by Ray Serve."""
