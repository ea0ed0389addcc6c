"""What the scripts reproduce_* share: data, networks, runs and tables."""
