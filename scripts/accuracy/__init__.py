"""Parts of scripts/bench_accuracy: networks with their data, methods, and measurements."""
