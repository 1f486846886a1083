"""Every recipe against the numbered steps of its method spelt out with torch's own functions."""
