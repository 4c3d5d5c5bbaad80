"""The user's own network: imported, run without a GPU, and run although it was written for an older torch."""
