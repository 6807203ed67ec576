"""Results files to pages, tables and charts: ``python -m benchmarks.report``."""
