"""What eval.py reads and writes: suites, tasks, predictions, systems, metrics, the report."""
