"""What scripts/bench_models times, and how each file is made."""
