"""Linear layers as arrays: certified norms, estimates from below, and chains of layers."""
