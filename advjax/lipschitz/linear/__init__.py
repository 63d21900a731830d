"""Linear layers as arrays: certified norms, lower estimates, and bounds of chains of layers."""
