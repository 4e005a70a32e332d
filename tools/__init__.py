"""Tools of the developers: benchmarks and generated documentation."""
