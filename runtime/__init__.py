"""What machines need: attention on a CPU, sharding, files, cost, compiling, what a run records."""
