"""What the experiments share: measuring, statistics, networks, and the paper's numbers."""
