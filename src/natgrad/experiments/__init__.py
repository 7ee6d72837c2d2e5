"""The comparison of methods on real data: data, networks, training runs and reports."""
