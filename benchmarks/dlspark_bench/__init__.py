"""dlspark_bench: what a CPU cluster buys against a GPU, and an engine against another, in numbers that hold up."""
