"""The apparatus of the experiments: it measures, keeps, compares and writes down."""
