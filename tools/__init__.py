"""Developer tools: benchmarks and generated documentation."""
