"""Data: from text to MDS shards with a manifest, and from shards to the rows of a step.

The format is mosaicml-streaming's; order and reading are ours: the rows of a step are a pure function
of (seed, step), so resume, layout and number of workers cannot change them.
"""
