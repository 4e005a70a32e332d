"""One line about a split, as the commands print it."""

from megatron_eso.data.manifest import Manifest


def summary_line(manifest: Manifest) -> str:
    """Return a split's counts in words."""
    skipped = f", {manifest.num_skipped} skipped" if manifest.num_skipped else ""
    return (
        f"{manifest.split}: {manifest.num_documents:,} documents{skipped}, "
        f"{manifest.text_bytes / 1e6:.1f} MB of text, {manifest.num_tokens:,} tokens "
        f"({manifest.bytes_per_token:.2f} bytes each), {manifest.num_samples:,} rows of "
        f"{manifest.sequence_length}, {manifest.num_shards} shards, vocabulary {manifest.vocab_size}"
    )
