"""The pieces of scripts/studies/bench_serving.py: load, servers, the stock handler, and timings in this process."""
