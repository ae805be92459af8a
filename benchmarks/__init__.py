"""Speed and memory, both sides in one run: ``python -m benchmarks.step`` and its neighbours."""
