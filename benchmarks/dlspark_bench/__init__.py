"""dlspark_bench: compare CPU clusters with GPUs, and engines with each other, by reliable measurements."""
