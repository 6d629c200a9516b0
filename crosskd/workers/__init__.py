"""Programs that benchmarks drive, not people."""
