"""JSON in and out; the only place that knows JSON names."""
