"""Images: found, decoded, split and written as shards."""
