"""The parts of scripts/studies/bench_serving.py: load, servers, what is compared with, what is timed alone, the report."""
