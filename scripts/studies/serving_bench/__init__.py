"""The pieces of scripts/studies/bench_serving.py: load, servers, the stock handler, and what is timed in this process."""
