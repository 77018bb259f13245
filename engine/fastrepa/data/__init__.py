"""Images on disk to batches in memory: prepare, shards, reader, pipeline, codec."""
