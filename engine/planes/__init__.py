"""Planes: what one expert adds to one tensor, in the format that suits it. A file a format."""
