"""Studies: a file that names everything once, its steps, what is known of those that were done, and the report."""
