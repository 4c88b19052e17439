"""What can compute a file."""
